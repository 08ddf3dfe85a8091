"""Statistics of one input over all calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Statistics"]

F32 = npt.NDArray[np.float32]


@dataclass
class Statistics:
    """Of the input that sites with the same ``Site.shares`` read."""

    tokens: int
    hessian: F32 | None  # E[x x^T], [cols, cols]
    absmax: F32  # max |x|, [cols]
    mean_abs: F32  # E|x|, [cols]
    mean: F32  # E[x], [cols]
    square: F32  # E[x^2], [cols]
    samples: F32  # some tokens, evenly spaced, [n, cols]

    @property
    def cols(self) -> int:
        return len(self.square)
