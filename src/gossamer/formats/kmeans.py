"""Codes into a table of values of its own: ``kmeans2``, ``kmeans3``, ``kmeans4``, per row or for the tensor.

A stored code c stands for table[c], float32, ascending; there is no scale. Tables come from one-dimensional k-means
with equal weights: an exact solution for 96 bins of the row, then Lloyd's iteration on its elements; nothing is drawn.

Bytes: the code fields of ``Coded``, and ``table`` F32: per tensor [2^B], per row [panel][2^B][16 rows].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats import layout
from gossamer.formats.node import PANEL, ROWS_PER_STEP, Field, RowSource

if TYPE_CHECKING:
    from gossamer.ops import Kernel

__all__ = ["KMeans", "cluster"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

BINS = 96  # of a row (or of the tensor's buckets), for the start
ROUNDS = 30  # Lloyd iterations at most
BUCKET_BITS = 20  # of a float32: values that share their upper 20 bits (2^-11 apart) count as one in a tensor's table


@dataclass(frozen=True)
class KMeans:
    """Codes of ``bits`` (2, 3 or 4) into a table ``per`` "row" or "tensor"."""

    bits: int
    per: str

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise FormatError(f"'kmeans{self.bits}' is not known; write kmeans2, kmeans3 or kmeans4.")
        if self.per not in ("row", "tensor"):
            raise FormatError(f"kmeans{self.bits} has a table per row or tensor, not '{self.per}'; write kmeans4/row.")

    def __str__(self) -> str:
        return f"kmeans{self.bits}/{self.per}"

    @property
    def integer(self) -> bool:
        return False

    def check(self, rows: int, cols: int) -> None:
        if rows < 1 or cols < 1:
            raise FormatError(f"{self} needs at least one row and one column, not {rows} x {cols}.")

    def fields(self, rows: int, cols: int) -> dict[str, Field]:
        tables = layout.panels(rows) * PANEL if self.per == "row" else 1
        return layout.code_fields(self.bits, rows, cols) | {"table": Field("F32", tables << self.bits)}

    def prepare(self, source: RowSource) -> F32 | None:
        """The table of the tensor, float32 [1, 2^bits]; None per row."""
        if self.per == "row":
            return None
        shift = np.uint32(32 - BUCKET_BITS)
        count, total = np.zeros(1 << BUCKET_BITS), np.zeros(1 << BUCKET_BITS)
        for r0 in range(0, source.shape[0], ROWS_PER_STEP):
            w = source.read(r0, min(source.shape[0], r0 + ROWS_PER_STEP)).ravel() + np.float32(0)  # one zero
            bucket = (w.view(np.uint32) >> shift).astype(np.int64)
            count += np.bincount(bucket, minlength=len(count))
            total += np.bincount(bucket, w, minlength=len(total))
        used = count > 0
        mean, weight = total[used] / count[used], count[used]
        order = np.argsort(mean, kind="stable")
        return cluster(mean[None, order], weight[None, order], 1 << self.bits)

    def encode_rows(
        self, w: F32, into: Mapping[str, npt.NDArray[Any]], first_row: int, cols: int, state: F32 | None
    ) -> None:
        table = state
        if table is None:
            points = np.sort(w, axis=-1).astype(np.float64)
            table = cluster(points, np.ones_like(points), 1 << self.bits)
        self.pack_rows(nearest(w, table), table, into, first_row)

    def pack_rows(self, codes: U8, table: F32, into: Mapping[str, npt.NDArray[Any]], first_row: int) -> None:
        """Lays out codes [n, cols] and their ascending tables [n, 2^bits] (per tensor [1, 2^bits], with row 0)."""
        layout.pack_codes(codes, self.bits, 0, into, first_row)
        if self.per == "row":
            layout.pack_by_row(table.astype(np.float32), into["table"], first_row)
        elif first_row == 0:
            into["table"][: 1 << self.bits] = table[0]

    def decode_rows(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int, r0: int, r1: int) -> F32:
        p0, p1 = r0 // PANEL, layout.panels(r1)
        keep = slice(r0 - p0 * PANEL, r1 - p0 * PANEL)
        codes = layout.unpack_codes(arrays, self.bits, cols, p0, p1)[keep]
        if self.per == "tensor":
            shared: F32 = arrays["table"][codes]
            return shared
        table = layout.unpack_by_row(arrays["table"], 1 << self.bits, p0, p1)[keep]
        own: F32 = np.take_along_axis(table, codes.astype(np.int64), axis=1)
        return own

    def kernel(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int) -> Kernel | None:
        from gossamer.ops import Kernel

        return Kernel(
            code=f"u{self.bits}",
            q4=arrays.get("q4"),
            q2=arrays.get("q2"),
            q1=arrays.get("q1"),
            table=arrays["table"],
            table_per_row=self.per == "row",
            group=layout.blocks(cols) * layout.BLOCK,
        )


def nearest(w: F32, table: F32) -> U8:
    """The nearest entry of each row's ascending table [n or 1, entries]; the lower one of a tie."""
    wide = table.astype(np.float64)
    codes = np.zeros(w.shape, np.uint8)
    for middle in ((wide[:, 1:] + wide[:, :-1]) / 2).T:
        codes += w > middle[:, None]
    # Unused entries repeat the largest, and a middle of equal entries is the entry: all above take the first of them.
    return codes


def cluster(points: F64, weights: F64, k: int) -> F32:
    """Weighted one-dimensional k-means of each row: ``points`` ascending [n, m], ``weights`` positive [n, m].

    Returns ascending tables, float32 [n, k]. Rows of at most k distinct points (as float32) get these exactly, the
    largest repeated. Else sum weight * (point - nearest)^2 is at a local optimum near the global one.
    """
    n = len(points)
    single = points.astype(np.float32) + np.float32(0)  # minus zero is zero
    new = np.concatenate([np.ones((n, 1), np.bool_), single[:, 1:] != single[:, :-1]], axis=1)
    few = new.sum(axis=1) <= k
    table = np.empty((n, k), np.float32)
    for row in np.flatnonzero(few):
        distinct = single[row, new[row]]
        table[row, : len(distinct)] = distinct
        table[row, len(distinct) :] = distinct[-1]
    rest = ~few
    if rest.any():
        p, w = points[rest], weights[rest]
        starts = [_start(p[i : i + 64], w[i : i + 64], k) for i in range(0, len(p), 64)]
        table[rest] = _lloyd(p, w, np.concatenate(starts))
    return table


def _start(p: F64, w: F64, k: int) -> F64:
    """The best k centers when the points of each bin stay together, by dynamic programming: float64 [n, k].

    Bins hold equal shares of the cube root of the density, the density of levels that is best when they are many;
    between neighbours that is weight / distance, so that far outliers are on their own.
    """
    rows, m = np.arange(len(p))[:, None], p.shape[1]
    share = np.cumsum(np.cbrt((w[:, 1:] + w[:, :-1]) * np.diff(p, axis=1) ** 2), axis=1)
    inner = _first(share, np.arange(1, BINS) / BINS * share[:, -1:]) + 1
    cuts = np.concatenate([np.zeros((len(p), 1), np.int64), inner, np.full((len(p), 1), m)], axis=1)
    middle = (w * p).sum(axis=1, keepdims=True) / w.sum(axis=1, keepdims=True)
    x = p - middle  # less to cancel
    mass, moment, square = (np.take_along_axis(_prefix(v), cuts, axis=1) for v in (w, w * x, w * x * x))
    between = [v[:, :, None] - v[:, None, :] for v in (mass, moment, square)]  # [row, j, i]: from cut i to cut j
    used = between[0] > 0
    cost = between[2] - between[1] ** 2 / np.where(used, between[0], 1)
    j, i = np.indices(cost.shape[1:])
    cost = np.where(i > j, np.inf, np.where(used, cost, 0))
    least, choices = cost[:, :, 0], []
    for _ in range(k - 1):
        total = least[:, None, :] + cost
        choices.append(total.argmin(axis=2))
        least = np.take_along_axis(total, choices[-1][..., None], axis=2)[..., 0]
    ends = [np.full(len(p), BINS)]
    for choice in reversed(choices):
        ends.append(choice[rows[:, 0], ends[-1]])
    bounds = np.stack([np.zeros(len(p), np.int64), *reversed(ends)], axis=1)
    mass, moment = (np.diff(v[rows, bounds], axis=1) for v in (mass, moment))
    edge = np.take_along_axis(p, np.minimum(cuts[rows, bounds[:, :-1]], m - 1), axis=1)
    return np.sort(np.where(mass > 0, middle + moment / np.where(mass > 0, mass, 1), edge), axis=1)


def _prefix(x: F64) -> F64:
    return np.concatenate([np.zeros((len(x), 1)), np.cumsum(x, axis=1)], axis=1)


def _first(ascending: F64, wanted: F64) -> I64:
    """For each row, how many of ``ascending`` [n, m] are at most each of ``wanted`` [n, q]."""
    return np.array([np.searchsorted(a, w, side="right") for a, w in zip(ascending, wanted)])


def _lloyd(p: F64, w: F64, centers: F64) -> F64:
    """Centers [n, k] moved to the means of what is nearest until nothing changes."""
    mass, moment = _prefix(w), _prefix(w * p)
    ends = np.full((len(p), 1), p.shape[1])
    for _ in range(ROUNDS):
        cuts = np.concatenate([0 * ends, _first(p, (centers[:, 1:] + centers[:, :-1]) / 2), ends], axis=1)
        share = np.diff(np.take_along_axis(mass, cuts, axis=1), axis=1)
        total = np.diff(np.take_along_axis(moment, cuts, axis=1), axis=1)
        # A center without points stays; sorting keeps the tables ascending whatever rounding did.
        moved = np.sort(np.where(share > 0, total / np.where(share > 0, share, 1), centers), axis=1)
        if np.array_equal(moved, centers):
            break
        centers = moved
    return centers
