"""The Hessian sweep on tables of values, and on matrices some entries of which are stored elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers.factor import UnstableError, check_hessian, describe, inverse_factor, order_of
from gossamer.compress.solvers.grid import Grid
from gossamer.compress.solvers.obs import MOST_DAMPING, Obs
from gossamer.compress.solvers.projections import Static
from gossamer.compress.solvers.sweep import Projection, sweep
from gossamer.errors import UsageError
from gossamer.formats import KMeans, Packed, allocate, layout
from gossamer.formats.kmeans import nearest

__all__ = ["damped", "obs_on_grid", "obs_on_tables"]

T = TypeVar("T")

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NOTHING = np.empty(0, np.int64)


def damped(work: Callable[[float], T], hessian: F32, damping: float, where: str, log: list[str]) -> T:
    """``work(damping)``; where that is UnstableError again with ten times as much, each step logged, to a limit."""
    while True:
        try:
            return work(damping)
        except UnstableError:
            more = max(10 * damping, 1e-4)
            if more > MOST_DAMPING:
                raise UsageError(
                    f"the second moments of the inputs of {where} cannot be inverted, even with damping {damping:g} "
                    f"({describe(hessian)}); calibrate with more text or check the checkpoint."
                ) from None
            log.append(f"{where}: damping {damping:g} was too little and became {more:g} ({describe(hessian)})")
            damping = more


class _Table:
    """Each row's ascending table of values."""

    span = 0

    def __init__(self, table: F32) -> None:
        self.table = table

    def begin(self, first: int, current: F32, rows: slice) -> None:
        """Nothing: the tables stand."""

    def column(self, at: int, current: F32, rows: slice) -> tuple[U8, F32]:
        table = self.table if len(self.table) == 1 else self.table[rows]
        codes = nearest(current[:, None], table)
        own = np.broadcast_to(table, (len(codes), table.shape[1]))
        return codes[:, 0], np.take_along_axis(own, codes.astype(np.int64), axis=1)[:, 0]


class _Held:
    """Another projection, but entries that are held elsewhere stand for what they are there."""

    def __init__(self, inner: Projection, w: F32, without: Bools, order: I64) -> None:
        self.inner, self.w, self.without, self.order = inner, w, without, order
        self.span = inner.span

    def begin(self, first: int, current: F32, rows: slice) -> None:
        self.inner.begin(first, current, rows)

    def column(self, at: int, current: F32, rows: slice) -> tuple[npt.NDArray[np.generic], F32]:
        codes, values = self.inner.column(at, current, rows)
        column = self.order[at]
        return codes, np.where(self.without[rows, column], self.w[rows, column], values)


def _codes(
    w: F32,
    hessian: F32,
    how: Obs,
    projection: Callable[[I64], Projection],
    without: Bools | None,
    where: str,
    log: list[str],
) -> U8:
    """The codes of a sweep on what ``projection`` makes of the order of the columns: uint8 [rows, cols]."""
    cols = w.shape[1]
    dead = check_hessian(hessian, cols, where)
    order = order_of(hessian, how.order, NOTHING)
    onto = projection(order)
    if without is not None:
        onto = _Held(onto, w, without, order)
    found = damped(
        lambda damping: sweep(w, inverse_factor(hessian, order, dead, damping), order, cols, onto, block=how.block),
        hessian, how.damping, where, log,
    )  # fmt: skip
    codes = np.empty(w.shape, np.uint8)
    codes[:, order] = found.codes
    return codes


def obs_on_grid(
    grid: Grid, w: F32, hessian: F32, how: Obs, *, without: Bools | None, where: str, log: list[str]
) -> Packed:
    """Codes on a grid that stands; entries ``without``, bool [rows, cols], are stored elsewhere as they are in w."""
    return grid.pack(_codes(w, hessian, how, lambda order: Static(grid, order), without, where, log))


def obs_on_tables(
    start: Packed, w: F32, hessian: F32, how: Obs, *, without: Bools | None, where: str, log: list[str]
) -> Packed:
    """The tables of ``start``, a KMeans matrix, with codes of least output error: tables by clustering, then GPTQ."""
    fmt, (rows, cols) = start.format, start.shape
    assert isinstance(fmt, KMeans)
    table: F32 = start.arrays["table"][None, : 1 << fmt.bits]
    if fmt.per == "row":
        table = layout.unpack_by_row(start.arrays["table"], 1 << fmt.bits, 0, layout.panels(rows))[:rows]
    arrays = allocate(fmt, rows, cols)
    codes = _codes(w, hessian, how, lambda _: _Table(table), without, where, log)
    for r in range(0, rows, 512):
        fmt.pack_rows(codes[r : r + 512], table if fmt.per == "tensor" else table[r : r + 512], arrays, r)
    return Packed(fmt, (rows, cols), arrays)
