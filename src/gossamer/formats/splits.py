"""Columns or rows in different formats: ``cols(N: A, ..., B)`` and ``rows(N: A, ..., B)``.

Every part but the last holds N input columns (output rows), the last one the rest in ascending order.

    index    U32 [sum of the N]: the columns (rows) of the first part, ascending, then those of the second, ...
    0. 1. …  the arrays of each part, a matrix of the gathered columns (rows)

Without hints the first part takes the columns (rows) with the largest max|w|, the next one those that follow, and
so on; of equal ones those that come first. Hints ``columns`` (``rows``): a list of indices for each part but the last,
or the indices themselves where there are two parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats.composite import (
    F32,
    MAX_INDEX,
    Arrays,
    Branch,
    Composite,
    Hints,
    chosen,
    decode_branch,
    encode_parts,
    padded,
    text,
)
from gossamer.formats.node import Field

__all__ = ["MAX_PARTS", "Cols", "Rows"]

U32 = npt.NDArray[np.uint32]

MAX_PARTS = 8


@dataclass(frozen=True)
class _Split(Composite):
    counts: tuple[int, ...]  # of each part but the last
    branches: tuple[Branch, ...]

    name = ""
    what = ""  # the hint, and what is split

    def __post_init__(self) -> None:
        if not 2 <= len(self.branches) <= MAX_PARTS or len(self.counts) != len(self.branches) - 1:
            raise FormatError(
                f"{self.name}(...) has 2 to {MAX_PARTS} parts, all but the last with a count: "
                f"{self.name}(256: bf16, int4/row)."
            )
        if not all(1 <= n <= MAX_INDEX for n in self.counts):
            raise FormatError(f"{self.name}(...) cannot take {min(self.counts)} {self.what}; write 1 or more.")
        super().__post_init__()

    def __str__(self) -> str:
        counted = [f"{n}: {text(b)}" for n, b in zip(self.counts, self.branches)]
        return f"{self.name}({', '.join([*counted, text(self.branches[-1])])})"

    @property
    def parts(self) -> tuple[tuple[str, Branch], ...]:
        return tuple((str(i), branch) for i, branch in enumerate(self.branches))

    def _check_count(self, size: int) -> None:
        if sum(self.counts) >= size:
            raise FormatError(
                f"{self} takes {sum(self.counts)} {self.what} before its last part, but the matrix has {size}; "
                "leave at least one."
            )

    def own_fields(self, rows: int, cols: int) -> dict[str, Field]:
        return {"index": Field("U32", sum(self.counts))}

    def _sizes(self, size: int) -> list[int]:
        return [*self.counts, size - sum(self.counts)]

    def choose(self, score: F32, hints: Hints) -> U32:
        """The index array, from the hint or, without one, by falling score; of equal ones those that come first."""
        total, size = sum(self.counts), len(score)
        if self.what in hints:
            given = hints[self.what]
            if len(self.counts) > 1:
                given = np.concatenate([np.asarray(part).ravel() for part in given]) if len(given) else []
            elif np.ndim(given) == 2:
                given = given[0]
            index = chosen(given, total, size, self.what)
        else:
            index = np.argsort(-score, kind="stable")[:total].astype(np.uint32)
        ends = np.cumsum([0, *self.counts])
        return np.concatenate([np.sort(index[a:b]) for a, b in pairwise(ends.tolist())])

    def indices(self, arrays: Arrays, size: int) -> Iterator[tuple[str, Branch, U32]]:
        """(name, branch, ascending columns or rows) of each part; ``size`` is how many there are in all."""
        index = arrays["index"][: sum(self.counts)]
        start = 0
        for (name, branch), count in zip(self.parts, self.counts):
            yield name, branch, index[start : start + count]
            start += count
        rest = np.ones(size, bool)
        rest[index] = False
        yield self.parts[-1][0], self.parts[-1][1], np.flatnonzero(rest).astype(np.uint32)

    def _check_index(self, arrays: Arrays, size: int, where: str) -> None:
        total = sum(self.counts)
        index = arrays["index"][:total].astype(np.int64)
        borders = np.cumsum(self.counts)[:-1] - 1
        climbs = np.diff(index) > 0
        climbs[borders] = True
        if index.max() >= size or not climbs.all() or len(np.unique(index)) != total:
            raise FormatError(
                f"{where}: array 'index' of {self} must name {total} different {self.what} of {size}, ascending "
                "within each part."
            )


@dataclass(frozen=True)
class Cols(_Split):
    """Input columns in different formats."""

    name = "cols"
    what = "columns"
    hints = ("columns",)

    def children(self, rows: int, cols: int) -> list[tuple[str, Branch, int, int]]:
        return [(f"{name}.", branch, rows, n) for (name, branch), n in zip(self.parts, self._sizes(cols))]

    def check_shape(self, rows: int, cols: int) -> None:
        self._check_count(cols)

    def encode_matrix(self, w: F32, hints: Hints) -> dict[str, npt.NDArray[Any]]:
        own = {"index": padded(self.choose(np.abs(w).max(axis=0), hints))}
        pieces = {name: (b, w[:, index]) for name, b, index in self.indices(own, w.shape[1])}
        return encode_parts(pieces, hints, own)

    def decode_rows(self, arrays: Arrays, rows: int, cols: int, r0: int, r1: int) -> F32:
        out = np.empty((r1 - r0, cols), np.float32)
        for name, branch, index in self.indices(arrays, cols):
            out[:, index] = decode_branch(branch, arrays, f"{name}.", rows, len(index), r0, r1)
        return out

    def check_own(self, arrays: Arrays, rows: int, cols: int, where: str) -> None:
        self._check_index(arrays, cols, where)


@dataclass(frozen=True)
class Rows(_Split):
    """Output rows in different formats."""

    name = "rows"
    what = "rows"
    hints = ("rows",)

    def children(self, rows: int, cols: int) -> list[tuple[str, Branch, int, int]]:
        return [(f"{name}.", branch, n, cols) for (name, branch), n in zip(self.parts, self._sizes(rows))]

    def check_shape(self, rows: int, cols: int) -> None:
        self._check_count(rows)

    def encode_matrix(self, w: F32, hints: Hints) -> dict[str, npt.NDArray[Any]]:
        own = {"index": padded(self.choose(np.abs(w).max(axis=1), hints))}
        pieces = {name: (b, w[index]) for name, b, index in self.indices(own, len(w))}
        return encode_parts(pieces, hints, own)

    def decode_rows(self, arrays: Arrays, rows: int, cols: int, r0: int, r1: int) -> F32:
        out = np.empty((r1 - r0, cols), np.float32)
        for name, branch, index in self.indices(arrays, rows):
            a, b = (int(i) for i in np.searchsorted(index, [r0, r1]))
            if a < b:
                out[index[a:b] - r0] = decode_branch(branch, arrays, f"{name}.", len(index), cols, a, b)
        return out

    def check_own(self, arrays: Arrays, rows: int, cols: int, where: str) -> None:
        self._check_index(arrays, rows, where)
