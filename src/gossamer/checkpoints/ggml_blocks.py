"""The blocks of ggml tensors, taken apart: codes, scales and minima as stored, and float32 values.

A ggml tensor is a sequence of blocks, each holding a fixed number of neighbouring elements of one row (all
little-endian). The simple types cover 32 elements:

    type   bytes of a block                               element i
    Q4_0   d f16, 16 bytes of nibbles                     d * (q - 8)
    Q4_1   d f16, m f16, 16 bytes of nibbles              d * q + m
    Q5_0   d f16, u32 of fifth bits, 16 bytes of nibbles  d * (q - 16)
    Q5_1   d f16, m f16, u32 of fifth bits, 16 nibbles    d * q + m
    Q8_0   d f16, 32 int8                                 d * q
    MXFP4  e, 16 bytes of nibbles                         2^(e - 127) * e2m1(q)

Low nibbles are elements 0..15 and high nibbles 16..31; bit i of the u32 is the fifth bit of element i. NVFP4 has four
groups of 16 elements: their four scales (e4m3 without a sign, S.1111.111 standing for 0), then 8 bytes for each, the
low nibbles first.

The K-types cover 256 elements in groups of 16 (Q2_K, Q3_K, Q6_K) or 32, with scales s and minima t that are codes too:

    Q2_K   4 bits s, 4 bits t; 64 bytes of 2-bit q; d, e f16              (d * s) * q - (e * t)
    Q3_K   32 bytes of third bits; 64 bytes of 2 bits; 12 bytes s; d f16  (d * (s - 32)) * (q - 4)
    Q4_K   d, e f16; 12 bytes s and t; 128 bytes of nibbles               (d * s) * q - (e * t)
    Q5_K   d, e f16; 12 bytes s and t; 32 bytes of fifth bits; nibbles    (d * s) * q - (e * t)
    Q6_K   128 bytes of nibbles; 64 bytes of 2 bits; 16 int8 s; d f16     (d * s) * (q - 32)

Bits of one byte belong to elements a fixed distance apart: a run of 32 bytes (Q6_K's nibbles: 64) holds the lowest
fields of 32 neighbours, then the next fields of the following 32, and so on. The other types (IQ*, TQ*, Q1_0) are
decoded by the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.checkpoints.ggml_types import LOSSLESS, TYPES
from gossamer.errors import FormatError, UnsupportedError, UsageError
from gossamer.formats.coded import Parts

__all__ = ["dequantize", "parts"]

U8 = NDArray[np.uint8]

_PLAIN: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_MIDDLE = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}  # what is subtracted from a code


def parts(type: str, raw_rows: U8) -> Parts:
    """Rows of a type in LOSSLESS, uint8 [rows, row_bytes], as the codes and scales of its format.

    No value is computed, so none can change. A minimum of Q4_1 or Q5_1 changes its sign, a negative zero of MXFP4 or
    NVFP4 loses it. UsageError: another type or shape; FormatError: a scale that is no finite number.
    """
    if type not in LOSSLESS:
        raise UsageError(f"{type} does not split losslessly into codes and scales; {', '.join(LOSSLESS)} do")
    nbytes = TYPES[type][2]
    if raw_rows.ndim != 2 or raw_rows.shape[1] % nbytes:
        raise UsageError(
            f"{type} rows must be uint8 [rows, a multiple of {nbytes} bytes], not an array of shape {raw_rows.shape}"
        )
    rows = len(raw_rows)
    block = np.ascontiguousarray(raw_rows).reshape(-1, nbytes)

    def by_row(x: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(x).reshape(rows, x.size // rows if rows else 0)

    if type in _K_TYPES:
        codes, scales, minima, d, e = _K_TYPES[type](block)
        _refuse_infinite(d, e)
        nested = Parts(by_row(scales), by_row(d))
        mins = None if minima is None or e is None else Parts(by_row(minima), by_row(e))
        return Parts(by_row(codes), nested, None, mins)
    if type in ("MXFP4", "NVFP4"):
        codes, scales = _mxfp4(block) if type == "MXFP4" else _nvfp4(block)
        return Parts(by_row(codes), by_row(scales))
    codes, d, m = _simple(type, block)
    _refuse_infinite(d, m)
    return Parts(by_row(codes), by_row(d), None, None if m is None else by_row(np.negative(m)))


def dequantize(type: str, data: U8) -> NDArray[np.float32]:
    """The elements of whole blocks: data uint8 [n * block bytes] -> float32 [n * block elements].

    Temporaries are a few times the result. UnsupportedError: a type that cannot be decoded.
    """
    # Damaged scales give infinities and NaN; whether those are acceptable is the caller's question.
    with np.errstate(all="ignore"):
        if type in _PLAIN:
            return data.view(_PLAIN[type]).astype(np.float32)
        if type == "BF16":
            return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        if type in _SIMPLE:
            return _dequantize_simple(type, data)
        return _dequantize_by_gguf(type, data)


def _refuse_infinite(*scales: NDArray[Any] | None) -> None:
    if not all(np.isfinite(s).all() for s in scales if s is not None):
        raise FormatError("it holds a NaN or an infinity among its scales")


# ------------------------------------------------------------ blocks of 32

_SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def _simple(type: str, block: U8) -> tuple[U8, NDArray[np.float16], NDArray[np.float16] | None]:
    """Blocks [n, bytes] -> codes uint8 [n, 32] (unsigned), d float16 [n, 1], the file's m float16 [n, 1] or None."""
    scale = block[:, :2].view("<f2")
    if type == "Q8_0":
        return block[:, 2:] ^ np.uint8(0x80), scale, None  # int8 two's complement -> q + 128
    minimum = block[:, 2:4].view("<f2") if type in ("Q4_1", "Q5_1") else None
    codes = _runs(block[:, -16:], 16, 15, 0, 4)
    if type in ("Q5_0", "Q5_1"):
        codes |= np.unpackbits(block[:, -20:-16], axis=1, bitorder="little") << np.uint8(4)
    return codes, scale, minimum


def _mxfp4(block: U8) -> tuple[U8, U8]:
    scales = block[:, :1]
    if scales.size and scales.max() > 252:  # 6 * 2^126 is beyond float32, and 255 is NaN
        raise FormatError("it holds a NaN or an infinity among its scales")
    return _unsigned_zero(_runs(block[:, 1:], 16, 15, 0, 4)), scales


def _nvfp4(block: U8) -> tuple[U8, U8]:
    scales = block[:, :4]
    if scales.size and scales.max() > 127:
        raise FormatError("it holds a scale with a sign, which the type does not have")
    codes = _runs(block[:, 4:], 8, 15, 0, 4)
    return _unsigned_zero(codes), np.where(scales == 127, np.uint8(0), scales)


def _unsigned_zero(codes: U8) -> U8:
    codes[codes == 8] = 0
    return codes


def _runs(x: U8, width: int, mask: int, *shifts: int) -> U8:
    """Fields of bytes [n, runs * width]: each run shifted by every amount, then the next: [n, runs * shifts * width]"""
    n = len(x)
    run = np.ascontiguousarray(x).reshape(n, -1, width)
    out = np.empty((n, run.shape[1], len(shifts), width), np.uint8)
    for i, shift in enumerate(shifts):
        np.right_shift(run, np.uint8(shift), out=out[:, :, i])
    out &= np.uint8(mask)
    return out.reshape(n, -1)


def _dequantize_simple(type: str, data: U8) -> NDArray[np.float32]:
    codes, scale, minimum = _simple(type, data.reshape(-1, TYPES[type][2]))
    values = codes.astype(np.float32)
    if minimum is None:
        values -= np.float32(_MIDDLE[type])
    values *= scale.astype(np.float32)
    if minimum is not None:
        values += minimum.astype(np.float32)
    return values.reshape(-1)


# ------------------------------------------------------------ blocks of 256

# Codes [n, 256], codes of scales, codes of minima or None, d and e float16 [n, 1].
_Split = tuple[U8, U8, U8 | None, NDArray[np.float16], NDArray[np.float16] | None]


def _half(block: U8, at: int) -> NDArray[np.float16]:
    return block[:, at : at + 2].view("<f2")


def _q2_k(block: U8) -> _Split:
    both = block[:, :16]
    scales, minima = both & np.uint8(15), both >> np.uint8(4)
    return _runs(block[:, 16:80], 32, 3, 0, 2, 4, 6), scales, minima, _half(block, 80), _half(block, 82)


def _q3_k(block: U8) -> _Split:
    codes = _runs(block[:, 32:96], 32, 3, 0, 2, 4, 6)
    codes |= _runs(block[:, :32], 32, 1, *range(8)) << np.uint8(2)
    packed = block[:, 96:108]  # 8 bytes of low nibbles, then 4 of the two high bits
    scales = _runs(packed[:, :8], 8, 15, 0, 4) | _runs(packed[:, 8:], 4, 3, 0, 2, 4, 6) << np.uint8(4)
    return codes, scales, None, _half(block, 108), None


def _q4_k(block: U8) -> _Split:
    return (_runs(block[:, 16:], 32, 15, 0, 4), *_six_bits(block))


def _q5_k(block: U8) -> _Split:
    codes = _runs(block[:, 48:], 32, 15, 0, 4)
    codes |= _runs(block[:, 16:48], 32, 1, *range(8)) << np.uint8(4)
    return (codes, *_six_bits(block))


def _six_bits(block: U8) -> tuple[U8, U8, NDArray[np.float16], NDArray[np.float16]]:
    """Eight scales and eight minima of 6 bits in 12 bytes: the first four whole, the top bits of the others in them."""
    both = np.empty((2, len(block), 8), np.uint8)
    low = block[:, 12:16]
    for x, four, nibbles in zip(both, (block[:, 4:8], block[:, 8:12]), (low & 15, low >> 4)):
        np.bitwise_and(four, np.uint8(63), out=x[:, :4])
        np.bitwise_or(four >> 2 & 48, nibbles, out=x[:, 4:])
    return both[0], both[1], _half(block, 0), _half(block, 2)


def _q6_k(block: U8) -> _Split:
    codes = _runs(block[:, :128], 64, 15, 0, 4)
    codes |= _runs(block[:, 128:192], 32, 3, 0, 2, 4, 6) << np.uint8(4)
    return codes, block[:, 192:208] ^ np.uint8(128), None, _half(block, 208), None


_K_TYPES: dict[str, Callable[[U8], _Split]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


# ------------------------------------------------------------ the rest


def _dequantize_by_gguf(type: str, data: U8) -> NDArray[np.float32]:
    from gguf import GGMLQuantizationType, quants

    refusal = f"{type} is a type that the installed gguf package cannot decode; use a file with another type"
    if type not in GGMLQuantizationType.__members__:
        raise UnsupportedError(refusal)
    try:
        # One long row: the package works on groups of rows, and small groups are slow.
        values = quants.dequantize(data.reshape(1, -1), GGMLQuantizationType[type])
    except NotImplementedError:
        raise UnsupportedError(refusal) from None
    return np.asarray(values, dtype=np.float32).reshape(-1)
