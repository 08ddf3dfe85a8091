"""Codes and scales improved together, on the layer's own objective: f = tr(E H E^T), E = W - Q, H = E[x x^T].

Cyclic coordinate descent: a code moves to the nearest one of the least f, all others as they are; a group's scale (and
minimum) to the one of least f for its codes. Neither leaves f larger for any row, whatever it starts from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers.factor import check_hessian
from gossamer.compress.solvers.grid import Grid
from gossamer.compress.solvers.projections import Static
from gossamer.compress.solvers.storing import coarse, store_mins, store_scales
from gossamer.errors import FormatError, UsageError
from gossamer.formats import fit

__all__ = ["objective", "refit_scales", "round_learned"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]

ELEMENTS = 1 << 22  # of the rows treated together
BLOCK = 128  # columns between two matrix products
LEAST = 1e-5  # a change must gain this share of its own size, so that rounding errors move nothing to and fro


def objective(w: F32, values: F32, hessian: F32) -> F64:
    """f of each row, float64 [rows]: (w - q) H (w - q)^T for float32 matrices [rows, cols]."""
    found = np.empty(len(w))
    for r in _row_steps(*w.shape):
        e = w[r] - values[r]
        found[r] = np.einsum("ij,ij->i", e @ hessian, e, dtype=np.float64)
    return found


def round_learned(
    grid: Grid, codes: U8, w: F32, hessian: F32, *, passes: int = 4, damping: float = 0.0, where: str = "the matrix"
) -> U8:
    """Codes, uint8 [rows, cols], of a lower objective for w, float32 [rows, cols], than those given, on the same grid.

    ``passes`` over all columns at most; fewer where nothing changes any more. damping: added to H, times its mean
    diagonal. Each pass costs one product [rows, cols] x [cols, cols]. (The objective is that of learned rounding,
    Nagel et al. 2020, eq. 6, here without a relaxation.)
    """
    _check(grid, codes, w, hessian, where)
    if passes < 1 or damping < 0:
        raise UsageError(f"{passes} passes with damping {damping:g} cannot be; use at least one and no negative one.")
    added = np.float32(damping * float(np.diagonal(hessian).mean(dtype=np.float64)))
    found = codes.copy()
    for r in _row_steps(*w.shape):
        _descend(_part(grid, r), found[r], w[r], hessian, added, passes)
    return found


def _descend(grid: Grid, codes: U8, w: F32, hessian: F32, added: np.float32, passes: int) -> None:
    cols = w.shape[1]
    projection = Static(grid, np.arange(cols))
    every = slice(0, len(w))
    now = np.ascontiguousarray(codes.T)
    values = np.ascontiguousarray(grid.values(codes).T)
    error = np.ascontiguousarray(w.T) - values
    diagonal = np.diagonal(hessian) + added
    for _ in range(passes):
        changed = 0
        for b in range(0, cols, BLOCK):
            e = min(cols, b + BLOCK)
            slope = hessian[b:e] @ error
            if added:
                slope += added * error[b:e]
            inside = hessian[b:e, b:e]
            moves = np.zeros_like(slope)
            for i in range(b, e):
                if diagonal[i] <= 0:  # an input that is always zero
                    continue
                g = slope[i - b]
                if i > b:
                    g -= inside[i - b, : i - b] @ moves[: i - b]
                code, value = projection.column(i, values[i] + g / diagonal[i], every)
                move = value - values[i]
                size = move * move * diagonal[i]
                better = 2 * move * g - size > LEAST * size
                if not better.any():
                    continue
                moves[i - b] = np.where(better, move, 0)
                error[i] -= moves[i - b]
                values[i] = np.where(better, value, values[i])
                now[i] = np.where(better, code, now[i])
                changed += int(better.sum())
        if not changed:
            break
    codes[...] = now.T


def refit_scales(grid: Grid, codes: U8, w: F32, hessian: F32, *, passes: int = 1, where: str = "the matrix") -> Grid:
    """The grid with each group's scale, and minimum, at the least-squares solution for these codes, one group after
    another, wherever the objective falls with the scale as it is stored. For plain float scales of single rows."""
    fmt = grid.fmt
    if fmt.group.shared or coarse(fmt.scale) or coarse(fmt.minimum):
        raise FormatError(
            f"the scales of {fmt} are not floats of a row's groups, so they cannot be fitted again alone."
        )
    _check(grid, codes, w, hessian, where)
    if passes < 1:
        raise UsageError(f"{passes} passes over the scales cannot be; use at least one.")
    parts = [_refit(_part(grid, r), codes[r], w[r], hessian, passes) for r in _row_steps(*w.shape)]

    def joined(name: str) -> Any:
        pieces = [getattr(p, name) for p in parts]
        return None if pieces[0] is None else np.concatenate(pieces)

    return replace(grid, scales=joined("scales"), mins=joined("mins"), s=joined("s"), m=joined("m"))


def _refit(grid: Grid, codes: U8, w: F32, hessian: F32, passes: int) -> Grid:
    fmt, cols, width = grid.fmt, grid.cols, grid.width
    found = replace(
        grid, scales=np.array(grid.scales), mins=None if grid.mins is None else np.array(grid.mins), s=grid.s.copy(),
        m=None if grid.m is None else grid.m.copy(),
    )  # fmt: skip
    assert isinstance(found.scales, np.ndarray)
    error = np.ascontiguousarray((w - grid.values(codes)).T)
    one = np.ones((1, 1), np.float32)
    for _ in range(passes):
        for g in range(fmt.groups(cols)):
            c = slice(g * width, min(cols, (g + 1) * width))
            z = None if grid.z is None else grid.z[:, g : g + 1]
            s, m = found.s[:, g : g + 1], None if found.m is None else found.m[:, g : g + 1]
            part = np.ascontiguousarray(codes[:, c])
            unit = part.astype(np.float32) if m is not None else fit.values(fmt.number, part, one, z, None)
            terms = _terms(unit.T, hessian[c] @ error, hessian[c, c])
            new_s, new_m = _best_step(terms, s, m)
            mins = None if new_m is None else store_mins(fmt, new_m)
            steps = store_scales(fmt, new_s, None if mins is None else mins.single, "nearest")
            ds = steps.single[:, 0].astype(np.float64) - s[:, 0]
            dm = np.zeros_like(ds) if mins is None or m is None else mins.single[:, 0].astype(np.float64) - m[:, 0]
            ua, a, uu, uo, oo = terms
            size = ds * ds * uu - 2 * ds * dm * uo + dm * dm * oo
            better = (2 * (ds * ua - dm * a) - size > LEAST * size) & (steps.single[:, 0] * s[:, 0] > 0)
            if not better.any():
                continue
            before = fit.values(fmt.number, part, s, z, m)
            found.scales[better, g], found.s[better, g] = np.asarray(steps.stored)[better, 0], steps.single[better, 0]
            if mins is not None and found.m is not None:
                assert isinstance(found.mins, np.ndarray)
                found.mins[better, g], found.m[better, g] = np.asarray(mins.stored)[better, 0], mins.single[better, 0]
            s, m = found.s[:, g : g + 1], None if found.m is None else found.m[:, g : g + 1]
            error[c] -= (fit.values(fmt.number, part, s, z, m) - before).T
    return found


def _terms(unit: F32, slope: F32, metric: F32) -> tuple[F64, F64, F64, F64, F64]:
    """Of each row, for codes' values u, the slope a = E H and ones o: u.a, o.a, u H u, u H o, o H o."""
    turned = metric @ unit

    def dot(x: F32, y: F32) -> F64:
        return np.asarray(np.einsum("cr,cr->r", x, y, dtype=np.float64))

    return (
        dot(unit, slope), slope.sum(axis=0, dtype=np.float64), dot(unit, turned), turned.sum(axis=0, dtype=np.float64),
        np.full(unit.shape[1], metric.sum(dtype=np.float64)),
    )  # fmt: skip


def _best_step(terms: tuple[F64, F64, F64, F64, F64], s: F32, m: F32 | None) -> tuple[F64, F64 | None]:
    """The scales and minima [rows, 1] of least f, as real numbers; unchanged where f does not determine them."""
    ua, a, uu, uo, oo = terms
    if m is None:
        return s + (ua / np.where(uu > 0, uu, np.inf))[:, None], None
    determinant = uu * oo - uo * uo
    base = np.where(determinant > 1e-6 * uu * oo, determinant, np.inf)
    return s + ((ua * oo - a * uo) / base)[:, None], m + ((ua * uo - a * uu) / base)[:, None]


def _check(grid: Grid, codes: U8, w: F32, hessian: F32, where: str) -> None:
    if w.shape != (grid.rows, grid.cols) or codes.shape != w.shape:
        raise UsageError(
            f"{where}: weights {w.shape}, codes {codes.shape} and a grid of {grid.rows} x {grid.cols} are not of one "
            "matrix."
        )
    check_hessian(hessian, grid.cols, where)


def _row_steps(rows: int, cols: int) -> list[slice]:
    step = max(64, ELEMENTS // cols)
    return [slice(r, min(rows, r + step)) for r in range(0, rows, step)]


def _part(grid: Grid, r: slice) -> Grid:
    """The grid of some rows: to round with, or, with scales of single rows, to change."""
    shared = grid.fmt.group.shared
    return replace(
        grid,
        rows=len(grid.s[r]),
        scales=grid.scales if shared else _some(grid.scales, r),
        mins=grid.mins if shared or grid.mins is None else _some(grid.mins, r),
        zeros=None if grid.zeros is None else grid.zeros[r],
        s=grid.s[r],
        z=None if grid.z is None else grid.z[r],
        m=None if grid.m is None else grid.m[r],
    )


def _some(stored: Any, r: slice) -> Any:
    return stored[r] if isinstance(stored, np.ndarray) else stored.take(r)
