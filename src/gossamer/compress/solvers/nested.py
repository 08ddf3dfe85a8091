"""Weights in levels: signs of what a base leaves (matryoshka planes), and group scales that are integers of a row's.

``planes`` fits ``uint2/g128 + bipolar1/g128 + ...`` so that the first k terms are a weight of their own (D2MoE, Wang et
al. 2025, section 4.1). ``progressive`` and ``dual`` fit ``uint4/g128*(int8/row)``, s1 (s2 (q - z)) with integer s2,
whose parenthesis fits int8: QoQ (Lin et al. 2024, QServe, section 4.1) rounds its second level from the first, and DGQ
(Zhang et al. 2023, section 3.2) searches both scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers.factor import check_hessian, inverse_factor
from gossamer.compress.solvers.grid import Grid
from gossamer.compress.solvers.held import damped
from gossamer.compress.solvers.search import Search, fit_grid
from gossamer.errors import UsageError
from gossamer.formats import Coded, Packed, allocate, fit, scales
from gossamer.formats.coded import Parts
from gossamer.formats.composite import refuse_infinite

__all__ = ["PROTECTIVE", "dual", "planes", "progressive"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

PROTECTIVE = 119  # |int8| codes of the first level: then no group of the second leaves -128..127
BYTE = 127
ROWS = 128  # worked on at once
FINE = 1.02 - 0.011 * np.arange(1, 21)  # DGQ's candidate ranges of a group
COARSE = 1.02 - 0.01025 * np.arange(1, 81)  # and of a row


def planes(
    terms: Sequence[Coded],
    w: F32,
    hessian: F32 | None,
    *,
    square: F32 | None = None,
    damping: float = 0.01,
    block: int = 128,
    search: Search | None = None,
    where: str = "the matrix",
    log: list[str] | None = None,
) -> list[Packed]:
    """A base and what each further term keeps of the residual: one Packed a term, whose sum is the weight.

    Each width is a full pass over blocks of columns: the block is rounded as it is (so that planes stay nested), and
    its error, as the Hessian E[x x^T] weighs it, is pushed into the columns after it. Signs (``bipolar1``) get the
    scale of least squared error weighed by ``square`` (or H's diagonal), sum h|r| / sum h. Without a Hessian nothing is
    pushed.
    """
    rows, cols = w.shape
    refuse_infinite(w, terms[0], where)
    upper = None
    if hessian is not None:
        dead, order, log = check_hessian(hessian, cols, where), np.arange(cols), [] if log is None else log
        upper = damped(lambda more: inverse_factor(hessian, order, dead, more), hessian, damping, where, log)
        square = np.ascontiguousarray(np.diagonal(hessian)) if square is None else square
    kept = np.zeros_like(w)
    found: list[Packed] = []
    for term in terms:
        term.check(rows, cols)
        rest = w - kept
        grid = fit_grid(term, rest, square, search=search)
        codes = np.empty(w.shape, np.uint8)
        for c in range(0, cols, block):
            some = slice(c, min(cols, c + block))
            here = np.ascontiguousarray(rest[:, some])
            if _signs(term) and block % grid.width == 0:
                _fit_signs(grid, here, None if square is None else square[some], c // grid.width)
            codes[:, some], values = grid.nearest(here, some)
            kept[:, some] += values
            if upper is not None and some.stop < cols:
                error = (here - values).T.astype(np.float64)
                scaled = np.linalg.solve(upper[some, some].T.astype(np.float64), error).T.astype(np.float32)
                rest[:, some.stop :] -= scaled @ upper[some, some.stop :]
        found.append(grid.pack(codes))
    return found


def _signs(fmt: Coded) -> bool:
    """Whether a term is signs with a plain scale for some columns of a row."""
    return fmt.number.name == "bipolar1" and isinstance(fmt.scale, str) and fmt.scale in scales.FIELD and not (
        fmt.group.shared or fmt.scale == "e8m0"
    )  # fmt: skip


def _fit_signs(grid: Grid, rest: F32, square: F32 | None, first: int) -> None:
    """Puts the scales of least weighed error of the groups from ``first`` on into the grid; rest [rows, n]."""
    n = rest.shape[1]
    h = np.ones(n) if square is None else square.astype(np.float64)
    starts = np.arange(0, n, grid.width)
    mass = np.add.reduceat(h, starts)
    plain = np.add.reduceat(np.abs(rest), starts, axis=1, dtype=np.float64) / np.diff([*starts, n])
    weighed = np.add.reduceat(np.abs(rest) * h, starts, axis=1)
    s = np.where(mass > 0, weighed / np.where(mass > 0, mass, 1), plain)
    kind = str(grid.fmt.scale)
    stored = scales.store(np.minimum(s, fit.FLOAT32_MAX * (1 - 2.0**-8)), kind)
    assert isinstance(grid.scales, np.ndarray)
    grid.scales[:, first : first + len(starts)] = stored
    grid.s[:, first : first + len(starts)] = scales.load(stored, kind)


# ---------------------------------------------------------------- integer group scales


def progressive(
    fmt: Coded, w: F32, importance: F32 | None = None, *, lowest: float = 1.0, where: str = "the matrix"
) -> Packed:
    """QoQ's two levels: w8 = round(w / s1) with s1 = max|w| / 119 of a row, then groups of w8 in steps of s2.

    Codes come from w8, not from w, with a range that holds zero: so s2 (q - z) is an int8 for every group there can be.
    With ``lowest`` below 1 every smaller integer s2 down to that fraction is tried too, and the one of least squared
    error, weighed by ``importance`` [cols], taken. fmt: like uint4/g128*(int8/row), of 4 bits or more.
    """
    kind = _kind(fmt, "progressive", 4)
    rows, cols = w.shape
    refuse_infinite(w, fmt, where)
    arrays = allocate(fmt, rows, cols)
    width, top = fmt.width(cols), fmt.number.levels - 1
    weights = None if importance is None else _groups(np.asarray(importance)[None], width)
    for r in range(0, rows, ROWS):
        some = w[r : r + ROWS]
        stored, s1 = _stored(np.abs(some).max(axis=1) / np.float64(PROTECTIVE), kind)
        level = _groups(np.clip(np.rint(some / s1), -PROTECTIVE, PROTECTIVE), width)
        exact = _groups(some / s1, width)
        low, high = np.minimum(level.min(axis=2), 0), np.maximum(level.max(axis=2), 0)
        widest = np.maximum(1, np.rint((high - low) / top))
        zero = np.clip(np.rint(-low / widest), 0, top)
        codes, multiples, least = np.zeros_like(level), widest, np.full(widest.shape, np.inf)
        for less in range(1 + int(widest.max() * (1 - lowest))):
            s2 = np.maximum(1, widest - less)
            q = np.clip(np.rint(level / s2[..., None]) + zero[..., None], 0, top)
            value = (q - zero[..., None]) * s2[..., None]
            square = (value - exact) ** 2
            cost = (square if weights is None else square * weights).sum(axis=2, dtype=np.float64)
            cost[(np.abs(value + 0.5) > 128).any(axis=2) | ((less > 0) & (s2 < lowest * widest))] = np.inf
            better = cost < least
            least = np.minimum(cost, least)
            multiples = np.where(better, s2, multiples)
            codes[better] = q[better]
        _store(fmt, arrays, r, codes, multiples, zero, stored, cols)
    return Packed(fmt, (rows, cols), arrays)


def dual(fmt: Coded, w: F32, samples: F32 | None = None, *, where: str = "the matrix") -> Packed:
    """DGQ's two searches: a range for each group, then a row scale s1 and the integer multiples s2 of it.

    Both minimise the squared error of the output over ``samples`` of the input, float32 [tokens, cols] (a group's, then
    the row's); without samples, that of the weight. Ranges hold zero, codes are found again with s1 s2 as stored and
    kept where s2 (q - z) is within +-127. fmt: like uint4/g128*(int8/row).
    """
    kind = _kind(fmt, "dual", 2)
    rows, cols = w.shape
    refuse_infinite(w, fmt, where)
    arrays = allocate(fmt, rows, cols)
    width, top = fmt.width(cols), fmt.number.levels - 1
    x = None if samples is None else _groups(samples / _unit(np.abs(samples).max(initial=0)), width)
    for r in range(0, rows, ROWS):
        unit = _unit(np.abs(w[r : r + ROWS]).max(axis=1, keepdims=True))
        some = _groups(w[r : r + ROWS] / unit, width)  # near one: squares stay within float32
        s, zero = _fine(some, x, top)
        _store(fmt, arrays, r, *_coarse(some, s, zero, x, unit, top, kind), cols)
    return Packed(fmt, (rows, cols), arrays)


def _fine(w: F32, x: F32 | None, top: int) -> tuple[F32, F32]:
    """Scales and zero points of groups w [n, groups, width], each of least output error by itself: [n, groups]."""
    low = np.minimum(w.min(axis=2), 0)
    full = (np.maximum(w.max(axis=2), 0) - low) / top
    full[full == 0] = 1
    zero = np.clip(np.rint(-low / full), 0, top)
    # Inputs of a group, [groups, width, tokens]: one product for each.
    inputs = None if x is None else np.ascontiguousarray(x.transpose(1, 2, 0))
    best, least = full, np.full(full.shape, np.inf, np.float32)
    for ratio in FINE.astype(np.float32):
        s = ratio * full
        error = _rounding_error(w, s[..., None], zero[..., None], 0, top)[1]
        if inputs is None:
            cost = np.einsum("ngk,ngk->ng", error, error)
        else:
            y = np.matmul(error.transpose(1, 0, 2), inputs)
            cost = np.einsum("gnt,gnt->ng", y, y)
        best, least = np.where(cost < least, s, best), np.minimum(cost, least)
    return best, zero


def _coarse(
    w: F32, s: F32, zero: F32, x: F32 | None, unit: F32, top: int, kind: str
) -> tuple[F32, F32, F32, npt.NDArray[np.generic]]:
    """Codes, integers s2, zero points and the row scales of least output error of each row of groups w * unit."""
    n = len(w)
    inputs = None if x is None else x.reshape(len(x), -1).T
    z = zero[..., None]
    extreme = np.abs(w).max(axis=(1, 2)) * unit[:, 0].astype(np.float64)
    kept, _ = _stored(extreme / BYTE, kind)
    codes, multiples, least = np.empty_like(w), np.empty_like(s), np.full(n, np.inf, np.float32)
    for ratio in COARSE:
        found, s1 = _stored(ratio * extreme / BYTE, kind)
        s1 = s1 / unit
        s2 = np.clip(np.rint(s / s1), 1, BYTE)
        bound = np.floor(BYTE / s2)[..., None]
        edge = np.float32(BYTE) * s1[..., None]
        lowest, highest = np.maximum(0, z - bound), np.minimum(top, z + bound)
        step = (s1 * s2)[..., None]
        q, error = _rounding_error(w, step, z, lowest, highest, edge)
        flat = error.reshape(n, -1)
        y = flat if inputs is None else flat @ inputs
        cost = np.einsum("nt,nt->n", y, y)
        better = cost < least
        codes[better], multiples[better], kept[better] = q[better], s2[better], found[better]
        least = np.minimum(cost, least)
    return codes, multiples, zero, kept


def _rounding_error(
    w: F32, step: F32, z: F32, lowest: F32 | int, highest: F32 | int, edge: F32 | None = None
) -> tuple[F32, F32]:
    """Codes round(w / step) + z within bounds, of w cut to +-edge, and the error step (q - z) - w."""
    q = np.clip(w, -edge, edge) if edge is not None else w.copy()
    q /= step
    np.rint(q, out=q)
    q += z
    np.clip(q, lowest, highest, out=q)
    error = q - z
    error *= step
    error -= w
    return q, error


def _kind(fmt: Coded, name: str, least: int) -> str:
    """The plain type of the row scales; UsageError where the format has not two levels."""
    number, scale = fmt.number, fmt.scale
    two = (
        number.family == "uint" and number.bits >= least and fmt.zero and not fmt.group.shared
        and isinstance(scale, Coded) and scale.number.name == "int8" and not scale.group.shared
        and scale.group.cols is None and isinstance(scale.scale, str) and scale.scale in ("f32", "f16", "bf16")
    )  # fmt: skip
    if not two:
        raise UsageError(f"the solver '{name}' fits formats such as uint4/g128*(int8/row), so it cannot fit {fmt}.")
    assert isinstance(scale, Coded)
    return str(scale.scale)


def _unit(size: F32) -> F32:
    """The power of two at or below positive numbers; 1 for zero."""
    return np.where(size > 0, np.ldexp(np.float32(0.5), np.frexp(size)[1]), np.float32(1))


def _groups(w: npt.NDArray[np.floating], width: int) -> F32:
    """[n, cols] to [n, groups, width], padded with zeros."""
    n, cols = w.shape
    groups = -(-cols // width)
    out = np.zeros((n, groups * width), np.float32)
    out[:, :cols] = w
    return out.reshape(n, groups, width)


def _stored(s: npt.NDArray[np.float64], kind: str) -> tuple[npt.NDArray[np.generic], F32]:
    """Row scales [n, 1] in their storage type, and as float32 to divide by (1 for a row of zeros)."""
    stored = scales.store(np.where(s > 0, s, 1)[:, None], kind)
    return stored, scales.load(stored, kind)


def _store(
    fmt: Coded,
    arrays: dict[str, npt.NDArray[np.generic]],
    first_row: int,
    codes: F32,
    s2: F32,
    zero: F32,
    s1: npt.NDArray[np.generic],
    cols: int,
) -> None:
    levels = Parts((s2 + 128).astype(np.uint8), s1)
    flat = codes.reshape(len(codes), -1)[:, :cols].astype(np.uint8)
    fmt.pack_parts(Parts(flat, levels, zero.astype(np.uint8)), arrays, first_row)
