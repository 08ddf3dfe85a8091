"""Finding the scales, zero points and minima of a matrix: by the largest magnitude, by trying ranges, or from the
spread of normally distributed weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers.gaussian import normal_steps
from gossamer.compress.solvers.grid import Grid
from gossamer.compress.solvers.score import Score
from gossamer.compress.solvers.storing import ROUNDINGS, Matrix, coarse, store_mins, store_scales
from gossamer.errors import FormatError, UsageError
from gossamer.formats import ArraySource, Coded, encode, fit, scales
from gossamer.formats.node import ROWS_PER_STEP

__all__ = ["Search", "fit_grid"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

FEW = 4  # bits of a scale: its neighbours are far
OUTER = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # ranges of scales that are tried where these are a format


@dataclass(frozen=True)
class Search:
    """How ranges are searched.

    by: "error" tries ``steps`` ranges of each group, from the whole one (1: no other) to ``lowest`` of it, and keeps
    the one of least sum importance * |error|^norm; "gaussian" takes the scale that is best for normal weights of the
    group's rms (QuEST, Panferov et al. 2025), which "error" tries too.
    refine: rounds in which the least-squares scale (and minimum) of the codes, the zero points beside, and the stored
    neighbours of coarse scales are tried; each is kept where it lowers the error.
    rounding: of coarse scales (powers of two, e4m3, nested formats): "nearest", "ceil" (ranges are never cut), or
    "mse": the nearest or a neighbour, whichever gives the least error.
    """

    by: str = "error"
    steps: int = 20
    lowest: float = 0.4
    norm: float = 2.0
    refine: int = 2
    rounding: str = "mse"

    def __post_init__(self) -> None:
        if self.by not in ("error", "gaussian"):
            raise UsageError(f"ranges are searched by 'error' or 'gaussian', not '{self.by}'.")
        if not 1 <= self.steps <= 1000 or not 0 < self.lowest <= 1 or not 0 <= self.refine <= 100:
            raise UsageError(
                f"a search of {self.steps} ranges down to {self.lowest:g} with {self.refine} rounds cannot be; use 1 "
                "to 1000 ranges, a lowest one in (0, 1] and at most 100 rounds."
            )
        if not 0.5 <= self.norm <= 8:
            raise UsageError(f"errors cannot be summed with norm {self.norm:g}; use one from 0.5 to 8, such as 2.")
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"scales are rounded {', '.join(ROUNDINGS)}, not '{self.rounding}'.")


def fit_grid(fmt: Coded, w: F32, importance: F32 | None = None, *, search: Search | None = None) -> Grid:
    """Scales, zero points and minima for float32 w [rows, cols].

    importance: what an error counts: [cols] or [rows, cols] (not negative) for its square; [groups, width, width]
    (positive semidefinite, of the columns of each group) for e M e^T of a group's errors e.
    search: None for the format's own rule, which gives the scales of ``formats.encode`` and knows no importance.
    Memory: a few matrices [rows, groups], and the temporaries of some rows.
    """
    fmt.check(*w.shape)
    if search is None:
        return absmax(fmt, w)
    _refuse(fmt, search)
    score = Score(fmt, w, importance, search.norm)
    if search.by == "gaussian":
        return _stored(fmt, _gaussian(fmt, score, search.rounding), score, search)
    at = _tried(fmt, absmax(_fine(fmt), w), score, search)
    for _ in range(search.refine):
        _least_squares(fmt, at, score, search.rounding)
        _zero_points(fmt, at, score)
    grid = _stored(fmt, at, score, search)
    if search.steps > 1 and (isinstance(fmt.scale, Coded) or isinstance(fmt.minimum, Coded)):
        # What each group would like best need not be what a format of all groups' scales holds best.
        others = [absmax(fmt, w)]
        if _centred(fmt):
            others.append(_stored(fmt, _gaussian(fmt, score, search.rounding), score, search))
        grid = min([grid, *others], key=lambda g: _total(g, score))
    return grid


def _total(grid: Grid, score: Score) -> float:
    first = score.first_rows
    error = score.errors(grid.s[first], grid.z, None if grid.m is None else grid.m[first])
    return float(error.sum(dtype=np.float64))


def _centred(fmt: Coded) -> bool:
    """Whether there are values on both sides of any mean."""
    return fmt.number.family != "uint" or bool(fmt.zero) or fmt.minimum is not None


def absmax(fmt: Coded, w: F32) -> Grid:
    """The grid of ``formats.encode``."""
    rows, cols = w.shape
    if fmt.group.shared or isinstance(fmt.scale, Coded) or isinstance(fmt.minimum, Coded):
        return Grid.of(encode(fmt, ArraySource(w)))[0]
    parts = [
        fmt.quantize(np.ascontiguousarray(w[r : r + ROWS_PER_STEP], np.float32)) for r in range(0, rows, ROWS_PER_STEP)
    ]
    kept = np.concatenate([np.asarray(p.scales) for p in parts])
    zeros = mins = z = m = None
    if fmt.zero:
        zeros = np.concatenate([p.zeros for p in parts if p.zeros is not None]).astype(np.uint8)
        z = zeros.astype(np.float32)
    if fmt.minimum is not None:
        mins = np.concatenate([np.asarray(p.mins) for p in parts])
        m = scales.load(mins, str(fmt.minimum))
    return Grid(fmt, rows, cols, kept, mins, zeros, scales.load(kept, str(fmt.scale)), z, m)


def _refuse(fmt: Coded, search: Search) -> None:
    if search.by == "gaussian" and not _centred(fmt):
        raise FormatError(
            f"{fmt} has no negative values, so normal weights do not fit it; write '{fmt.number.name}/{fmt.group}' or "
            "another number."
        )


def _fine(fmt: Coded) -> Coded:
    """The same format with scales and minima that are real numbers as far as a search is concerned."""
    scale = "f32" if coarse(fmt.scale) else fmt.scale
    return replace(fmt, scale=scale, minimum="f32" if coarse(fmt.minimum) else fmt.minimum)


@dataclass
class _At:
    """The best found: scales and minima [row tiles, groups], zero points [rows, groups], and their errors
    [rows, groups]. ``s`` and ``m`` are as stored where they are plain floats."""

    s: F32
    z: F32 | None
    m: F32 | None
    error: F32

    def keep(self, score: Score, s: F32, z: F32 | None, m: F32 | None, error: F32) -> None:
        """Takes over what is better, a tile at a time."""
        better = score.tiles(error) < score.tiles(self.error)
        rows = score.spread(better)
        self.s = np.where(better, s, self.s)
        self.error = np.where(rows, error, self.error)
        if self.z is not None and z is not None:
            self.z = np.where(rows, z, self.z)
        if self.m is not None and m is not None:
            self.m = np.where(better, m, self.m)


def _plain(fmt: Coded, s: F64, m: F64 | None, rounding: str) -> tuple[F32, F32 | None]:
    """Scales and minima as they will be stored, where each one is on its own and rounded to nearest; else as they
    are."""
    mins = None
    if m is not None:
        mins = m.astype(np.float32) if coarse(fmt.minimum) else store_mins(fmt, m).single
    if isinstance(fmt.scale, Coded) or (coarse(fmt.scale) and rounding != "mse"):
        return s.astype(np.float32), mins
    return store_scales(fmt, s, mins, "nearest").single, mins


def _tried(fmt: Coded, base: Grid, score: Score, search: Search) -> _At:
    """The best of some ranges of each group, relative to the whole one.

    A zero point stays where it is as the range shrinks towards zero; a minimum shrinks towards the middle.
    """
    number = fmt.number
    first = score.first_rows
    s0 = base.s[first].astype(np.float64)
    m0 = None if base.m is None else base.m[first].astype(np.float64)
    ratios = np.linspace(1, search.lowest, search.steps)
    if not fit.signed(fmt, False):
        s0 = np.abs(s0)
        if number.family == "int":
            s0 *= number.zero / number.largest  # the extreme of either sign on the largest code
    elif number.family == "int":
        ratios = np.append(ratios, number.zero / number.largest)  # so that neither end is cut
    if fit.by_mean(number) or number.table is not None:
        # A mean is no range; steps that differ may fit better where the extreme is not on the last one.
        ratios = np.append(ratios, np.linspace(1, 2 - search.lowest, search.steps)[1:])
    at: _At | None = None
    for ratio in ratios:
        m = None if m0 is None else m0 - (1 - ratio) * np.abs(s0) * (number.levels - 1) / 2
        s, mins = _plain(fmt, s0 * ratio, m, search.rounding)
        error = score.errors(s, base.z, mins)
        if at is None:
            at = _At(s, base.z, mins, error)
        else:
            at.keep(score, s, base.z, mins, error)
    assert at is not None
    if search.steps > 1 and _centred(fmt):
        normal = _gaussian(fmt, score, search.rounding)  # far below the range of the others where an extreme is alone
        at.keep(score, normal.s, normal.z, normal.m, normal.error)
    if fit.signed(fmt, False) and number.family == "int":  # the longer side of the codes may belong to the other end
        at.keep(score, -at.s, None, None, score.errors(-at.s, None, None))
    return at


def _gaussian(fmt: Coded, score: Score, rounding: str) -> _At:
    """The best scales for normally distributed weights; offsets put the grid's middle on the mean."""
    count, total, square = score.moments()
    mean = total / count
    top = fmt.number.levels - 1
    offset = fmt.zero or fmt.minimum is not None
    spread = np.sqrt(np.maximum(square / count - (mean * mean if offset else 0), 0))
    s64 = spread * normal_steps(fmt.number)
    m = s64 * top / 2 - mean if fmt.minimum is not None else None
    s, mins = _plain(fmt, s64, m, rounding)
    z = None
    if fmt.zero:
        rows = score.spread(np.where(s > 0, top / 2 - mean / np.where(s > 0, s, 1), 0))
        z = np.clip(np.rint(rows), 0, top).astype(np.float32)
    return _At(s, z, mins, score.errors(s, z, mins))


def _least_squares(fmt: Coded, at: _At, score: Score, rounding: str) -> None:
    """The scales, and minima, of least squared error with the codes as they are."""
    s64, m64 = score.least_squares(at.s, at.z, at.m)
    s, m = _plain(fmt, s64, m64, rounding)
    at.keep(score, s, at.z, m, score.errors(s, at.z, m))


def _zero_points(fmt: Coded, at: _At, score: Score) -> None:
    if at.z is None:
        return
    for by in (-1, 1):
        z = np.clip(at.z + np.float32(by), 0, fmt.number.levels - 1)
        error = score.errors(at.s, z, at.m)
        better = error < at.error  # a zero point is of one row
        at.z, at.error = np.where(better, z, at.z), np.where(better, error, at.error)


def _stored(fmt: Coded, at: _At, score: Score, search: Search) -> Grid:
    """The grid as it is stored: coarse scales and minima are fixed first, then what depends on them."""
    mins = m = None
    if at.m is not None:

        def with_mins(found: Matrix) -> F32:
            return score.errors(at.s, at.z, found.single)

        mins = _nested(fmt.minimum, at.m, search, score, lambda m64: store_mins(fmt, m64), with_mins)
        m = mins.single
    if coarse(fmt.minimum):  # the scales for what the minima became
        at.m, at.error = m, score.errors(at.s, at.z, m)
        best = score.least_squares(at.s, at.z, m, keep_m=True)[0].astype(np.float32)
        at.keep(score, best, at.z, m, score.errors(best, at.z, m))

    def with_scales(found: Matrix) -> F32:
        return score.errors(found.single, _moved(fmt, at, found, score), m)

    steps = _nested(fmt.scale, at.s, search, score, lambda s64: store_scales(fmt, s64, m, search.rounding), with_scales)
    at.z = _moved(fmt, at, steps, score)
    if coarse(fmt.scale) or coarse(fmt.minimum):
        at.s, at.m, at.error = steps.single, m, score.errors(steps.single, at.z, m)
        if search.rounding == "mse":
            steps = _neighbours(fmt.scale, steps, at, score, "s")
            if mins is not None:
                mins = _neighbours(fmt.minimum, mins, at, score, "m")
            _zero_points(fmt, at, score)
    z = None if at.z is None else at.z.astype(np.uint8)
    rows, cols = score.shape
    return Grid(
        fmt, rows, cols, steps.stored, None if mins is None else mins.stored, z, score.spread(steps.single),
        at.z, None if mins is None else score.spread(mins.single),
    )  # fmt: skip


def _moved(fmt: Coded, at: _At, steps: Matrix, score: Score) -> F32 | None:
    """The zero points where the scales become others: zero stays where it was."""
    if at.z is None:
        return None
    ratio = np.where(steps.single == 0, 1, at.s / np.where(steps.single == 0, 1, steps.single))
    moved: F32 = np.clip(np.rint(at.z * score.spread(ratio)), 0, fmt.number.levels - 1)
    return moved


def _nested(
    kind: str | Coded | None,
    wanted: F32,
    search: Search,
    score: Score,
    store: Callable[[F64], Matrix],
    errors: Callable[[Matrix], F32],
) -> Matrix:
    """Scales or minima [row tiles, groups] as they are stored; in a format of their own with the range, of each of its
    groups, that gives the least error of the weights: the largest scale may be worth less than the others' steps."""
    exact = wanted.astype(np.float64)
    if not isinstance(kind, Coded) or search.rounding != "mse" or search.steps == 1:
        return store(exact)
    tiles, groups = wanted.shape
    outer_rows = np.arange(0, tiles, kind.tile_rows(tiles))
    outer_columns = np.arange(0, groups, kind.width(groups))
    row_of, column_of = np.arange(tiles) // kind.tile_rows(tiles), np.arange(groups) // kind.width(groups)

    def spread(x: F64) -> F64:
        return x[row_of][:, column_of]

    top = np.maximum.reduceat(np.maximum.reduceat(np.abs(exact), outer_rows, axis=0), outer_columns, axis=1)
    best, least = np.ones_like(top), np.full(top.shape, np.inf)
    for ratio in OUTER:
        bound = spread(ratio * top)
        found = store(np.clip(exact, -bound, bound))
        error = score.tiles(errors(found))
        if kind.number.bits <= FEW:  # a neighbour will be taken where it is better
            for by in (-1, 1):
                error = np.minimum(error, score.tiles(errors(found.shifted(by))))
        total = np.add.reduceat(np.add.reduceat(error, outer_rows, axis=0), outer_columns, axis=1)
        better = total < least
        best, least = np.where(better, ratio, best), np.where(better, total, least)
    bound = spread(best * top)
    return store(np.clip(exact, -bound, bound))


def _neighbours(kind: str | Coded | None, found: Matrix, at: _At, score: Score, name: str) -> Matrix:
    if not coarse(kind):
        return found
    nearest = found
    for by in (-1, 1, -2, 2):  # errors fall and rise more than once
        other = nearest.shifted(by)
        s, m = (other.single, at.m) if name == "s" else (at.s, other.single)
        error = score.errors(s, at.z, m)
        found = found.replaced(score.tiles(error) < score.tiles(at.error), other)
        at.keep(score, s, at.z, m, error)
    return found
