"""What calibration knows about the input of a linear site."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Statistics"]

F32 = npt.NDArray[np.float32]


@dataclass
class Statistics:
    """Of one input (of the sites that share it), over all calibration tokens.

    hessian: E[x x^T], float32 [cols, cols], or None; absmax, mean_abs, mean and square (E[x^2]): float32 [cols];
    samples: float32 [at most 512, cols], evenly spaced tokens.
    """

    tokens: int
    hessian: F32 | None
    absmax: F32
    mean_abs: F32
    mean: F32
    square: F32
    samples: F32
