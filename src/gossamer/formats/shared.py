"""Scales that several rows share, at any depth of nesting: found in passes over the matrix, before rows are encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer.formats.fit import (
    FLOAT32_MAX,
    NOTHING,
    State,
    by_mean,
    fit_once,
    grouped,
    ideal,
    settle,
    steps_of,
    store_mins,
    store_scales,
)
from gossamer.formats.node import ROWS_PER_STEP, ArraySource, RowSource

if TYPE_CHECKING:
    from gossamer.formats.coded import Coded

__all__ = ["prepare"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

TERNARY_CUT = 0.7  # of the mean magnitude: what ternary weight networks (Li et al. 2016, eq. 6) keep


@dataclass(frozen=True)
class _Derived:
    """A matrix computed from the rows of another, a few at a time."""

    source: RowSource
    cols: int
    of: Callable[[F32, I64], npt.NDArray[Any]]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.source.shape[0], self.cols)

    def read(self, r0: int, r1: int) -> F32:
        return np.ascontiguousarray(self.of(self.source.read(r0, r1), np.arange(r0, r1)), np.float32)


def prepare(fmt: Coded, source: RowSource, inner: bool = False) -> State | None:
    """The scales that rows share, at any depth; None when each row is on its own."""
    cols = source.shape[1]
    if fmt.group.shared:
        return _prepare_shared(fmt, source, inner)
    groups = fmt.groups(cols)
    state = NOTHING
    if fmt.minimum is not None and not isinstance(fmt.minimum, str):
        lowest = _Derived(source, groups, lambda w, _: -grouped(fmt, w).min(axis=-1))
        state = State(mins=prepare(fmt.minimum, lowest, True))
    if fmt.scale is None or isinstance(fmt.scale, str):
        return None if state.mins is None else state

    def scales_of(w: F32, numbers: I64) -> F64:
        x = grouped(fmt, w)
        m = None
        if fmt.minimum is not None:
            m = store_mins(fmt, -x.min(axis=-1), numbers, state)[1]
        s, limit = ideal(fmt, x, cols, m, inner)
        return np.clip(s, -limit / 2, limit / 2)

    shared = prepare(fmt.scale, _Derived(source, groups, scales_of), True)
    return None if shared is None and state.mins is None else State(scales=shared, mins=state.mins)


def _prepare_shared(fmt: Coded, source: RowSource, inner: bool) -> State:
    """Scales and minima of tiles: one pass over the rows, two for ternary."""
    rows, cols = source.shape
    tile, shape = fmt.tile_rows(rows), fmt.matrix(rows, cols)
    numbers = np.arange(shape[0])
    if by_mean(fmt.number):
        s = _mean_of_tiles(fmt, source)
        state = State(scales=_prepare_matrix(fmt.scale, s))
        stored, single = store_scales(fmt, s, FLOAT32_MAX, numbers, state)
        return State(stored, None, single, None, tile)
    # The extremes of a tile stand for it: codes are monotone, so that what is found for them holds for all between.
    ends = np.zeros((*shape, 2), np.float32)
    widest = np.full(shape, -np.inf)
    for t, x in _tiles(fmt, source):
        low, high = x.min(axis=-1), x.max(axis=-1)
        if fmt.zero:  # zero points are of a row and group each, so the widest row decides
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            spread = high.astype(np.float64) - low
            row = spread.argmax(axis=0)[None]
            pair = np.stack([np.take_along_axis(e, row, axis=0)[0] for e in (low, high)], axis=-1)
            wider = np.take_along_axis(spread, row, axis=0)[0] > widest[t]
            ends[t][wider] = pair[wider]
            widest[t] = np.maximum(widest[t], spread.max(axis=0))
        else:
            first = widest[t] == -np.inf
            ends[t, :, 0] = np.where(first, low.min(axis=0), np.minimum(ends[t, :, 0], low.min(axis=0)))
            ends[t, :, 1] = np.where(first, high.max(axis=0), np.maximum(ends[t, :, 1], high.max(axis=0)))
            widest[t] = 0
    state = State(mins=_prepare_matrix(fmt.minimum, -ends[..., 0]))
    if not isinstance(fmt.scale, str):
        m = None if fmt.minimum is None else store_mins(fmt, -ends[..., 0], numbers, state)[1]
        s, limit = ideal(fmt, ends, 0, m, inner)
        state = State(mins=state.mins, scales=_prepare_matrix(fmt.scale, np.clip(s, -limit / 2, limit / 2)))
    found = fit_once(fmt, ends, ends[0].size, numbers, state, inner)
    settle(fmt, found, ends[0].size, numbers, state, inner)
    single, _, m = steps_of(fmt, found, numbers, state)
    return State(found.scales, found.mins, single, m, tile)


def _prepare_matrix(scale: str | Coded | None, matrix: npt.NDArray[Any]) -> State | None:
    if scale is None or isinstance(scale, str):
        return None
    return prepare(scale, ArraySource(matrix.astype(np.float32)), True)


def _tiles(fmt: Coded, source: RowSource) -> Iterator[tuple[int, F32]]:
    """Grouped rows [k, groups, width] of one tile at a time, a few at once."""
    rows = source.shape[0]
    tile = fmt.tile_rows(rows)
    for r0 in range(0, rows, ROWS_PER_STEP):
        r1 = min(rows, r0 + ROWS_PER_STEP)
        x = grouped(fmt, source.read(r0, r1))
        for t in range(r0 // tile, (r1 - 1) // tile + 1):
            yield t, x[max(0, t * tile - r0) : (t + 1) * tile - r0]


def _mean_of_tiles(fmt: Coded, source: RowSource) -> F64:
    """The mean magnitude of each tile; for ternary, of what is above 0.7 of it (ternary weight networks)."""
    rows, cols = source.shape
    tile, shape, width = fmt.tile_rows(rows), fmt.matrix(rows, cols), fmt.width(cols)
    columns = np.clip(cols - width * np.arange(shape[1]), 1, width)
    count = columns * np.clip(rows - tile * np.arange(shape[0]), 1, tile)[:, None]
    total = np.zeros(shape)
    for t, x in _tiles(fmt, source):
        total[t] += np.abs(x).sum(axis=(0, 2), dtype=np.float64)
    if fmt.number.family != "ternary":
        return total / count
    cut = TERNARY_CUT * total / count
    total, kept = np.zeros(shape), np.zeros(shape, np.int64)
    for t, x in _tiles(fmt, source):
        magnitude = np.abs(x)
        above = magnitude > cut[t][:, None]
        total[t] += np.where(above, magnitude, 0).sum(axis=(0, 2), dtype=np.float64)
        kept[t] += above.sum(axis=(0, 2))
    return total / np.maximum(kept, 1)
