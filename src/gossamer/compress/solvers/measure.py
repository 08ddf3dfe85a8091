"""How far a stored matrix is from the one meant, by its weights and by its outputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gossamer.compress.statistics import Statistics
from gossamer.formats import Packed

__all__ = ["SiteError", "measure", "output_error"]

F32 = npt.NDArray[np.float32]

ROWS = 512  # worked on at once


@dataclass(frozen=True)
class SiteError:
    """weight_sqnr_db: 10 log10(|W|^2 / |E|^2), infinite where nothing was lost.

    output_mse: mean over tokens and outputs of the squared error of y = W x; output_relative: that error over the
    mean square of y. From the Hessian E[x x^T], else from the samples; None where neither is known.
    """

    weight_sqnr_db: float
    output_mse: float | None
    output_relative: float | None


def measure(packed: Packed, w: F32, stats: Statistics | None) -> SiteError:
    """The errors of a stored matrix against float32 w [rows, cols], a few rows at a time."""
    rows = len(w)
    signal = noise = power = lost = 0.0
    outputs = stats is not None and (stats.hessian is not None or len(stats.samples) > 0)
    for r in range(0, rows, ROWS):
        some = w[r : r + ROWS]
        error = some - packed.decode(r, r + len(some))
        signal += _sum_of_squares(some)
        noise += _sum_of_squares(error)
        if outputs:
            assert stats is not None
            power += output_error(some, stats)
            lost += output_error(error, stats)
    sqnr = float(10 * np.log10(signal / noise)) if noise and signal else -np.inf if noise else np.inf
    if not outputs:
        return SiteError(sqnr, None, None)
    relative = lost / power if power else np.inf if lost else 0.0
    return SiteError(sqnr, lost / rows, float(relative))


def output_error(error: F32, stats: Statistics) -> float:
    """tr(E H E^T) for rows E [n, cols]: the mean over tokens of |E x|^2."""
    if stats.hessian is not None:
        return max(0.0, float(np.einsum("rc,rc->", error @ stats.hessian, error, dtype=np.float64)))
    return _sum_of_squares(error @ stats.samples.T) / max(1, len(stats.samples))


def _sum_of_squares(x: F32) -> float:
    return float(np.einsum("rc,rc->", x, x, dtype=np.float64))
