"""Plain numbers: ``f32``, ``f16``, ``bf16``.

Bytes: ``values`` lies as [panel][column][16 rows]; bf16 as [panel][column pair][16 rows][2], the order in which
the bf16 dot product reads it. Rows past the end are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats import halves
from gossamer.formats.node import PANEL, Field
from gossamer.formats.numbers import FLOATS

if TYPE_CHECKING:
    from gossamer.ops import Kernel

__all__ = ["Dense"]

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Dense:
    """A matrix of ``f32``, ``f16`` or ``bf16`` values."""

    number: str

    def __post_init__(self) -> None:
        if self.number not in FLOATS:
            raise FormatError(f"'{self.number}' is not a float format; there are {', '.join(FLOATS)}.")

    def __str__(self) -> str:
        return self.number

    @property
    def integer(self) -> bool:
        return False

    def check(self, rows: int, cols: int) -> None:
        if rows < 1 or cols < 1:
            raise FormatError(f"{self} needs at least one row and one column, not {rows} x {cols}.")

    def _columns(self, cols: int) -> int:
        return cols + cols % 2 if self.number == "bf16" else cols

    def fields(self, rows: int, cols: int) -> dict[str, Field]:
        panels = (rows + PANEL - 1) // PANEL
        return {"values": Field(self.number.upper(), panels * PANEL * self._columns(cols))}

    def _grid(self, array: npt.NDArray[Any], p0: int, p1: int, cols: int) -> npt.NDArray[Any]:
        """Panels p0..p1 of the flat array as a view [panels, 16 rows, columns]."""
        columns = self._columns(cols)
        flat = array[p0 * PANEL * columns : p1 * PANEL * columns]
        if self.number == "bf16":
            pairs = flat.reshape(p1 - p0, columns // 2, PANEL, 2)
            return pairs.transpose(0, 2, 1, 3)  # [panels, rows, pairs, 2]
        return flat.reshape(p1 - p0, columns, PANEL).transpose(0, 2, 1)

    def encode_rows(self, w: F32, into: Mapping[str, npt.NDArray[Any]], first_row: int, cols: int) -> None:
        panels = (len(w) + PANEL - 1) // PANEL
        padded = np.zeros((panels * PANEL, self._columns(cols)), np.float32)
        padded[: len(w), :cols] = w
        first = first_row // PANEL
        grid = self._grid(into["values"], first, first + panels, cols)
        grid[...] = halves.from_float(padded, self.number).reshape(grid.shape)

    def decode_rows(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int, r0: int, r1: int) -> F32:
        p0, p1 = r0 // PANEL, (r1 + PANEL - 1) // PANEL
        grid = self._grid(arrays["values"], p0, p1, cols)
        flat = halves.to_float(np.ascontiguousarray(grid), self.number).reshape((p1 - p0) * PANEL, self._columns(cols))
        return np.ascontiguousarray(flat[r0 - p0 * PANEL : r1 - p0 * PANEL, :cols])

    def kernel(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int) -> Kernel | None:
        from gossamer.ops import Kernel

        return Kernel(code=self.number, codes=arrays["values"])
