"""What a person sees: progress with time left, tables, and plain lines when the output is not a terminal.

The only place that draws. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

__all__ = [
    "ask",
    "close_output",
    "note",
    "plain",
    "prepare_streams",
    "print_json",
    "progress",
    "say",
    "size",
    "table",
    "write",
]

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_CONTROL_OR_BREAK = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def plain(text: str, *, lines: bool = True) -> str:
    """Text whose control characters are spelled out: a name in a file must not steer the terminal.

    ``lines`` False spells out line breaks and tabs as well.
    """
    pattern = _CONTROL if lines else _CONTROL_OR_BREAK
    return pattern.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def prepare_streams() -> None:
    """Replaces closed standard streams by empty ones, and spells out what a stream's encoding cannot say."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open to the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def close_output() -> None:
    """Sends what standard output still holds nowhere, so that the interpreter's end does not fail on it."""
    with open(os.devnull, "wb") as nowhere, suppress(OSError, ValueError):
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def say(text: str = "") -> None:
    """A line of result."""
    print(plain(text), flush=True)


def write(piece: str) -> None:
    """A piece of result, as it is."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def note(text: str) -> None:
    """A line beside the result, on stderr."""
    print(plain(text), file=sys.stderr, flush=True)


def ask(prompt: str) -> None:
    """What stands before the place where a person types; on stderr, as it is no result."""
    print(prompt, end="", file=sys.stderr, flush=True)


def print_json(data: Any) -> None:
    """One JSON object. A number that JSON has no word for (NaN in a file's own notes) is null."""
    data = json.loads(json.dumps(data), parse_constant=lambda name: None)
    unicode = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    print(json.dumps(data, indent=2, ensure_ascii=not unicode, allow_nan=False), flush=True)


def size(nbytes: float) -> str:
    """Bytes as people read them: MB below a thousand, else GB (powers of ten)."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"


@contextmanager
def progress(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yields a callback (done, total) that draws a bar with the time left on a terminal and nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    # Without markup: a name may hold brackets.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(plain(what, lines=False), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table with ``left`` text columns and right-aligned figures, the same in a terminal and in a file."""
    clean = [[plain(cell, lines=False) for cell in cells] for cells in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*clean)]

    def line(cells: Sequence[str]) -> str:
        parts = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "  ".join(parts).rstrip()

    say(line(clean[0]))
    say("  ".join("-" * w for w in widths))
    for row in clean[1:]:
        say(line(row))
