"""The command line: ``gossamer VERB``. Each verb is a thin face of a documented Python call."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from gossamer.cli import ui
from gossamer.errors import GossamerError

__all__ = ["main"]

MODEL_HELP = "smollm2-135m, gemma3-270m, a .gguf file, a folder, or a hub id such as org/name"
FORMAT_HELP = 'a format expression such as "int4/g32", "int8/row @ int8/token" or "bf16"'
# Repeated here, for the modules that hold them take longer to load than help may take.
TEXTS = "stdlib, boolq, emma, mansfield, northanger, persuasion, pride or sense"
TASKS = "arc_easy, arc_challenge, hellaswag, piqa, winogrande, boolq or lambada"
SHAPES = "smollm2-135m, llama-3.2-1b, llama-3.2-3b, llama-3-8b, qwen2.5-0.5b, qwen3-0.6b, gemma-3-1b or mistral-7b"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _complain(f"{message}; see '{self.prog} --help'.")
        raise SystemExit(2)


def _at_least(least: int) -> Callable[[str], int]:
    """Reads an option that counts something, so that one out of range is refused before anything is loaded."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
        return value

    return read


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
        p.add_argument(
            "--threads", type=_at_least(1), metavar="N", help="threads (default: what affinity and quota allow)"
        )

    def keep(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "--keep",
            action="append",
            default=[],
            metavar="PATTERN=EXPR",
            help="another format for sites whose name or role matches, e.g. 'embed=int8/g32' or '*down_proj=bf16'; "
            "may be given several times, and the first that matches counts",
        )

    def windows(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "--tokens", type=_at_least(2), metavar="N", help="tokens read (default: 16 windows, 8192 tokens)"
        )
        p.add_argument("--windows", type=_at_least(1), metavar="N", help="the same, as a number of windows")
        p.add_argument(
            "--window", type=_at_least(2), default=512, metavar="N", help="tokens per window (default: %(default)s)"
        )
        p.add_argument(
            "--score",
            choices=("second-half", "all"),
            default="second-half",
            help="which tokens of a window count (default: %(default)s)",
        )
        p.add_argument(
            "--no-bos", action="store_true", help="no BOS token before a window, though the tokenizer asks for one"
        )

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
        "--tokens",
        type=_at_least(2),
        default=4096,
        metavar="N",
        help="tokens of text to measure on (default: %(default)s)",
    )
    threads(p)
    as_json(p)

    p = verb("run", "Answer a prompt, or chat when there is none.")
    model(p)
    p.add_argument("-p", "--prompt", help="the prompt; without it and without piped input, a conversation starts")
    p.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    p.add_argument("--raw", action="store_true", help="continue the prompt as plain text, without the chat template")
    p.add_argument("--format", metavar="EXPR", help=f"run in this format instead of the file's own: {FORMAT_HELP}")
    p.add_argument(
        "--max-tokens", type=_at_least(1), default=512, metavar="N", help="longest answer (default: %(default)s)"
    )
    p.add_argument(
        "--temperature", type=float, metavar="T", help="0 takes the most likely token (default: the model's, else 0)"
    )
    p.add_argument(
        "--top-k",
        type=_at_least(0),
        metavar="K",
        help="only the K most likely tokens; 0 is off (default: the model's, else 0)",
    )
    p.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="only the most likely tokens that hold this share; 1 is off (default: the model's, else 1)",
    )
    p.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="only tokens at least P times as likely as the best (default: the model's, else 0)",
    )
    p.add_argument(
        "--repeat-penalty",
        type=float,
        metavar="R",
        help="above 1 makes recent tokens less likely; 1 is off (default: the model's, else 1)",
    )
    p.add_argument(
        "--seed", type=_at_least(0), metavar="N", help="equal seeds give equal answers (default: random, and printed)"
    )
    p.add_argument(
        "--context",
        type=_at_least(1),
        metavar="N",
        help="most tokens of prompt and answer (default: 4096, or the model's own when that is less)",
    )
    p.add_argument(
        "--kv",
        default="f16",
        metavar="EXPR",
        help="how keys and values are stored: f16, f32, bf16, int8/row or uint4/row (default: %(default)s)",
    )
    threads(p)

    p = verb("compress", "Store a model in another format.")
    model(p)
    p.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="the folder to write; it must not exist, or be empty"
    )
    p.add_argument(
        "--recipe", metavar="NAME|FILE", help="how: the name of a recipe, or a YAML file of one's own (default: rtn)"
    )
    p.add_argument(
        "--format", metavar="EXPR", help=f"of all sites, or with --recipe of its linear layers: {FORMAT_HELP}"
    )
    keep(p)
    p.add_argument(
        "--calibration",
        metavar="self|FILE|NAME",
        help=f"the text that recipes look at: self (the model writes it), a UTF-8 file, or {TEXTS} "
        "(default: the recipe's, which is self unless it says otherwise)",
    )
    p.add_argument(
        "--calibration-tokens", type=_at_least(2), metavar="N", help="tokens of that text (default: the recipe's)"
    )
    p.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="N", help="of everything drawn (default: %(default)s)"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="tell sizes, time, memory and disk that it would take, and stop"
    )
    threads(p)
    as_json(p)

    p = verb(
        "export", "Write a model for other programs: GGUF for llama.cpp, compressed-tensors for Transformers and vLLM."
    )
    model(p)
    p.add_argument(
        "--to", required=True, choices=("gguf", "compressed-tensors"), help="a GGUF file, or a Hugging Face folder"
    )
    p.add_argument(
        "-o", "--output", required=True, metavar="PATH", help="the file or folder to write; it must not exist"
    )
    p.add_argument(
        "--lossy",
        metavar="TYPE,...",
        help="store what the target has no type for anew, in the first of these types that fits, and report the error: "
        "ggml types such as Q8_0, or F32, F16, BF16 and expressions such as int4/g64 for compressed-tensors",
    )
    as_json(p)

    p = verb("eval", "Measure a model's quality on a text or on tasks, alone or against a base.")
    model(p)
    p.add_argument("--against", metavar="BASE", help="measure the divergence from this model as well")
    p.add_argument("--format", metavar="EXPR", help=f"run in this format instead of the file's own: {FORMAT_HELP}")
    p.add_argument(
        "--against-format", metavar="EXPR", help="the same for the base, which is MODEL itself without --against"
    )
    p.add_argument(
        "--text",
        metavar="FILE|NAME",
        help=f"a UTF-8 file, or a known text: {TEXTS} (default: stdlib, or no text with --tasks)",
    )
    windows(p)
    p.add_argument(
        "--tasks",
        metavar="NAME,...",
        help=f"answer multiple-choice and last-word questions: {TASKS}",
    )
    p.add_argument(
        "--limit", type=_at_least(1), metavar="N", help="only the first N items of each task (default: all of them)"
    )
    p.add_argument("--noise", action="store_true", help="measure what the base run in another precision differs by")
    p.add_argument("--answers", action="store_true", help="compare greedy answers with the base's")
    p.add_argument("--sites", action="store_true", help="list each site's format, size and error against the base")
    p.add_argument(
        "--kv",
        default="f16",
        metavar="EXPR",
        help="how keys and values are stored: f16, f32, bf16, int8/row or uint4/row (default: %(default)s)",
    )
    threads(p)
    as_json(p)

    p = verb("compare", "Measure several recipes or formats of one model, and draw quality by size.")
    model(p)
    p.add_argument(
        "--recipes",
        required=True,
        metavar="A,B,...",
        help="recipes, recipes with another format such as gptq:int3/g64, format expressions such as int4/g32, and "
        "compressed folders",
    )
    keep(p)
    p.add_argument(
        "--text",
        default="stdlib",
        metavar="FILE|NAME",
        help=f"a UTF-8 file, or a known text: {TEXTS} (default: %(default)s)",
    )
    windows(p)
    p.add_argument("--against", metavar="BASE", help="the base of the divergence (default: MODEL as it is)")
    p.add_argument(
        "--inputs",
        metavar="EXPR",
        help="run every row with these inputs, such as bf16 or int8/g32, where its weights can take them "
        "(default: as each format says)",
    )
    p.add_argument("--no-speed", action="store_true", help="leave the speed of decoding out")
    p.add_argument(
        "-o", "--output", metavar="DIR", help="write compare.json, frontier.svg and report.html into this folder"
    )
    p.add_argument("--cache", metavar="DIR", help="where rows are kept (default: gossamer/compare in the user's cache)")
    p.add_argument("--fresh", action="store_true", help="measure again what is kept")
    threads(p)
    as_json(p)

    p = verb("report", "Write one HTML page about a compressed model: sizes, errors, quality, provenance.")
    p.add_argument("folder", metavar="DIR", help="a folder that 'compress MODEL' or 'compare MODEL -o' wrote")
    p.add_argument(
        "-o", "--output", metavar="FILE", help="the page to write (default: DIR's name with .html, in this folder)"
    )
    p.add_argument("--against", metavar="BASE", help="compare the weights with this model's where the ledger does not")
    p.add_argument(
        "--results",
        action="append",
        default=[],
        metavar="FILE",
        help="what 'eval --json' or 'compare --json' wrote; may be given several times",
    )

    p = verb("bench", "Measure speed, and the share of the memory bandwidth it reaches.")
    model(p, optional=True)
    p.add_argument(
        "--shape",
        metavar="NAME",
        help=f"random weights of a known shape instead of a model: {SHAPES}",
    )
    p.add_argument(
        "--formats",
        "--format",
        metavar="EXPR,...",
        help=f"run in each of these formats: {FORMAT_HELP} (default: the file's own; int4/g32 for --shape)",
    )
    keep(p)
    p.add_argument(
        "--batch",
        default="1",
        metavar="N,...",
        help="decode this many sequences at once, e.g. 1,4,8,16 (default: %(default)s)",
    )
    p.add_argument(
        "--prompt", type=_at_least(1), default=512, metavar="N", help="tokens of prefill (default: %(default)s)"
    )
    p.add_argument(
        "--tokens", type=_at_least(1), default=128, metavar="N", help="steps of decode (default: %(default)s)"
    )
    p.add_argument(
        "--repetitions", type=_at_least(1), default=5, metavar="N", help="repetitions (default: %(default)s)"
    )
    p.add_argument(
        "--peer", metavar="NAME", help="time this engine in turn with ours, in a process of its own: llama.cpp"
    )
    p.add_argument(
        "--peer-model",
        metavar="FILE",
        help="the GGUF file that the peer runs (default: MODEL when it is one, random Q4_0 weights for --shape)",
    )
    p.add_argument(
        "--peer-python", metavar="PATH", help="the Python that has the peer's module (default: this program's)"
    )
    p.add_argument("--plot", metavar="FILE", help="draw the result into an .svg, .png or .pdf file (needs matplotlib)")
    threads(p)
    p.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write one JSON object to FILE, or print it instead of text when there is no FILE",
    )

    p = verb("inspect", "Show what a model holds: tensors, formats, sizes, template, provenance.")
    model(p)
    p.add_argument("--tensors", action="store_true", help="list every tensor")
    p.add_argument("--site", metavar="NAME", help="how these sites run: a name, a pattern such as '*.0.*', or a role")
    as_json(p)

    p = verb("methods", "Show the published methods: paper, claim, mechanism, cost, and what was measured.")
    p.add_argument("name", metavar="NAME", nargs="?", help="one method, such as gptq, in full (default: a list of all)")
    as_json(p)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0, 2 for an error that was foreseen, 130 when interrupted."""
    ui.prepare_streams()
    try:
        args = _parse(argv)
        # `eval` and `compress` are taken as module names elsewhere, so verbs live in modules of their own.
        code = importlib.import_module(f"gossamer.cli.{args.verb}_verb").run(args)
    except GossamerError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        ui.close_output()  # the reader (head, less) has gone: what it wanted, it has
        return 0
    except OSError as error:
        what = error.filename if isinstance(error.filename, str) else "the output"
        _complain(f"{what} cannot be written or read: {error.strerror or error}; free some space or use another place.")
        ui.close_output()
        return 2
    except RecursionError:
        _complain("a file of the model nests too deeply to be shown; fetch it again.")
        return 2
    except MemoryError:
        _complain("there is not enough memory for this; choose a smaller format or --context.")
        return 2
    return int(code or 0)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(argv)
    if unknown:  # argparse itself would point to the help of the whole program, which does not list them
        _complain(f"unrecognized arguments: {' '.join(unknown)}; see 'gossamer {args.verb} --help'.")
        raise SystemExit(2)
    return args


def _complain(message: str) -> None:
    print(f"gossamer: {ui.plain(message, lines=False)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
