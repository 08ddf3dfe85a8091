"""What a new user reads first."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import pytest
from program import gossamer

from gossamer import __version__
from gossamer.checkpoints.names import KNOWN
from gossamer.cli import main as cli
from gossamer.evaluate.score import SCORES
from gossamer.evaluate.shapes import SHAPES
from gossamer.evaluate.texts import NAMES

VERBS = {
    "demo": {"--prompt", "--tokens", "--threads", "--json"},
    "run": {"--prompt", "--system", "--max-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--seed"}
    | {"--repeat-penalty", "--threads", "--context", "--kv", "--raw", "--format"},
    "compress": {"--output", "--format", "--keep", "--threads", "--json"},
    "export": {"--to", "--output", "--lossy", "--json"},
    "eval": {"--against", "--format", "--against-format", "--text", "--tokens", "--window", "--score", "--kv"}
    | {"--threads", "--json"},
    "bench": {"--shape", "--format", "--formats", "--keep", "--batch", "--prompt", "--tokens", "--repetitions"}
    | {"--peer", "--peer-model", "--peer-python", "--plot", "--threads", "--json"},
    "inspect": {"--tensors", "--site", "--json"},
}


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    top = cli._parser()
    (verbs,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    yield from verbs.choices.items()


def text_of(*arguments: str) -> str:
    done = gossamer(*arguments)
    assert (done.code, done.err) == (0, "")
    return " ".join(done.out.split())


def test_the_first_help_names_every_verb() -> None:
    text = text_of("--help")
    assert all(f" {verb} " in text for verb in VERBS)
    assert "Start with: gossamer demo" in text
    assert gossamer("--version").out == f"gossamer {__version__}\n"


def test_every_option_is_known_and_documented() -> None:
    assert dict(parsers()).keys() == VERBS.keys()
    for verb, parser in parsers():
        actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
        long = {s for a in actions for s in a.option_strings if s.startswith("--")}
        assert long == VERBS[verb], verb
        for action in actions:
            assert action.help, f"{verb} {action.dest}"
            if isinstance(action.default, int | float | str) and not isinstance(action.default, bool):
                assert str(action.default) in parser.format_help(), f"{verb} {action.dest} hides its default"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    text = text_of(verb, "--help")
    assert all(option in text for option in VERBS[verb])
    assert "MODEL" in text


def test_names_in_the_help_are_all_there_are() -> None:
    texts = {verb: " ".join(parser.format_help().split()) for verb, parser in parsers()}
    assert all(name in texts["run"] for name in KNOWN)
    assert all(re.search(rf"\b{name}\b", texts["eval"]) for name in (*NAMES, *SCORES))
    assert all(name in texts["bench"] for name in SHAPES)
