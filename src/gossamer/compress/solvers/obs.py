"""The Hessian solver: columns are fixed one after another, and those not yet fixed make up for the error.

For y = W x and H = E[x x^T] the least change of the other weights that makes up for fixing column i, error d_i, is
-d_i / U_ii * U_i,later with U^T U = H^-1, U upper triangular; the loss grows by (d_i / U_ii)^2. Sources: OBQ and GPTQ
(Frantar et al. 2022, section 3 and algorithm 1); outliers: SpQR (Dettmers et al. 2023, algorithm 1); columns that stay
float: QUIK (Ashkboos et al. 2023, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers.factor import UnstableError, check_hessian, describe, inverse_factor, order_of
from gossamer.compress.solvers.grid import Grid
from gossamer.compress.solvers.outliers import OutlierRule, threshold, without_outliers
from gossamer.compress.solvers.projections import Dynamic, Static
from gossamer.compress.solvers.search import Search, fit_grid
from gossamer.compress.solvers.sweep import Projection, Sweep, sweep
from gossamer.errors import FormatError, UsageError
from gossamer.formats import Coded, Packed

__all__ = ["Obs", "Solved", "group_metric", "obs"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

MOST_METRIC = 1024  # columns in a group: each range that is tried costs a product with such a matrix
MOST_DAMPING = 10.0  # times the mean variance: with that much the solver rounds to nearest


@dataclass(frozen=True)
class Obs:
    """Options of ``obs``.

    order: "none", or "act": columns by falling variance of their input. groups: "static", grids from the weights as
    given, or "dynamic", from the weights as they are when the sweep comes to a group (plain scales of single rows, and
    order "none", alone). damping: added to H, times its mean diagonal. block: columns between two matrix products.
    search: of the ranges; None for the largest magnitude. metric: what a search counts: "diagonal" (of H), or
    "hessian", e H e^T of a group's errors. outliers: weights kept out (SpQR).
    """

    order: str = "none"
    groups: str = "static"
    damping: float = 0.01
    block: int = 128
    search: Search | None = None
    metric: str = "diagonal"
    outliers: OutlierRule | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("order", self.order, ("none", "act")),
            ("groups", self.groups, ("static", "dynamic")),
            ("metric", self.metric, ("diagonal", "hessian")),
        ):
            if value not in known:
                raise UsageError(f"obs knows the {name} {' and '.join(known)}, not '{value}'.")
        if self.order == "act" and self.groups == "dynamic":
            raise UsageError(
                "obs with order 'act' and dynamic groups would need permuted inputs at run time; use static groups."
            )
        if not 0 <= self.damping <= MOST_DAMPING:
            raise UsageError(f"damping {self.damping:g} is not from 0 to {MOST_DAMPING:g}; 0.01 is usual.")
        if self.block < 1:
            raise UsageError(f"a block of {self.block} columns cannot be; 128 is usual.")


@dataclass
class Solved:
    """What ``obs`` found.

    packed: codes and scales, of the columns that are not free. values: float32 [rows, cols], what the codes give, plus
    the outliers kept out, and in the free columns the weights as they became. loss: the sum over rows of d H d^T, H
    damped, d the error: without outliers to store more coarsely, (rows x) the mean squared output error.
    entries: flat indices, ascending, into [rows, cols] of outliers; entry_values: what is to be added there to what the
    codes give. log: one line for each thing that went otherwise than planned.
    """

    packed: Packed
    values: F32
    loss: float
    damping_used: float
    log: list[str]
    entries: I64 | None = None
    entry_values: F32 | None = None


def obs(
    fmt: Coded,
    w: F32,
    hessian: F32,
    options: Obs | None = None,
    *,
    free_columns: I64 | None = None,
    grid: Grid | None = None,
    where: str = "the matrix",
    tokens: int | None = None,
) -> Solved:
    """Codes for float32 w [rows, cols] of least output error, by ``hessian`` = E[x x^T], float32 [cols, cols].

    free_columns: columns that are not quantized but make up for the error of all others; the packed matrix is without
    them. grid: take this one (of the columns that are not free) instead of fitting one. ``where`` and ``tokens`` name
    the layer and the calibration in messages. Raises UsageError for second moments that are not finite, or that no
    damping makes positive definite. Memory: the factor [cols, cols] and some rows beside what is given and returned.
    """
    options = options or Obs()
    rows, cols = w.shape
    free = np.unique(np.asarray([] if free_columns is None else free_columns, np.int64))
    if len(free) and (free[0] < 0 or free[-1] >= cols or len(free) == cols):
        raise UsageError(f"{where}: the free columns must lie in 0..{cols - 1} and leave one to quantize.")
    kept = np.setdiff1d(np.arange(cols), free)
    fmt.check(rows, len(kept))
    if options.groups == "dynamic" and not _own_scales(fmt):
        raise FormatError(f"{fmt} shares or nests scales, which dynamic groups cannot; use static groups for {where}.")
    dead = check_hessian(hessian, cols, where)
    log = [] if not dead.any() else [f"{where}: {int(dead.sum())} of {cols} inputs were always zero"]
    if grid is not None and (grid.fmt, grid.rows, grid.cols) != (fmt, rows, len(kept)):
        raise UsageError(
            f"{where}: the grid given is {grid.fmt} of {grid.rows} x {grid.cols}, not {fmt} of {rows} x {len(kept)}."
        )
    order = order_of(hessian, options.order, free)
    damping = options.damping
    while True:
        try:
            factor = inverse_factor(hessian, order, dead, damping)
            solved = _solve(fmt, w, hessian, factor, order, kept, options, grid)
            break
        except UnstableError:
            more = max(10 * damping, 1e-4)
            if more > MOST_DAMPING:
                seen = "" if tokens is None else f" from {tokens} tokens"
                raise UsageError(
                    f"the second moments of the inputs of {where}{seen} cannot be inverted, even with damping "
                    f"{damping:g} ({describe(hessian)}); calibrate with more text or check the checkpoint."
                ) from None
            log.append(f"{where}: damping {damping:g} was too little and became {more:g} ({describe(hessian)})")
            damping = more
    solved.damping_used, solved.log = damping, log
    return solved


def _own_scales(fmt: Coded) -> bool:
    return not fmt.group.shared and not isinstance(fmt.scale, Coded) and not isinstance(fmt.minimum, Coded)


def group_metric(fmt: Coded, hessian: F32) -> F32:
    """The blocks of ``hessian`` [cols, cols] of the columns of each group: float32 [groups, width, width], zero for
    what pads the last one; with it ``fit_grid`` minimizes each group's own output error."""
    cols = len(hessian)
    width, groups = fmt.width(cols), fmt.groups(cols)
    if width > MOST_METRIC:
        raise UsageError(
            f"a metric of whole groups is for at most {MOST_METRIC} columns, and {fmt} has groups of {width}; use the "
            "diagonal of the second moments."
        )
    found = np.zeros((groups, width, width), np.float32)
    for g in range(groups):
        c = slice(g * width, min(cols, (g + 1) * width))
        n = c.stop - c.start
        found[g, :n, :n] = hessian[c, c]
    return found


def _solve(
    fmt: Coded, w: F32, hessian: F32, factor: F32, order: I64, kept: I64, options: Obs, given: Grid | None
) -> Solved:
    rows, cols = w.shape
    count = len(kept)
    place = np.searchsorted(kept, order[:count])  # where each swept column lies in the packed matrix
    inner = w if count == cols else np.ascontiguousarray(w[:, kept])
    importance = _importance(fmt, hessian, kept, options)
    # What fixing a column with error d costs is d^2 times this.
    cost = np.empty(count, np.float32)
    cost[place] = 1 / np.diagonal(factor)[:count] ** 2
    limit = None if options.outliers is None else threshold(options.outliers, inner, cost)
    more = 1.05
    while True:
        grid, projection = _projection(fmt, inner, importance, cost, place, limit, options, given)
        found = sweep(w, factor, order, count, projection, block=options.block, limit=limit)
        if limit is None or options.outliers is None:
            break
        most = int(options.outliers.most * rows * count)
        if found.entries is None or len(found.entries) <= most:
            break
        # The sweep is repeated with a limit that fewer reach; as less is kept out, more error is passed on.
        costs = np.sort(found.entry_costs)
        limit = max(float(costs[-most - 1] if most else costs[-1]), limit) * more
        more = 1 + 2 * (more - 1)
    return _gathered(grid, found, w, order, place)


def _importance(fmt: Coded, hessian: F32, kept: I64, options: Obs) -> F32 | None:
    if options.search is None:
        return None
    if options.metric == "diagonal":
        return np.diagonal(hessian)[kept].astype(np.float32)
    return group_metric(fmt, hessian[np.ix_(kept, kept)])


def _projection(
    fmt: Coded,
    inner: F32,
    importance: F32 | None,
    cost: F32,
    place: I64,
    limit: float | None,
    options: Obs,
    given: Grid | None,
) -> tuple[Grid, Projection]:
    if given is not None:
        return given, Static(given, place)
    if options.groups == "dynamic":
        dynamic = Dynamic(fmt, inner.shape, importance, cost, limit, options.search)
        return dynamic.grid, dynamic
    fitted = inner if limit is None else without_outliers(fmt, inner, cost, limit)
    grid = fit_grid(fmt, fitted, importance, search=options.search)
    return grid, Static(grid, place)


def _gathered(grid: Grid, found: Sweep, w: F32, order: I64, place: I64) -> Solved:
    """Codes and values in the matrix's own order of columns."""
    count = len(place)
    codes = np.empty((len(w), count), np.uint8)
    codes[:, place] = found.codes
    values = np.empty(w.shape, np.float32)
    values[:, order] = found.values
    entries = extra = None
    if found.entries is not None:
        row, at = np.divmod(found.entries, count)
        flat = row * w.shape[1] + order[at]
        sorting = np.argsort(flat)
        entries, extra = flat[sorting], found.entry_values[sorting]
    return Solved(grid.pack(codes), values, found.loss, 0.0, [], entries, extra)
