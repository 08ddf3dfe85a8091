"""Half-quadratic quantization: real zero points fitted to the bulk of each group, without data (HQQ, Badri and Shaji
2023)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers.grid import Grid
from gossamer.compress.solvers.search import absmax
from gossamer.compress.solvers.storing import store_mins
from gossamer.errors import FormatError, UsageError
from gossamer.formats import Coded, Packed, fit

__all__ = ["Hqq", "hqq"]

F32 = npt.NDArray[np.float32]

ELEMENTS = 1 << 19  # of the rows treated together
MOST_INVERSE = 2e4  # of a scale


@dataclass(frozen=True)
class Hqq:
    """The norm p of the error that is minimized, the weight ``beta`` of the quadratic half, what it is multiplied by
    each iteration, and how many there are at most."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.p < 1 or not self.beta > 0 or not self.kappa >= 1 or not 1 <= self.iterations <= 10000:
            raise UsageError(
                f"half-quadratic fitting with p {self.p:g}, beta {self.beta:g}, kappa {self.kappa:g} and "
                f"{self.iterations} iterations cannot be; use p in (0, 1), beta above 0, kappa from 1 and at least one."
            )


def hqq(fmt: Coded, w: F32, options: Hqq | None = None) -> Packed:
    """w, float32 [rows, cols], on a grid whose scales are those of the range and whose minima are fitted.

    The method's zero point is a real number z; s * (c - z) is s * c - m with m = s z, so ``fmt`` is uintB with a
    minimum, of single rows. Each group keeps its best z: the mean error is never larger than at the start.
    """
    options = options or Hqq()
    if fmt.minimum is None or fmt.group.shared:
        raise FormatError(
            f"half-quadratic fitting finds real zero points of a row's groups, which {fmt} does not store; write for "
            "example uint4/g64-m(f16)."
        )
    fmt.check(*w.shape)
    base = absmax(fmt, w)
    assert base.m is not None
    fitted = base.m.astype(np.float64)
    step = max(1, ELEMENTS // w.shape[1])
    for r in range(0, len(w), step):
        part = slice(r, r + step)
        fitted[part] = _fit(fmt, np.ascontiguousarray(w[part], np.float32), base.s[part], base.m[part], options)
    mins = store_mins(fmt, fitted)
    grid = Grid(fmt, base.rows, base.cols, base.scales, mins.stored, None, base.s, None, mins.single)
    return grid.pack(grid.nearest(w)[0])


def _fit(fmt: Coded, w: F32, s: F32, m: F32, options: Hqq) -> F32:
    """Minima [n, groups] for rows w [n, cols] with scales s and the minima m to start from."""
    x = fit.grouped(fmt, w)
    groups, width = x.shape[1:]
    inside = (np.arange(groups * width) < w.shape[1]).reshape(groups, width)
    count = inside.sum(axis=-1).astype(np.float32)
    sound = s > 1 / MOST_INVERSE
    scale = np.where(sound, s, 1)[..., None]
    z = m[..., None] / scale
    best, least = z, np.full(s.shape, np.inf, np.float32)
    beta, top = options.beta, fmt.number.levels - 1
    for _ in range(options.iterations + 1):
        codes = np.clip(np.rint(x / scale + z), 0, top)
        error = (x - (codes - z) * scale) * inside
        size = np.abs(error)
        mean = size.sum(axis=-1) / count
        better = mean < least
        if not better.any():
            break
        best, least = np.where(better[..., None], z, best), np.where(better, mean, least)
        with np.errstate(divide="ignore"):  # no error: infinitely shrunk
            kept = np.sign(error) * np.maximum(size - size ** np.float32(options.p - 1) / np.float32(beta), 0)
        z = (((codes - (x - kept) / scale) * inside).sum(axis=-1) / count)[..., None]
        beta *= options.kappa
    fitted: F32 = np.where(sound, (best * scale)[..., 0], m).astype(np.float32)
    return fitted
