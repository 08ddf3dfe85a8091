"""One sweep over the columns, whatever they are projected on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers.factor import UnstableError

__all__ = ["Projection", "Sweep", "sweep"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

ELEMENTS = 1 << 22  # of the rows swept together: rows are independent of each other
FARTHEST = 10.0  # times the largest weight: a weight that moved so far shows a factor that is no use


class Projection(Protocol):
    """What columns are rounded to: a grid, a pattern of zeros, or both.

    ``span``: how many columns are decided on together; ``begin`` is called as the sweep comes to each such run.
    """

    span: int

    def begin(self, first: int, current: F32, rows: slice) -> None:
        """``current``: float32 [at most span, rows], the weights, as updated so far, of the columns at places
        ``first`` and after in the sweep."""

    def column(self, at: int, current: F32, rows: slice) -> tuple[npt.NDArray[np.generic], F32]:
        """Codes and values, [rows], for the column at place ``at`` of the sweep, given its weights as updated."""


@dataclass
class Sweep:
    """codes: uint8 [rows, count]; values: float32 [rows, cols], outliers and free columns as they are; both in the
    order of the sweep. loss: the sum of (d / U_ii)^2. entries: flat indices into [rows, count] of outliers, what is to
    be added to their codes' values, and what rounding them would have cost."""

    codes: U8
    values: F32
    loss: float
    entries: I64 | None
    entry_values: F32
    entry_costs: F32


def sweep(
    w: F32, factor: F32, order: I64, count: int, projection: Projection, *, block: int, limit: float | None = None
) -> Sweep:
    """Fixes the first ``count`` columns of ``order``, the others take up the error.

    w: float32 [rows, cols]; factor: U of ``inverse_factor`` in that order. limit: weights whose rounding would cost
    more, (d / U_ii)^2 > limit, stay as they are and are listed. Raises UnstableError where weights explode.
    """
    rows, cols = w.shape
    out = Sweep(
        np.empty((rows, count), np.uint8), np.empty((rows, cols), np.float32), 0.0, None,
        np.empty(0, np.float32), np.empty(0, np.float32),
    )  # fmt: skip
    farthest = FARTHEST * float(np.abs(w).max(initial=0))
    kept: list[tuple[I64, F32, F32]] = []
    step = max(64, ELEMENTS // cols // 16 * 16)
    for r0 in range(0, rows, step):
        part = _Part(w, slice(r0, min(rows, r0 + step)), factor, order, count, projection)
        out.loss += part.run(block, limit, farthest)
        out.codes[part.rows] = part.codes.T
        out.values[part.rows] = part.values.T
        kept += part.kept
    if limit is not None:
        empty = np.empty(0, np.float32)
        out.entries = np.concatenate([np.empty(0, np.int64), *(k[0] for k in kept)])
        out.entry_values = np.concatenate([empty, *(k[1] for k in kept)])
        out.entry_costs = np.concatenate([empty, *(k[2] for k in kept)])
    return out


class _Part:
    """Some rows, transposed, so that a column lies together. Errors are not pushed to later columns but gathered when
    a column's turn comes: by a matrix product for a block, by a matrix-vector product within it."""

    def __init__(self, w: F32, rows: slice, factor: F32, order: I64, count: int, projection: Projection) -> None:
        self.rows, self.factor, self.count, self.projection = rows, factor, count, projection
        self.w: F32 = np.ascontiguousarray(w[rows][:, order].T)
        n = self.w.shape[1]
        self.errors = np.empty((count, n), np.float32)
        self.codes = np.empty((count, n), np.uint8)
        self.values = np.empty(self.w.shape, np.float32)
        self.kept: list[tuple[I64, F32, F32]] = []

    def updated(self, start: int, stop: int, fixed: int) -> F32:
        """The weights at places start..stop with what the first ``fixed`` columns left: float32 [stop - start, n]."""
        if not fixed:
            return self.w[start:stop].copy()
        current: F32 = self.factor[:fixed, start:stop].T @ self.errors[:fixed]
        np.subtract(self.w[start:stop], current, out=current)
        return current

    def run(self, block: int, limit: float | None, farthest: float) -> float:
        count, span = self.count, self.projection.span
        for b in range(0, count, block):
            e = min(count, b + block)
            current = self.updated(b, e, b)
            inside = np.ascontiguousarray(self.factor[b:e, b:e].T)
            for i in range(b, e):
                if span and i % span == 0:
                    self.projection.begin(i, self.updated(i, min(count, i + span), i), self.rows)
                x = current[i - b]
                if i > b:
                    x -= inside[i - b, : i - b] @ self.errors[b:i]
                codes, values = self.projection.column(i, x, self.rows)
                error = self.errors[i]
                np.subtract(x, values, out=error)
                error /= inside[i - b, i - b]
                self.codes[i] = codes
                self.values[i] = values
                if limit is not None:
                    self._keep(i, x, values, error, limit)
            moved = np.abs(current - self.w[b:e]).max(initial=0)
            if not moved <= farthest:
                raise UnstableError
        self.values[count:] = self.updated(count, len(self.w), count)
        if not np.isfinite(self.values[count:]).all():
            raise UnstableError
        return float(np.vdot(self.errors, self.errors))

    def _keep(self, i: int, x: F32, values: F32, error: F32, limit: float) -> None:
        cost = error * error
        which = np.flatnonzero(cost > limit)
        if len(which):
            self.kept.append(((which + self.rows.start) * self.count + i, x[which] - values[which], cost[which]))
            error[which] = 0
            self.values[i, which] = x[which]
