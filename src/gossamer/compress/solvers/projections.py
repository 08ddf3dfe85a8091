"""What the sweep rounds to: grids fixed beforehand, or fitted as it comes to each group."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers.grid import Grid
from gossamer.compress.solvers.outliers import without_outliers
from gossamer.compress.solvers.search import Search, fit_grid
from gossamer.formats import Coded, fit, scales

__all__ = ["Dynamic", "Static"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


class Static:
    """A grid that stands; ``place``: the column of the grid that each place of the sweep is."""

    span = 0

    def __init__(self, grid: Grid, place: I64) -> None:
        self.grid = grid
        self.group: list[int] = (place // grid.width).tolist()
        # A column of steps lies together.
        self.s, self.z, self.m = (None if x is None else np.ascontiguousarray(x.T) for x in (grid.s, grid.z, grid.m))

    def begin(self, first: int, current: F32, rows: slice) -> None:
        """Nothing: the grid stands."""

    def column(self, at: int, current: F32, rows: slice) -> tuple[npt.NDArray[Any], F32]:
        g = self.group[at]
        s, z, m = (None if x is None else x[g, rows] for x in (self.s, self.z, self.m))
        assert s is not None
        codes = fit.nearest_codes(self.grid.fmt, current, s, z, m)
        return codes, fit.values(self.grid.fmt.number, codes, s, z, m)


class Dynamic:
    """Each group's scales are found when its first column's turn comes, for the weights as they are then."""

    def __init__(
        self,
        fmt: Coded,
        shape: tuple[int, int],
        importance: F32 | None,
        cost: F32,
        limit: float | None,
        search: Search | None,
    ) -> None:
        rows, cols = shape
        self.fmt, self.importance, self.cost, self.limit, self.search = fmt, importance, cost, limit, search
        self.span = fmt.width(cols)
        groups = fmt.groups(cols)

        def blank(kind: str | Coded | None) -> npt.NDArray[Any]:
            return np.zeros((rows, groups), scales.NUMPY[str(kind)])

        def single() -> F32:
            return np.zeros((rows, groups), np.float32)

        offset = fmt.minimum is not None
        self.grid = Grid(
            fmt, rows, cols, blank(fmt.scale), blank(fmt.minimum) if offset else None,
            np.zeros((rows, groups), np.uint8) if fmt.zero else None,
            single(), single() if fmt.zero else None, single() if offset else None,
        )  # fmt: skip
        self._now: tuple[F32, F32 | None, F32 | None] | None = None

    def begin(self, first: int, current: F32, rows: slice) -> None:
        g, columns = first // self.span, slice(first, first + len(current))
        w = np.ascontiguousarray(current.T)
        if self.limit is not None:
            w = without_outliers(self.fmt, w, self.cost[columns], self.limit)
        counts = self.importance
        if counts is not None:
            counts = counts[columns] if counts.ndim == 1 else counts[g : g + 1]
        part = fit_grid(self.fmt, w, counts, search=self.search)
        grid = self.grid
        for mine, found in ((grid.scales, part.scales), (grid.mins, part.mins), (grid.zeros, part.zeros),
                            (grid.s, part.s), (grid.z, part.z), (grid.m, part.m)):  # fmt: skip
            if mine is not None:
                assert isinstance(mine, np.ndarray)
                assert isinstance(found, np.ndarray)
                mine[rows, g] = found[:, 0]
        self._now = (part.s[:, 0], None if part.z is None else part.z[:, 0], None if part.m is None else part.m[:, 0])

    def column(self, at: int, current: F32, rows: slice) -> tuple[npt.NDArray[Any], F32]:
        assert self._now is not None
        s, z, m = self._now
        codes = fit.nearest_codes(self.fmt, current, s, z, m)
        return codes, fit.values(self.fmt.number, codes, s, z, m)
