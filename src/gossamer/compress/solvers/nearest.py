"""Solvers that need no inputs: the nearest codes, with the range of the largest magnitude or a searched one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers.search import Search, fit_grid
from gossamer.formats import ArraySource, Coded, Packed, encode

__all__ = ["clip", "nearest"]

F32 = npt.NDArray[np.float32]


def nearest(fmt: Coded, w: F32) -> Packed:
    """Round to nearest with ranges of the largest magnitude: what ``formats.encode`` does."""
    return encode(fmt, ArraySource(w))


def clip(fmt: Coded, w: F32, importance: F32 | None = None, search: Search | None = None) -> Packed:
    """Round to nearest with searched ranges: see ``fit_grid``. With the second moments of the inputs as importance it
    weighs errors by E[x^2]; with ``group_metric`` of them it is the clipping search of AWQ (Lin et al. 2023), the error
    of each group's part of the output."""
    grid = fit_grid(fmt, w, importance, search=search or Search())
    return grid.pack(grid.nearest(w)[0])
