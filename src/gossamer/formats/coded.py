"""Codes times scales over groups: ``NUMBER/GROUP[*SCALE][-z(..) or -m(..)]``.

A stored code c of a group with scale s stands for
    s * value(c)     value(c) = c - 2^(B-1) for intB, c for uintB-z(0), else as in numbers.py
    s * (c - z)      uintB with a stored zero point z, itself a code of B bits
    s * c - m        uintB with a minimum m
computed in float32, the parenthesis first. Scales, and minima, are a matrix [rows, groups] (rows of tiles where rows
share them): plain floats, or that matrix in a Coded format of its own. How codes are found: fit.py; bytes: layout.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats import fit, layout, scales, shared
from gossamer.formats.group import MAX_GROUP, Group
from gossamer.formats.layout import BLOCK
from gossamer.formats.node import PANEL, Field, RowSource
from gossamer.formats.numbers import FLOATS, NUMBERS, SCALES, Number

if TYPE_CHECKING:
    from gossamer.ops import Kernel, Scales

__all__ = ["BLOCK", "MAX_DEPTH", "MAX_GROUP", "Coded", "Group", "Parts", "default_scale"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

MAX_DEPTH = 3  # a weight, its scales, the scales of its scales
Parts = fit.Parts


@dataclass(frozen=True)
class Coded:
    """Codes of ``number`` with a scale per ``group``.

    scale: one of SCALES, or the Coded format of the scale matrix; None: f16 for gN, else f32.
    zero: whether a zero point is stored; None: it is for uintB without a minimum. False with uintB is ``-z(0)``.
    minimum: of uintB alone: f32, f16 or bf16, or the Coded format of the matrix of minima; None: none.
    """

    number: Number
    group: Group
    scale: str | Coded | None = None
    zero: bool | None = None
    minimum: str | Coded | None = None

    def __post_init__(self) -> None:
        number, unsigned = self.number, self.number.family == "uint"
        if NUMBERS.get(number.name) != number:
            raise FormatError(f"'{number.name}' is not a number format; write for example int4, uint4, e2m1 or nf4.")
        if self.scale is None:
            object.__setattr__(self, "scale", default_scale(self.group))
        if self.zero is None:
            object.__setattr__(self, "zero", unsigned and self.minimum is None)
        if isinstance(self.scale, str) and self.scale not in SCALES:
            raise FormatError(
                f"scale '{self.scale}' is not known; scales are {', '.join(SCALES)}, or a format in parentheses "
                "such as (int8/row)."
            )
        if not unsigned and (self.zero or self.minimum is not None):
            raise FormatError(
                f"{number.name} takes no zero point or minimum, which go with uint2 to uint8; write '{number.name}/"
                f"{self.group}'."
            )
        if self.zero and self.minimum is not None:
            raise FormatError("a format has a zero point or a minimum, not both; write -z(...) or -m(...).")
        if isinstance(self.minimum, str) and self.minimum not in FLOATS:
            raise FormatError(
                f"a minimum is stored as {', '.join(FLOATS)}, or as a format such as -m(uint4/g16-z(0)), "
                f"so '{self.minimum}' cannot be."
            )
        if self.depth > MAX_DEPTH:
            raise FormatError(f"{self} nests {self.depth} formats in one another; at most {MAX_DEPTH} may.")

    def __str__(self) -> str:
        scale = ""
        if isinstance(self.scale, Coded):
            scale = f"*({self.scale})"
        elif self.scale != default_scale(self.group):
            scale = f"*{self.scale}"
        offset = "" if self.minimum is None else f"-m({self.minimum})"
        if self.number.family == "uint" and self.minimum is None and not self.zero:
            offset = "-z(0)"
        return f"{self.number.name}/{self.group}{scale}{offset}"

    @property
    def integer(self) -> bool:
        return self.number.table is None

    @property
    def depth(self) -> int:
        """Formats inside one another: 1 with plain scales."""
        return 1 + max((f.depth for f in (self.scale, self.minimum) if isinstance(f, Coded)), default=0)

    # ------------------------------------------------------------ shape

    def check(self, rows: int, cols: int) -> None:
        if rows < 1 or cols < 1:
            raise FormatError(f"{self} needs at least one row and one column, not {rows} x {cols}.")
        self.check_weight()

    def check_weight(self) -> None:
        """Raises FormatError for groups that only scale matrices may have: those of 8, 24, 40, ... columns."""
        if self.group.cols is not None and self.group.cols % BLOCK:
            near = self.group.cols + 8
            raise FormatError(
                f"group '{self.group}' of a weight must have a multiple of {BLOCK} columns (of 8 only inside a scale); "
                f"write for example '{Group(self.group.rows, min(near, MAX_GROUP))}'."
            )

    def width(self, cols: int) -> int:
        """Columns per group; a whole row counts its padding."""
        return layout.blocks(cols) * BLOCK if self.group.cols is None else self.group.cols

    def groups(self, cols: int) -> int:
        width = self.width(cols)
        return (cols + width - 1) // width

    def tile_rows(self, rows: int) -> int:
        """Rows that share a scale: 1, a multiple of 16, or all of them with their padding."""
        return layout.panels(rows) * PANEL if self.group.rows is None else self.group.rows

    def matrix(self, rows: int, cols: int) -> tuple[int, int]:
        """The shape of the matrix of scales."""
        tile = self.tile_rows(rows)
        return (rows + tile - 1) // tile, self.groups(cols)

    def fields(self, rows: int, cols: int) -> dict[str, Field]:
        tiles, groups = self.matrix(rows, cols)
        fields = layout.code_fields(self.number.bits, rows, cols)
        for name, scale in (("scales", self.scale), ("mins", self.minimum)):
            if name == "mins" and self.zero:
                fields["zeros"] = layout.zero_field(self.number.bits, rows, groups)
            if isinstance(scale, Coded):
                fields |= {f"{name}.{inner}": f for inner, f in scale.fields(tiles, groups).items()}
            elif scale is not None:
                count = tiles if self.group.shared else layout.panels(rows) * PANEL
                fields[name] = Field(scales.FIELD[scale], count * groups)
        return fields

    # ------------------------------------------------------------ values

    def prepare(self, source: RowSource) -> fit.State | None:
        """What rows share (a scale of several rows, at any depth), found in passes over the matrix; None if nothing."""
        return shared.prepare(self, source)

    def quantize(self, w: F32, first_row: int = 0, state: fit.State | None = None) -> Parts:
        """Codes, scales and offsets of float32 rows [n, cols], the matrix's rows from ``first_row`` on: see fit.py."""
        return fit.quantize(self, w, np.arange(first_row, first_row + len(w)), state)

    def encode_rows(
        self, w: F32, into: Mapping[str, npt.NDArray[Any]], first_row: int, cols: int, state: fit.State | None
    ) -> None:
        self.pack_parts(self.quantize(w, first_row, state), into, first_row)

    def decode_rows(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int, r0: int, r1: int) -> F32:
        p0, p1 = r0 // PANEL, layout.panels(r1)
        keep = slice(r0 - p0 * PANEL, r1 - p0 * PANEL)
        codes = layout.unpack_codes(arrays, self.number.bits, cols, p0, p1)[keep]
        width = self.width(cols)
        s, zeros, m = (
            None if x is None else np.repeat(x, width, axis=1)[:, :cols] for x in self.steps(arrays, rows, cols, r0, r1)
        )
        assert s is not None
        return fit.values(self.number, codes, s, zeros, m)

    def steps(
        self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int, r0: int, r1: int
    ) -> tuple[F32, F32 | None, F32 | None]:
        """Scales, zero points and minima of rows r0..r1 as they are stored: float32 [r1 - r0, groups] each."""
        zeros = m = None
        if self.zero:
            p0 = r0 // PANEL
            z = layout.unpack_zeros(arrays["zeros"], self.number.bits, self.groups(cols), p0, layout.panels(r1))
            zeros = z[r0 - p0 * PANEL : r1 - p0 * PANEL].astype(np.float32)
        if self.minimum is not None:
            m = self._read("mins", self.minimum, arrays, rows, cols, r0, r1)
        return self._read("scales", self.scale, arrays, rows, cols, r0, r1), zeros, m

    def _read(
        self,
        name: str,
        scale: str | Coded | None,
        arrays: Mapping[str, npt.NDArray[Any]],
        rows: int,
        cols: int,
        r0: int,
        r1: int,
    ) -> F32:
        """The stored scales or minima of rows r0..r1: float32 [r1 - r0, groups]."""
        tiles, groups = self.matrix(rows, cols)
        tile = self.tile_rows(rows)
        t0, t1 = r0 // tile, (r1 + tile - 1) // tile
        if isinstance(scale, Coded):
            found = scale.decode_rows(layout.under(arrays, f"{name}."), tiles, groups, t0, t1)
        elif self.group.shared:
            found = scales.load(arrays[name][t0 * groups : t1 * groups], str(scale)).reshape(t1 - t0, groups)
        else:
            p0 = r0 // PANEL
            flat = layout.unpack_by_row(arrays[name], groups, p0, layout.panels(r1))
            found = scales.load(flat[r0 - p0 * PANEL : r1 - p0 * PANEL], str(scale))
        return found if tile == 1 else found[np.arange(r0, r1) // tile - t0]

    # ------------------------------------------------------------ bytes

    def pack_parts(self, parts: Parts, into: Mapping[str, npt.NDArray[Any]], first_row: int) -> None:
        """Lays out codes, scales, zero points and minima as they are: nothing is computed, so nothing is lost.

        ``first_row`` is a multiple of 16. Scales and minima of ``parts`` are in the storage type of their format, or
        Parts themselves where they are nested; where rows share them (``parts.shared``) they are those of the whole
        matrix, and are laid out with row 0.
        """
        number = self.number
        layout.pack_codes(parts.codes, number.bits, number.zero_code or 0, into, first_row)
        if parts.zeros is not None:
            layout.pack_zeros(parts.zeros, number.bits, into["zeros"], first_row)
        if parts.shared and first_row:
            return
        for name, scale, stored in (("scales", self.scale, parts.scales), ("mins", self.minimum, parts.mins)):
            if stored is None:
                continue
            if isinstance(scale, Coded):
                assert isinstance(stored, Parts)
                scale.pack_parts(stored, layout.under(into, f"{name}."), first_row)
            elif parts.shared:
                assert isinstance(stored, np.ndarray)
                into[name][: stored.size] = stored.ravel()
            else:
                assert isinstance(stored, np.ndarray)
                layout.pack_by_row(stored, into[name], first_row)

    def unpack_parts(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int, p0: int, p1: int) -> Parts:
        """The inverse of ``pack_parts`` for panels p0..p1: all 16 (p1 - p0) rows, padding included."""
        tiles, groups = self.matrix(rows, cols)

        def stored(name: str, scale: str | Coded | None) -> npt.NDArray[Any] | Parts | None:
            if scale is None:
                return None
            if isinstance(scale, Coded):
                q0, q1 = (0, layout.panels(tiles)) if self.group.shared else (p0, p1)
                return scale.unpack_parts(layout.under(arrays, f"{name}."), tiles, groups, q0, q1)
            if self.group.shared:
                return arrays[name][: tiles * groups].reshape(tiles, groups)
            return layout.unpack_by_row(arrays[name], groups, p0, p1)

        bits = self.number.bits
        scale = stored("scales", self.scale)
        assert scale is not None
        return Parts(
            codes=layout.unpack_codes(arrays, bits, cols, p0, p1),
            scales=scale,
            zeros=layout.unpack_zeros(arrays["zeros"], bits, groups, p0, p1) if self.zero else None,
            mins=stored("mins", self.minimum),
            shared=self.group.shared,
        )

    def pack_rows(
        self,
        codes: U8,
        scales: npt.NDArray[Any],
        offset: npt.NDArray[Any] | None,
        into: Mapping[str, npt.NDArray[Any]],
        first_row: int,
    ) -> None:
        """``pack_parts`` with plain scales of a row each: codes [n, cols]; scales, and zeros or mins, [n, groups]."""
        zeros, mins = (offset, None) if self.zero else (None, offset)
        self.pack_parts(Parts(codes, scales, zeros, mins), into, first_row)

    def unpack_rows(
        self, arrays: Mapping[str, npt.NDArray[Any]], cols: int, p0: int, p1: int
    ) -> tuple[U8, npt.NDArray[Any], npt.NDArray[Any] | None]:
        """The inverse of ``pack_rows``."""
        parts = self.unpack_parts(arrays, p1 * PANEL, cols, p0, p1)
        assert isinstance(parts.scales, np.ndarray)
        assert not isinstance(parts.mins, Parts)
        return parts.codes, parts.scales, parts.zeros if self.zero else parts.mins

    def kernel(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int) -> Kernel | None:
        from gossamer.ops import Kernel

        number = self.number
        scale = self._matrix_of("scales", self.scale, arrays, rows, cols)
        return Kernel(
            code=f"u{number.bits}",
            q8=arrays.get("q8"),
            q4=arrays.get("q4"),
            q2=arrays.get("q2"),
            q1=arrays.get("q1"),
            zero=float(number.zero),
            step=float(number.step),
            table=number.table,
            group=self.width(cols),
            tile_rows=self.tile_rows(rows),
            scales=scale,
            zeros=arrays.get("zeros"),
            zero_bits=layout.zero_bits(number.bits) if self.zero else 0,
            mins=self._matrix_of("mins", self.minimum, arrays, rows, cols),
        )

    def _matrix_of(
        self, name: str, scale: str | Coded | None, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int
    ) -> Scales | None:
        from gossamer.ops import Scales

        if isinstance(scale, Coded):
            return Scales("nested", nested=scale.kernel(layout.under(arrays, f"{name}."), *self.matrix(rows, cols)))
        return None if scale is None else Scales(scale, arrays[name])


def default_scale(group: Group) -> str:
    """f16 for groups of a row's columns; f32 for a row, a tile and a tensor."""
    return "f16" if group.rows == 1 and group.cols is not None else "f32"
