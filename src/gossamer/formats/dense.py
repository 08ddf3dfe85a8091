"""Plain numbers: ``f32``, ``f16``, ``bf16``.

Bytes: ``values`` lies as [panel][column][16 rows]; bf16 as [panel][block of 16 columns][8 pairs][16 rows][2], the pairs
(0,2), (4,6), (1,3), (5,7) of each half block, the order in which two registers of codes become bf16. Rows and columns
past the end are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats import halves
from gossamer.formats.node import PANEL, Field, RowSource
from gossamer.formats.numbers import FLOATS

if TYPE_CHECKING:
    from gossamer.ops import Kernel

__all__ = ["Dense"]

F32 = npt.NDArray[np.float32]

BLOCK = 16  # columns of a bf16 block


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
        return (cols + BLOCK - 1) // BLOCK * BLOCK if self.number == "bf16" else cols

    def fields(self, rows: int, cols: int) -> dict[str, Field]:
        panels = (rows + PANEL - 1) // PANEL
        return {"values": Field(self.number.upper(), panels * PANEL * self._columns(cols))}

    def prepare(self, source: RowSource) -> None:
        return None

    def encode_rows(self, w: F32, into: Mapping[str, npt.NDArray[Any]], first_row: int, cols: int, state: None) -> None:
        panels, columns = (len(w) + PANEL - 1) // PANEL, self._columns(cols)
        padded = np.zeros((panels * PANEL, columns), np.float32)
        padded[: len(w), :cols] = w
        stored = halves.from_float(padded, self.number)
        start = first_row * columns
        out = into["values"][start : start + stored.size]
        if self.number == "bf16":
            # Column 4a + 2e + b of a half block is element e of its pair 2b + a.
            grid = stored.reshape(panels, PANEL, columns // 8, 2, 2, 2).transpose(0, 2, 5, 3, 1, 4)
            out.reshape(grid.shape)[...] = grid
        else:
            grid = stored.reshape(panels, PANEL, columns).transpose(0, 2, 1)
            out.reshape(grid.shape)[...] = grid

    def decode_rows(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int, r0: int, r1: int) -> F32:
        p0, p1 = r0 // PANEL, (r1 + PANEL - 1) // PANEL
        panels, columns = p1 - p0, self._columns(cols)
        flat = arrays["values"][p0 * PANEL * columns : p1 * PANEL * columns]
        if self.number == "bf16":
            stored = flat.reshape(panels, columns // 8, 2, 2, PANEL, 2).transpose(0, 4, 1, 3, 5, 2)
        else:
            stored = flat.reshape(panels, columns, PANEL).transpose(0, 2, 1)
        values = halves.to_float(np.ascontiguousarray(stored), self.number).reshape(panels * PANEL, columns)
        return np.ascontiguousarray(values[r0 - p0 * PANEL : r1 - p0 * PANEL, :cols])

    def kernel(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int) -> Kernel | None:
        from gossamer.ops import Kernel

        return Kernel(code=self.number, values=arrays["values"])
