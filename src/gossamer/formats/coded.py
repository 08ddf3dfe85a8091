"""Codes times scales over groups: ``NUM/GROUP[*SCALE][-z(FMT) or -m(FMT)]``.

A stored code c of a group with scale s stands for
    s * (c - 2^(B-1))      signed ``intB``
    s * (c - z)            ``uintB`` with a zero point, itself a code of B bits
    s * c - m              ``uintB`` with a minimum m in a float format
computed in float32, the parenthesis first. Groups run along the input. Defaults: scale f16 for groups, f32 for a row;
``uintB`` means ``uintB-z(uintB)``.

Bytes (columns in blocks of 8, padded with the code of zero; rows in panels of 16, padded with zero):
    codes    8 bits: [panel][block][2][16 rows][4], column 8*block + 4*half + i
             4 bits: [panel][block][16 rows][4], low nibble column 8*block + i, high nibble 8*block + 4 + i
             5 bits: the low four as above, and
    high     [panel][block][2][64 bits], bit 4*row + i: the fifth bit
    scales   [panel][group][16 rows]
    zeros    4 bits: [panel][group][8 bytes], low nibble row r, high nibble row r + 8;
             5 and 8 bits: [panel][group][16 rows], a byte each
    mins     [panel][group][16 rows]
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
from gossamer.formats.numbers import FLOATS, INTEGERS, Integer

if TYPE_CHECKING:
    from gossamer.ops import Kernel

__all__ = ["BLOCK", "MAX_GROUP", "Coded"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

BLOCK = 8  # columns whose codes lie together
MAX_GROUP = 1 << 20  # columns
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Coded:
    """Integer codes with a scale per group.

    ``group`` is the number of input columns that share a scale, or None for a whole row; ``minimum`` is the float
    format of the stored minimum, or None for a zero point (unsigned) or none (signed).
    """

    number: Integer
    group: int | None
    scale: str
    minimum: str | None = None

    def __post_init__(self) -> None:
        if self.number.name not in INTEGERS:
            raise FormatError(f"'{self.number.name}' is not an integer format; there are {', '.join(INTEGERS)}.")
        if self.group is not None and (self.group % BLOCK or not BLOCK <= self.group <= MAX_GROUP):
            raise FormatError(
                f"group 'g{self.group}' must be a multiple of {BLOCK} up to {MAX_GROUP}, such as g32 or g128, or 'row'."
            )
        if self.scale not in FLOATS:
            raise FormatError(f"scale '{self.scale}' is not known; scales are {', '.join(FLOATS)}.")
        if self.minimum is not None and (self.number.signed or self.minimum not in FLOATS):
            raise FormatError(f"a minimum -m(...) goes with uint4, uint5 or uint8 and is one of {', '.join(FLOATS)}.")

    def __str__(self) -> str:
        group = "row" if self.group is None else f"g{self.group}"
        scale = "" if self.scale == default_scale(self.group) else f"*{self.scale}"
        offset = "" if self.minimum is None else f"-m({self.minimum})"
        return f"{self.number.name}/{group}{scale}{offset}"

    @property
    def integer(self) -> bool:
        return True

    # ------------------------------------------------------------ shape

    def check(self, rows: int, cols: int) -> None:
        if rows < 1 or cols < 1:
            raise FormatError(f"{self} needs at least one row and one column, not {rows} x {cols}.")

    def _blocks(self, cols: int) -> int:
        return (cols + BLOCK - 1) // BLOCK

    def _group(self, cols: int) -> int:
        """Columns per group, a multiple of 8: a row's group covers its padded width."""
        return self._blocks(cols) * BLOCK if self.group is None else self.group

    def _groups(self, cols: int) -> int:
        group = self._group(cols)
        return (cols + group - 1) // group

    @property
    def _zero_bytes(self) -> int:
        """Bytes of the zero points of one panel and group; 0 when there are none."""
        if self.number.signed or self.minimum is not None:
            return 0
        return PANEL // 2 if self.number.bits == 4 else PANEL

    def fields(self, rows: int, cols: int) -> dict[str, Field]:
        panels = (rows + PANEL - 1) // PANEL
        blocks, groups = self._blocks(cols), self._groups(cols)
        fields = {"codes": Field("U8", panels * blocks * (128 if self.number.bits == 8 else 64))}
        if self.number.bits == 5:
            fields["high"] = Field("U8", panels * blocks * 16)
        fields["scales"] = Field(self.scale.upper(), panels * groups * PANEL)
        if self._zero_bytes:
            fields["zeros"] = Field("U8", panels * groups * self._zero_bytes)
        if self.minimum is not None:
            fields["mins"] = Field(self.minimum.upper(), panels * groups * PANEL)
        return fields

    # ------------------------------------------------------------ values

    def quantize(self, w: F32) -> tuple[U8, npt.NDArray[Any], npt.NDArray[Any] | None]:
        """Round to nearest: codes [n, cols] uint8, scales [n, groups], and zeros (uint8) or mins, or None.

        Signed: the element of largest magnitude sits on the code -2^(B-1) (so the scale may be negative), which
        uses every code. Zero point: the range of the group, widened to hold zero, is spread over all codes.
        Minimum: the range from the stored minimum, which lies at or below the group's, up to its largest element.
        The codes are found with the scale and the offset as they are stored, and what they stand for is
        quantized to the same codes again. Ranges beyond the largest float32 are cut.
        """
        n, cols = w.shape
        group, groups = self._group(cols), self._groups(cols)
        padded = np.zeros((n, groups * group), np.float32)
        padded[:, :cols] = w
        if self.minimum is not None:
            padded[:, cols:] = padded[:, (groups - 1) * group, None]  # a zero would pull the minimum towards itself
        x = padded.reshape(n, groups, group)
        codes, scales, offset = self._fit(x)
        # A few groups leave the first or the last code unused, mostly because their scale has few bits left
        # (a subnormal one): their values are quantized again until nothing changes. That ends, because each
        # round makes the scale smaller or the minimum larger, or neither; three rounds are the most seen.
        rest = ~self._settled(codes, offset)
        for _ in range(100):
            if not rest.any():
                break
            s, z = self._steps(scales[rest, None], None if offset is None else offset[rest, None])
            again = self._fit(self._values(codes[rest], s, z))
            changed = (again[0] != codes[rest]).any(axis=-1) | (again[1] != scales[rest])
            codes[rest], scales[rest] = again[0], again[1]
            if offset is not None and again[2] is not None:
                changed |= again[2] != offset[rest]
                offset[rest] = again[2]
            rest[rest] = changed
        return codes.reshape(n, -1)[:, :cols].astype(np.uint8), scales, offset

    def _fit(self, x: F32) -> tuple[F32, npt.NDArray[Any], npt.NDArray[Any] | None]:
        """One round to nearest of x [..., group]: whole codes in float32, scales [...], and zeros or mins [...]."""
        top = self.number.levels - 1
        low, high = x.min(axis=-1).astype(np.float64), x.max(axis=-1).astype(np.float64)
        if self.number.signed:
            zero = self.number.zero
            scales = self._store_scale(np.where(-low >= high, low, high) / -zero, FLOAT32_MAX / zero)
            return self._round(x, scales, np.float32(zero)), scales, None
        if self.minimum is None:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            scales = self._store_scale((high - low) / top, FLOAT32_MAX / top)
            zeros = np.clip(np.rint(-low / _divisor(halves.to_float(scales, self.scale))), 0, top)
            codes = self._round(x, scales, zeros.astype(np.float32)[..., None])
            # The rounded zero point may leave the largest element just below the middle between the last two codes.
            short = (codes.max(axis=-1) == top - 1) & (high > 0)
            codes[short] = np.where(x[short] == high[short, None], np.float32(top), codes[short])
            return codes, scales, zeros.astype(np.uint8)
        mins = halves.from_float((-low).astype(np.float32), self.minimum)
        mins = np.where(halves.to_float(mins, self.minimum) < -low, halves.next_up(mins, self.minimum), mins)
        m = halves.to_float(mins, self.minimum)
        scales = self._store_scale(np.maximum(high + m, 0) / top, (FLOAT32_MAX + np.minimum(m, 0)) / top)
        with np.errstate(over="ignore"):  # an infinity is cut to the last code
            return self._round(x + m[..., None], scales, np.float32(0)), scales, mins

    def _store_scale(self, s: npt.NDArray[np.float64], limit: Any) -> npt.NDArray[Any]:
        """Scales in their storage type, so that no value overflows float32 (``limit``), and zero without a sign."""
        limit = limit * (1 - 2.0**-8)  # room for rounding up
        s = np.clip(s, -limit, limit)
        if self.scale == "f32" and not self.number.signed:
            # With 16 significant bits s * (c - z) is exact, so that the range of the values gives the scale back.
            mantissa, exponent = np.frexp(s)
            s = np.ldexp(np.rint(mantissa * 65536) / 65536, exponent)
        scales = halves.from_float(s.astype(np.float32), self.scale)
        scales[halves.to_float(scales, self.scale) == 0] = 0
        return scales

    def _round(self, x: F32, scales: npt.NDArray[Any], shift: Any) -> F32:
        codes: F32 = x / _divisor(halves.to_float(scales, self.scale))[..., None]
        codes += shift
        np.rint(codes, out=codes)
        np.clip(codes, 0, self.number.levels - 1, out=codes)
        return codes

    def _settled(self, codes: F32, offset: npt.NDArray[Any] | None) -> npt.NDArray[np.bool_]:
        """Which groups use the first and the last code, so that their values give the same scale and offset again."""
        first, last = codes.min(axis=-1), codes.max(axis=-1)
        if self.number.signed:
            return np.asarray(first == 0)  # where the extreme sits
        if offset is not None and self.minimum is None:  # zero belongs to the range
            first, last = np.minimum(first, offset), np.maximum(last, offset)
        return np.asarray((first == 0) & (last == self.number.levels - 1))

    def _steps(self, scales: npt.NDArray[Any], offset: npt.NDArray[Any] | None) -> tuple[F32, Any]:
        """Scales, and zero points or minima, as float32."""
        s = halves.to_float(scales, self.scale)
        if offset is None:
            return s, np.float32(self.number.zero)
        return s, offset.astype(np.float32) if self.minimum is None else halves.to_float(offset, self.minimum)

    def _values(self, codes: npt.NDArray[Any], s: F32, offset: Any) -> F32:
        """What codes mean, with scales and offsets that broadcast to them: the definition, in float32."""
        q: F32 = codes.astype(np.float32)
        w: F32 = s * q - offset if self.minimum is not None else s * (q - offset)
        return w

    def encode_rows(self, w: F32, into: Mapping[str, npt.NDArray[Any]], first_row: int, cols: int) -> None:
        codes, scales, offset = self.quantize(w)
        self.pack_rows(codes, scales, offset, into, first_row)

    # ------------------------------------------------------------ bytes

    def pack_rows(
        self,
        codes: U8,
        scales: npt.NDArray[Any],
        offset: npt.NDArray[Any] | None,
        into: Mapping[str, npt.NDArray[Any]],
        first_row: int,
    ) -> None:
        """Lays out codes [n, cols] (stored form), scales [n, groups] and zeros or mins [n, groups].

        ``first_row`` is a multiple of 16; scales and mins come in the storage type of their format.
        """
        n, cols = codes.shape
        panels, blocks, groups = (n + PANEL - 1) // PANEL, self._blocks(cols), self._groups(cols)
        p = first_row // PANEL
        padded = np.full((panels * PANEL, blocks * BLOCK), self.number.zero, np.uint8)
        padded[:n, :cols] = codes
        grid = padded.reshape(panels, PANEL, blocks, 2, 4).transpose(0, 2, 3, 1, 4)  # panel, block, half, row, i
        if self.number.bits == 8:
            _span(into["codes"], p, panels, blocks * 128)[...] = grid.reshape(panels, -1)
        else:
            low = (grid[:, :, 0] & 15) | ((grid[:, :, 1] & 15) << 4)
            _span(into["codes"], p, panels, blocks * 64)[...] = low.reshape(panels, -1)
        if self.number.bits == 5:
            bits = np.packbits((grid >> 4).reshape(panels, -1, 64), axis=-1, bitorder="little")
            _span(into["high"], p, panels, blocks * 16)[...] = bits.reshape(panels, -1)
        _span(into["scales"], p, panels, groups * PANEL)[...] = _by_panel(scales, panels, 0)
        if offset is None:
            return
        if self.minimum is not None:
            _span(into["mins"], p, panels, groups * PANEL)[...] = _by_panel(offset, panels, 0)
            return
        zeros = _by_panel(offset, panels, 0).reshape(panels, groups, PANEL)
        if self.number.bits == 4:
            zeros = zeros[:, :, :8] | (zeros[:, :, 8:] << 4)
        _span(into["zeros"], p, panels, groups * self._zero_bytes)[...] = zeros.reshape(panels, -1)

    def unpack_rows(
        self, arrays: Mapping[str, npt.NDArray[Any]], cols: int, p0: int, p1: int
    ) -> tuple[U8, npt.NDArray[Any], npt.NDArray[Any] | None]:
        """The inverse of ``pack_rows`` for panels p0..p1: codes, scales, zeros or mins of all 16 (p1 - p0) rows."""
        panels, blocks, groups = p1 - p0, self._blocks(cols), self._groups(cols)
        if self.number.bits == 8:
            grid = _span(arrays["codes"], p0, panels, blocks * 128).reshape(panels, blocks, 2, PANEL, 4)
        else:
            both = _span(arrays["codes"], p0, panels, blocks * 64).reshape(panels, blocks, 1, PANEL, 4)
            grid = np.concatenate([both & 15, both >> 4], axis=2)
        if self.number.bits == 5:
            high = _span(arrays["high"], p0, panels, blocks * 16).reshape(panels, blocks, 2, 8)
            grid = grid | (np.unpackbits(high, axis=-1, bitorder="little").reshape(grid.shape) << 4)
        codes = grid.transpose(0, 3, 1, 2, 4).reshape(panels * PANEL, blocks * BLOCK)[:, :cols]

        def by_row(name: str) -> npt.NDArray[Any]:
            flat = _span(arrays[name], p0, panels, groups * PANEL).reshape(panels, groups, PANEL)
            return flat.transpose(0, 2, 1).reshape(panels * PANEL, groups)

        offset: npt.NDArray[Any] | None = None
        if self.minimum is not None:
            offset = by_row("mins")
        elif self._zero_bytes == PANEL:
            offset = by_row("zeros")
        elif self._zero_bytes:
            z = _span(arrays["zeros"], p0, panels, groups * 8).reshape(panels, groups, 8)
            z = np.concatenate([z & 15, z >> 4], axis=2)
            offset = z.transpose(0, 2, 1).reshape(panels * PANEL, groups)
        return codes, by_row("scales"), offset

    def decode_rows(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int, r0: int, r1: int) -> F32:
        p0, p1 = r0 // PANEL, (r1 + PANEL - 1) // PANEL
        codes, scales, offset = self.unpack_rows(arrays, cols, p0, p1)
        keep = slice(r0 - p0 * PANEL, r1 - p0 * PANEL)
        group = self._group(cols)

        def spread(per_group: F32) -> F32:
            return np.repeat(per_group[keep], group, axis=1)[:, :cols]

        s, z = self._steps(scales, offset)
        return self._values(codes[keep], spread(s), z if offset is None else spread(z))

    def kernel(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int) -> Kernel | None:
        from gossamer.ops import Kernel

        offset = "symmetric"
        if self.minimum is not None:
            offset = f"min_{self.minimum}"
        elif self._zero_bytes:
            offset = "zero_u4" if self._zero_bytes == 8 else "zero_u8"
        return Kernel(
            code=f"u{self.number.bits}",
            codes=arrays["codes"],
            high=arrays.get("high"),
            scale=self.scale,
            scales=arrays["scales"],
            offset=offset,
            offsets=arrays.get("zeros", arrays.get("mins")),
            group=self._group(cols),
        )


def default_scale(group: int | None) -> str:
    """f16 for groups, f32 for a whole row."""
    return "f32" if group is None else "f16"


def _divisor(s: F32) -> F32:
    """The scale to divide by; a zero one (an all-zero group) makes every quotient zero."""
    return np.where(s == 0, np.float32(np.inf), s)


def _span(array: npt.NDArray[Any], panel: int, panels: int, per_panel: int) -> npt.NDArray[Any]:
    return array[panel * per_panel : (panel + panels) * per_panel].reshape(panels, per_panel)


def _by_panel(values: npt.NDArray[Any], panels: int, fill: int) -> npt.NDArray[Any]:
    """[n, groups] to [panels, groups * 16], padded rows filled."""
    n, groups = values.shape
    padded = np.full((panels * PANEL, groups), fill, values.dtype)
    padded[:n] = values
    return padded.reshape(panels, PANEL, groups).transpose(0, 2, 1).reshape(panels, groups * PANEL)
