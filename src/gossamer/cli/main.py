"""The command line: ``gossamer VERB``. Each verb is a thin face of a documented Python call."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from gossamer.errors import GossamerError

__all__ = ["main"]

MODEL_HELP = "smollm2-135m, gemma3-270m, a .gguf file, a folder, or a hub id such as org/name"
FORMAT_HELP = 'a format expression such as "int4/g32", "int8/row @ int8/token" or "bf16"'


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"gossamer: {message}; see '{self.prog} --help'.", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gossamer",
        description="Language models as light as they can be: compress, run and measure them on a CPU.",
        epilog="Start with: gossamer demo",
    )
    from gossamer import __version__

    parser.add_argument("--version", action="version", version=f"gossamer {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, help: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=help)

    def model(p: argparse.ArgumentParser, optional: bool = False) -> None:
        p.add_argument("model", metavar="MODEL", nargs="?" if optional else None, help=MODEL_HELP)

    def threads(p: argparse.ArgumentParser) -> None:
        p.add_argument("--threads", type=int, metavar="N", help="threads (default: what affinity and quota allow)")

    def as_json(p: argparse.ArgumentParser) -> None:
        p.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    p = verb("demo", "Make the demo model several times smaller, measure what it cost, and ask it something.")
    p.add_argument(
        "model", metavar="MODEL", nargs="?", default="smollm2-135m", help=f"{MODEL_HELP} (default: %(default)s)"
    )
    p.add_argument(
        "-p", "--prompt", default="What is the capital of France?", help="the question (default: %(default)s)"
    )
    p.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help="tokens of text to measure on (default: %(default)s)"
    )
    threads(p)
    as_json(p)

    p = verb("run", "Answer a prompt, or chat when there is none.")
    model(p)
    p.add_argument("-p", "--prompt", help="the prompt; without it and without piped input, a conversation starts")
    p.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    p.add_argument("--raw", action="store_true", help="continue the prompt as plain text, without the chat template")
    p.add_argument("--format", metavar="EXPR", help=f"run in this format instead of the file's own: {FORMAT_HELP}")
    p.add_argument("--max-tokens", type=int, default=512, metavar="N", help="longest answer (default: %(default)s)")
    p.add_argument(
        "--temperature", type=float, metavar="T", help="0 takes the most likely token (default: the model's, else 0)"
    )
    p.add_argument("--top-k", type=int, metavar="K", help="only the K most likely tokens; 0 is off")
    p.add_argument(
        "--top-p", type=float, metavar="P", help="only the most likely tokens that hold this share; 1 is off"
    )
    p.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="only tokens at least P times as likely as the best"
    )
    p.add_argument(
        "--repeat-penalty", type=float, metavar="R", help="above 1 makes recent tokens less likely; 1 is off"
    )
    p.add_argument("--seed", type=int, metavar="N", help="equal seeds give equal answers (default: random)")
    p.add_argument(
        "--context", type=int, metavar="N", help="most tokens of prompt and answer (default: 4096 or the model's)"
    )
    p.add_argument(
        "--kv", default="f16", metavar="EXPR", help="how keys and values are stored: f16, f32, bf16, int8/row"
    )
    threads(p)

    p = verb("compress", "Store a model in another format.")
    model(p)
    p.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder to write; it must not exist")
    p.add_argument("--format", required=True, metavar="EXPR", help=FORMAT_HELP)
    p.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN=EXPR",
        help="another format for sites whose name or role matches, e.g. 'embed=int8/g32' or '*down_proj=bf16'",
    )
    threads(p)
    as_json(p)

    p = verb("eval", "Measure a model's quality on a text, alone or against a base.")
    model(p)
    p.add_argument("--against", metavar="BASE", help="measure the divergence from this model as well")
    p.add_argument("--format", metavar="EXPR", help=f"run in this format instead of the file's own: {FORMAT_HELP}")
    p.add_argument("--against-format", metavar="EXPR", help="the same for the base")
    p.add_argument(
        "--text", default="stdlib", metavar="FILE|NAME", help="a UTF-8 file or a known text (default: %(default)s)"
    )
    p.add_argument("--tokens", type=int, default=8192, metavar="N", help="tokens read (default: %(default)s)")
    p.add_argument("--window", type=int, default=512, metavar="N", help="tokens per window (default: %(default)s)")
    p.add_argument(
        "--score", choices=("second-half", "all"), default="second-half", help="which tokens of a window count"
    )
    p.add_argument(
        "--kv", default="f16", metavar="EXPR", help="how keys and values are stored: f16, f32, bf16, int8/row"
    )
    threads(p)
    as_json(p)

    p = verb("bench", "Measure speed, and the share of the memory bandwidth it reaches.")
    model(p, optional=True)
    p.add_argument(
        "--shape", metavar="NAME", help="random weights of a known shape instead of a model, e.g. llama-3.2-1b"
    )
    p.add_argument("--format", metavar="EXPR", help=FORMAT_HELP)
    p.add_argument("--repetitions", type=int, default=5, metavar="N", help="repetitions (default: %(default)s)")
    threads(p)
    as_json(p)

    p = verb("inspect", "Show what a model holds: tensors, formats, sizes, template, provenance.")
    model(p)
    p.add_argument("--tensors", action="store_true", help="list every tensor")
    as_json(p)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0, 2 for an error that was foreseen, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        # `eval` and `compress` are taken as module names elsewhere, so verbs live in modules of their own.
        module = importlib.import_module(f"gossamer.cli.{args.verb}_verb")
        code = module.run(args)
    except GossamerError as error:
        print(f"gossamer: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gossamer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone: what it wanted, it has.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        print("gossamer: there is not enough memory for this; choose a smaller format or --context.", file=sys.stderr)
        return 2
    return int(code or 0)


if __name__ == "__main__":
    raise SystemExit(main())
