"""The grid of a matrix: its scales, zero points and minima in one Coded format, fixed, without codes.

A solver chooses codes on a grid; ``Grid.pack`` stores exactly these, so what a solver saw is what is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats import Coded, Packed, allocate, fit, layout
from gossamer.formats.coded import Parts

__all__ = ["Grid", "columns_of", "first_rows"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Stored = npt.NDArray[Any] | Parts

STEP = 2048  # rows packed at once, a multiple of 16


@dataclass
class Grid:
    """Scales, zero points and minima of a [rows, cols] matrix.

    ``scales``, ``mins``: as Parts hold them, [rows, groups], or [row tiles, groups] where rows share them; ``zeros``:
    uint8 [rows, groups]. ``s``, ``z``, ``m``: what these are, float32 [rows, groups].
    """

    fmt: Coded
    rows: int
    cols: int
    scales: Stored
    mins: Stored | None
    zeros: U8 | None
    s: F32
    z: F32 | None
    m: F32 | None

    @classmethod
    def of(cls, packed: Packed) -> tuple[Grid, U8]:
        """The grid and the codes, uint8 [rows, cols], of a matrix that is stored in a Coded format."""
        fmt, (rows, cols) = packed.format, packed.shape
        if not isinstance(fmt, Coded):
            raise FormatError(f"{fmt} has no scales and codes; give a format such as int4/g128.")
        parts = fmt.unpack_parts(packed.arrays, rows, cols, 0, layout.panels(rows))
        s, z, m = fmt.steps(packed.arrays, rows, cols, 0, rows)
        tiles = fmt.matrix(rows, cols)[0]
        mins = None if parts.mins is None else first_rows(parts.mins, tiles)
        zeros = None if parts.zeros is None else parts.zeros[:rows]
        return cls(fmt, rows, cols, first_rows(parts.scales, tiles), mins, zeros, s, z, m), parts.codes[:rows]

    @property
    def width(self) -> int:
        """Columns per group."""
        return self.fmt.width(self.cols)

    def nearest(self, w: F32, columns: slice | I64 | None = None) -> tuple[U8, F32]:
        """The codes nearest to w, float32 [rows, n], in ``columns`` (None: all), and their values, both [rows, n].

        The same rule, ties included, as that of ``formats.encode``.
        """
        codes = np.empty(w.shape, np.uint8)
        values = np.empty(w.shape, np.float32)
        groups = columns_of(self.cols, columns) // self.width
        for r in self._steps():
            s, z, m = self._spread(r, groups)
            codes[r] = fit.nearest_codes(self.fmt, np.ascontiguousarray(w[r], np.float32), s, z, m)
            values[r] = fit.values(self.fmt.number, codes[r], s, z, m)
        return codes, values

    def values(self, codes: U8, columns: slice | I64 | None = None) -> F32:
        """What codes, uint8 [rows, n] in ``columns`` (None: all), stand for: float32 [rows, n]."""
        values = np.empty(codes.shape, np.float32)
        groups = columns_of(self.cols, columns) // self.width
        for r in self._steps():
            values[r] = fit.values(self.fmt.number, codes[r], *self._spread(r, groups))
        return values

    def pack(self, codes: U8) -> Packed:
        """Exactly these codes, uint8 [rows, cols], with this grid: nothing is fitted again."""
        if codes.shape != (self.rows, self.cols):
            raise FormatError(
                f"codes of shape {codes.shape} do not fit a grid of {self.rows} x {self.cols}; give a code a weight."
            )
        fmt = self.fmt
        arrays = allocate(fmt, self.rows, self.cols)
        parts = Parts(codes, self.scales, self.zeros, self.mins, fmt.group.shared)
        for r in self._steps():
            fmt.pack_parts(parts.take(r), arrays, r.start)
        return Packed(fmt, (self.rows, self.cols), arrays)

    def _steps(self) -> list[slice]:
        return [slice(r, min(self.rows, r + STEP)) for r in range(0, self.rows, STEP)]

    def _spread(self, r: slice, groups: I64) -> tuple[F32, F32 | None, F32 | None]:
        """Scales, zero points and minima of these rows, of each of the groups."""
        s, z, m = (None if x is None else x[r][:, groups] for x in (self.s, self.z, self.m))
        assert s is not None
        return s, z, m


def columns_of(cols: int, columns: slice | I64 | None) -> I64:
    """The numbers of the columns meant: int64 [n]."""
    every = np.arange(cols)
    return every if columns is None else every[columns]


def first_rows(stored: Stored, count: int) -> Stored:
    """Without the rows that pad the last panel."""
    return stored.take(slice(0, count)) if isinstance(stored, Parts) else stored[:count]
