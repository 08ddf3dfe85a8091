"""Bias correction: the mean error of stored weights goes into the bias (Nagel et al. 2019, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from gossamer.compress.edits import Edited
from gossamer.compress.transforms.base import Transform
from gossamer.errors import UsageError
from gossamer.formats import Packed, RowSource
from gossamer.formats.node import ROWS_PER_STEP

__all__ = ["CorrectBias", "mean_error"]

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CorrectBias(Transform):
    """Adds ``shift`` [rows] to the bias of the site ``where``, which gets one if it has none.

    This one does change the function: towards what it was before the weights were rounded.
    """

    where: str
    shift: F64

    name: ClassVar[str] = "correct bias"

    def edit(self, edited: Edited) -> None:
        site = next((s for s in edited.topology.sites if s.name == self.where), None)
        if site is None:
            raise UsageError(f"'{self.where}' is no site of this model.")
        bias = edited.bias(site)
        edited.set_bias(self.where, self.shift if bias is None else bias + self.shift)

    def describe(self) -> str:
        return f"bias: {self.where} shifted by {np.abs(self.shift).max():.4g} at most"


def mean_error(
    source: RowSource,
    packed: Packed,
    mean: npt.NDArray[np.floating],
    stored_mean: npt.NDArray[np.floating] | None = None,
) -> F64:
    """E[W x] - E[W' x'], float64 [rows]: what the bias lacks when W is stored as ``packed``.

    ``mean`` is E[x]; ``stored_mean`` E[x'], where the inputs of the compressed model are known to differ.
    """
    after = mean if stored_mean is None else stored_mean
    rows = source.shape[0]
    out = np.empty(rows)
    for r0 in range(0, rows, ROWS_PER_STEP):
        r1 = min(rows, r0 + ROWS_PER_STEP)
        out[r0:r1] = source.read(r0, r1) @ mean.astype(np.float64) - packed.decode(r0, r1) @ after.astype(np.float64)
    return out
