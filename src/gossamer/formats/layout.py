"""The bytes of packed matrices, layout version 1: see docs/formats.md.

Rows lie in panels of 16, columns in blocks of 16 (four quads of four), so that one load holds 16 rows x 4 columns. A
code is cut into fields of 8, 4, 2 and 1 bits, the widest from its low bits; each field is an array of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.formats.node import PANEL, Field

__all__ = [
    "BLOCK", "blocks", "code_fields", "pack_by_row", "pack_codes", "pack_zeros", "pad_rows", "panels", "under",
    "unpack_by_row", "unpack_codes", "unpack_zeros", "zero_bits", "zero_field",
]  # fmt: skip

U8 = npt.NDArray[np.uint8]
Arrays = Mapping[str, npt.NDArray[Any]]

BLOCK = 16  # columns whose codes lie together
WIDTHS = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}


def panels(rows: int) -> int:
    return (rows + PANEL - 1) // PANEL


def blocks(cols: int) -> int:
    return (cols + BLOCK - 1) // BLOCK


def under(arrays: Arrays, prefix: str) -> dict[str, npt.NDArray[Any]]:
    """The arrays whose names start with ``prefix``, without it: those of a format inside another."""
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def _span(array: npt.NDArray[Any], panel: int, count: int, per_panel: int) -> npt.NDArray[Any]:
    return array[panel * per_panel : (panel + count) * per_panel].reshape(count, per_panel)


def pad_rows(values: npt.NDArray[Any], fill: int = 0) -> npt.NDArray[Any]:
    """[n, ...] to a whole number of panels, the new rows filled."""
    n = len(values)
    padded = np.full((panels(n) * PANEL, *values.shape[1:]), fill, values.dtype)
    padded[:n] = values
    return padded


# ------------------------------------------------------------ codes


def code_fields(bits: int, rows: int, cols: int) -> dict[str, Field]:
    count = panels(rows) * blocks(cols)
    return {f"q{w}": Field("U8", count * 32 * w) for w in WIDTHS[bits]}


def pack_codes(codes: U8, bits: int, fill: int, into: Arrays, first_row: int) -> None:
    """Lays out codes [n, cols]; ``fill`` pads rows and columns. ``first_row`` is a multiple of 16."""
    n, cols = codes.shape
    p, count, width = first_row // PANEL, panels(n), blocks(cols)
    padded = np.full((count * PANEL, width * BLOCK), fill, np.uint8)
    padded[:n, :cols] = codes
    grid = padded.reshape(count, PANEL, width, 4, 4).transpose(0, 2, 3, 1, 4)  # panel, block, quad h, row, i
    below = 0
    for w in WIDTHS[bits]:
        field = (grid >> below) & ((1 << w) - 1) if len(WIDTHS[bits]) > 1 else grid
        out = _span(into[f"q{w}"], p, count, width * 32 * w).reshape(count, width, -1)
        if w == 8:
            out[...] = field.reshape(count, width, -1)
        elif w == 4:
            out[...] = (field[:, :, 0::2] | (field[:, :, 1::2] << 4)).reshape(count, width, -1)
        elif w == 2:
            four = field[:, :, 0] | (field[:, :, 1] << 2) | (field[:, :, 2] << 4) | (field[:, :, 3] << 6)
            out[...] = four.reshape(count, width, -1)
        else:
            out[...] = np.packbits(field.reshape(count, width, 4, 64), axis=-1, bitorder="little").reshape(out.shape)
        below += w


def unpack_codes(arrays: Arrays, bits: int, cols: int, p0: int, p1: int) -> U8:
    """The codes of all 16 (p1 - p0) rows of panels p0..p1: uint8 [rows, cols]."""
    count, width = p1 - p0, blocks(cols)
    grid = np.zeros((count, width, 4, PANEL, 4), np.uint8)
    below = 0
    for w in WIDTHS[bits]:
        raw = _span(arrays[f"q{w}"], p0, count, width * 32 * w)
        if w == 8:
            grid |= raw.reshape(grid.shape)
        elif w == 4:
            both = raw.reshape(count, width, 2, PANEL, 4)
            grid[:, :, 0::2] |= (both & 15) << below
            grid[:, :, 1::2] |= (both >> 4) << below
        elif w == 2:
            four = raw.reshape(count, width, PANEL, 4)
            for h in range(4):
                grid[:, :, h] |= ((four >> (2 * h)) & 3) << below
        else:
            flags = np.unpackbits(raw.reshape(count, width, 4, 8), axis=-1, bitorder="little")
            grid |= flags.reshape(grid.shape) << below
        below += w
    codes: U8 = grid.transpose(0, 3, 1, 2, 4).reshape(count * PANEL, width * BLOCK)[:, :cols]
    return codes


# ------------------------------------------------------------ one value per row and group


def pack_by_row(values: npt.NDArray[Any], into: npt.NDArray[Any], first_row: int) -> None:
    """[n, groups] to [panel][group][16 rows], rows past the end zero."""
    groups, count = values.shape[1], panels(len(values))
    by_panel = pad_rows(values).reshape(count, PANEL, groups).transpose(0, 2, 1)
    _span(into, first_row // PANEL, count, groups * PANEL)[...] = by_panel.reshape(count, groups * PANEL)


def unpack_by_row(array: npt.NDArray[Any], groups: int, p0: int, p1: int) -> npt.NDArray[Any]:
    """The inverse for whole panels: [16 (p1 - p0), groups]."""
    flat = _span(array, p0, p1 - p0, groups * PANEL).reshape(p1 - p0, groups, PANEL)
    return flat.transpose(0, 2, 1).reshape((p1 - p0) * PANEL, groups)


def zero_bits(bits: int) -> int:
    """Bits that a stored zero point takes: a nibble or a byte."""
    return 4 if bits <= 4 else 8


def zero_field(bits: int, rows: int, groups: int) -> Field:
    return Field("U8", panels(rows) * groups * PANEL * zero_bits(bits) // 8)


def pack_zeros(zeros: U8, bits: int, into: npt.NDArray[Any], first_row: int) -> None:
    """Zero points [n, groups]: bytes, or nibbles of rows r and r + 8."""
    if zero_bits(bits) == 8:
        pack_by_row(zeros, into, first_row)
        return
    groups, count = zeros.shape[1], panels(len(zeros))
    z = pad_rows(zeros).reshape(count, PANEL, groups).transpose(0, 2, 1)
    nibbles = z[:, :, :8] | (z[:, :, 8:] << 4)
    _span(into, first_row // PANEL, count, groups * 8)[...] = nibbles.reshape(count, groups * 8)


def unpack_zeros(array: npt.NDArray[Any], bits: int, groups: int, p0: int, p1: int) -> U8:
    if zero_bits(bits) == 8:
        return unpack_by_row(array, groups, p0, p1)
    z = _span(array, p0, p1 - p0, groups * 8).reshape(p1 - p0, groups, 8)
    z = np.concatenate([z & 15, z >> 4], axis=2)
    return z.transpose(0, 2, 1).reshape((p1 - p0) * PANEL, groups)
