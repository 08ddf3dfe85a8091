"""Codes and scales put into ggml blocks: the inverse of ``ggml_blocks.parts``, bit for bit.

The layout of every type is described there. What cannot come back is what ``parts`` drops: the sign of a negative zero
in MXFP4 and NVFP4, and the second spelling of a zero scale in NVFP4.

Small integers times f16 scales over groups of a multiple of 32 columns are also values of Q4_0, Q5_0 or Q8_0 (with f16
minima: Q4_1, Q5_1), every block of 32 repeating the scale of its group: more bytes, the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.checkpoints.ggml_types import LOSSLESS, TYPES
from gossamer.errors import FormatError, UsageError
from gossamer.formats import Coded, Dense, Format, parse_weight
from gossamer.formats.coded import Parts

__all__ = ["as_type", "blocks", "type_of"]

U8 = NDArray[np.uint8]


def type_of(fmt: Format) -> str | None:
    """The ggml type that holds what this format holds, value for value; None where there is none."""
    if isinstance(fmt, Dense):
        return fmt.number.upper()
    if not isinstance(fmt, Coded):
        return None
    return _by_format().get(fmt) or _wider(fmt)


# Integers from .. to, without and with minima.
_WIDER = (("Q4_0", -8, 7, False), ("Q5_0", -16, 15, False), ("Q8_0", -128, 127, False), ("Q4_1", 0, 15, True),
          ("Q5_1", 0, 31, True))  # fmt: skip


def _wider(fmt: Coded) -> str | None:
    """The simple type of 32 elements that holds the values of a format with larger groups or fewer bits."""
    group = fmt.group
    plain = fmt.scale == "f16" and fmt.minimum in (None, "f16") and not fmt.zero and fmt.number.table is None
    if not plain or group.rows != 1 or (group.cols is not None and group.cols % 32):
        return None
    values = fmt.number.values[: fmt.number.levels]
    for name, low, high, minimum in _WIDER:
        if minimum == (fmt.minimum is not None) and low <= values.min() and values.max() <= high:
            return name
    return None


def as_type(fmt: Coded, type: str, parts: Parts) -> Parts:
    """Some rows of a format as those of the format of ``type_of(fmt)``."""
    if _by_format().get(fmt) == type:
        return parts
    low = next(low for name, low, _, _ in _WIDER if name == type)
    codes = (fmt.number.values - np.float32(low)).astype(np.uint8)[parts.codes]
    cols = parts.codes.shape[1]
    of = np.arange(cols // 32) * 32 // fmt.width(cols)  # the group of each block

    def spread(stored: Any) -> Any:
        return None if stored is None else np.asarray(stored)[:, of]

    return Parts(codes, spread(parts.scales), None, spread(parts.mins))


@cache
def _by_format() -> dict[Format, str]:
    return {parse_weight(expression): name for name, expression in LOSSLESS.items()}


def blocks(type: str, parts: Parts) -> U8:
    """Rows of a type in LOSSLESS: codes uint8 [rows, cols] with their scales -> uint8 [rows, row_bytes].

    UsageError: another type, or columns that are no whole blocks; FormatError: a scale that the type cannot hold.
    """
    if type not in LOSSLESS:
        raise UsageError(f"{type} blocks are not made of codes and scales; {', '.join(LOSSLESS)} are")
    _, elems, nbytes = TYPES[type]
    rows, cols = parts.codes.shape
    if cols % elems:
        raise UsageError(f"{type} has blocks of {elems} elements, which do not divide rows of {cols}")
    out = np.zeros((rows * (cols // elems), nbytes), np.uint8)
    codes = np.ascontiguousarray(parts.codes).reshape(-1, elems)
    if type in _K_TYPES:
        assert isinstance(parts.scales, Parts)
        both = (p for p in (parts.scales, parts.mins) if isinstance(p, Parts))
        nested = [(p.codes.reshape(len(out), -1), _half(p.scales)) for p in both]
        _K_TYPES[type](out, codes, nested)
    elif type == "MXFP4":
        out[:, :1] = np.asarray(parts.scales).reshape(-1, 1)
        out[:, 1:] = _join(codes, 16, 0, 4)
    elif type == "NVFP4":
        scales = np.asarray(parts.scales)
        if scales.size and scales.max() > 126:
            raise FormatError("NVFP4 has no negative scales and no NaN among them")
        out[:, :4] = scales.reshape(-1, 4)
        out[:, 4:] = _join(codes, 8, 0, 4)
    else:
        _simple(type, out, codes, parts)
    return out.reshape(rows, -1)


def _half(stored: Any) -> U8:
    """float16 values, one a block, as bytes [blocks, 2]."""
    return np.ascontiguousarray(stored, "<f2").reshape(-1, 1).view(np.uint8)


def _join(codes: U8, width: int, *shifts: int) -> U8:
    """Fields into bytes, [n, runs * shifts * width] -> [n, runs * width]: runs of ``width`` bytes, see ggml_blocks."""
    n = len(codes)
    grid = codes.reshape(n, -1, len(shifts), width)
    out = np.zeros((n, grid.shape[1], width), np.uint8)
    for i, shift in enumerate(shifts):
        out |= grid[:, :, i] << np.uint8(shift)
    return out.reshape(n, -1)


def _simple(type: str, out: U8, codes: U8, parts: Parts) -> None:
    out[:, :2] = _half(parts.scales)
    if type == "Q8_0":
        out[:, 2:] = codes ^ np.uint8(0x80)
        return
    if parts.mins is not None:  # subtracted here, added there
        out[:, 2:4] = _half(np.negative(np.asarray(parts.mins)))
    out[:, -16:] = _join(codes & np.uint8(15), 16, 0, 4)
    if type in ("Q5_0", "Q5_1"):
        out[:, -20:-16] = np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")


# ------------------------------------------------------------ blocks of 256

# Codes of the scales, and of the minima where there are some, each with its float16 as bytes.
_Nested = list[tuple[U8, U8]]


def _q2_k(out: U8, codes: U8, nested: _Nested) -> None:
    (scales, d), (minima, e) = nested
    out[:, :16] = scales | minima << np.uint8(4)
    out[:, 16:80] = _join(codes, 32, 0, 2, 4, 6)
    out[:, 80:82], out[:, 82:] = d, e


def _q3_k(out: U8, codes: U8, nested: _Nested) -> None:
    ((scales, d),) = nested
    out[:, :32] = _join(codes >> np.uint8(2), 32, *range(8))
    out[:, 32:96] = _join(codes & np.uint8(3), 32, 0, 2, 4, 6)
    out[:, 96:104] = _join(scales & np.uint8(15), 8, 0, 4)
    out[:, 104:108] = _join(scales >> np.uint8(4), 4, 0, 2, 4, 6)
    out[:, 108:] = d


def _q4_k(out: U8, codes: U8, nested: _Nested) -> None:
    _six_bits(out, nested)
    out[:, 16:] = _join(codes, 32, 0, 4)


def _q5_k(out: U8, codes: U8, nested: _Nested) -> None:
    _six_bits(out, nested)
    out[:, 16:48] = _join(codes >> np.uint8(4), 32, *range(8))
    out[:, 48:] = _join(codes & np.uint8(15), 32, 0, 4)


def _six_bits(out: U8, nested: _Nested) -> None:
    (s, d), (t, e) = nested
    out[:, 0:2], out[:, 2:4] = d, e
    for x, at in ((s, 4), (t, 8)):
        out[:, at : at + 4] = x[:, :4] | x[:, 4:] >> np.uint8(4) << np.uint8(6)
    out[:, 12:16] = s[:, 4:] & np.uint8(15) | t[:, 4:] << np.uint8(4)


def _q6_k(out: U8, codes: U8, nested: _Nested) -> None:
    ((scales, d),) = nested
    out[:, :128] = _join(codes & np.uint8(15), 64, 0, 4)
    out[:, 128:192] = _join(codes >> np.uint8(4), 32, 0, 2, 4, 6)
    out[:, 192:208] = scales ^ np.uint8(128)
    out[:, 208:] = d


_K_TYPES: dict[str, Callable[[U8, U8, _Nested], None]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
