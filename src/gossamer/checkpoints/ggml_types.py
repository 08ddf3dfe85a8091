"""The tensor types of ggml: their block sizes, how they decode, and which split losslessly.

A ggml tensor is a sequence of blocks, each holding a fixed number of neighbouring elements of one row
(all little-endian). The five simple block types cover 32 elements and are decoded here:

    type   bytes of a block                               element i
    Q4_0   d f16, 16 bytes of nibbles                     d * (q - 8)
    Q4_1   d f16, m f16, 16 bytes of nibbles              d * q + m
    Q5_0   d f16, u32 of fifth bits, 16 bytes of nibbles  d * (q - 16)
    Q5_1   d f16, m f16, u32 of fifth bits, 16 nibbles    d * q + m
    Q8_0   d f16, 32 int8                                 d * q

Low nibbles are elements 0..15 and high nibbles 16..31; bit i of the u32 is the fifth bit of element i.
The super-block types (Q2_K..Q6_K, IQ*, TQ*, MXFP4, NVFP4, Q1_0) are decoded by the `gguf` package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import CheckpointError, UnsupportedError, UsageError

__all__ = ["LOSSLESS", "TYPES", "Blocks", "blocks", "dequantize", "row_bytes"]

TYPES: dict[str, tuple[int, int, int]] = {
    # name: (id in the file, elements of a block, bytes of a block)
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "Q8_K": (15, 256, 292),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "I64": (27, 1, 8),
    "F64": (28, 1, 8),
    "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
    "NVFP4": (40, 64, 36),
    "Q1_0": (41, 128, 18),
}

LOSSLESS: dict[str, str] = {
    # The format expression that holds exactly the values of the type, at the same size.
    "Q4_0": "int4/g32",
    "Q4_1": "uint4/g32-m(f16)",
    "Q5_0": "int5/g32",
    "Q5_1": "uint5/g32-m(f16)",
    "Q8_0": "int8/g32",
}

_PLAIN: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}


@dataclass(frozen=True)
class Blocks:
    """Quantized rows split into codes and scales, without loss.

    number: "int4", "int5", "int8" (value `s * (code - 2^(B-1))`) or "uint4", "uint5" (value `s * code - m`).
    codes: uint8 [rows, cols], unsigned as stored: for intB this is q + 2^(B-1).
    scales: float16 [rows, cols / 32].
    mins: float16 [rows, cols / 32] (minus the file's m), or None for intB.
    """

    number: str
    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    mins: NDArray[np.float16] | None


def row_bytes(type: str, cols: int) -> int:
    """Bytes of one row of `cols` elements.

    UnsupportedError: an unknown type; CheckpointError: cols is not a multiple of the type's block.
    """
    if type not in TYPES:
        raise UnsupportedError(f"the tensor type '{type}' is not known; known are {', '.join(TYPES)}")
    _, elems, nbytes = TYPES[type]
    if cols % elems:
        raise CheckpointError(
            f"rows of {cols} elements cannot be {type}, whose blocks hold {elems} elements; "
            f"the row length must be a multiple of {elems}"
        )
    return cols // elems * nbytes


def blocks(type: str, raw_rows: NDArray[np.uint8]) -> Blocks:
    """Split raw_rows (uint8 [rows, row_bytes]) of a type in LOSSLESS. UsageError: another type or shape."""
    number = LOSSLESS[type].partition("/")[0] if type in LOSSLESS else None
    if number is None:
        raise UsageError(f"{type} does not split losslessly into codes and scales; {', '.join(LOSSLESS)} do")
    if raw_rows.ndim != 2 or raw_rows.shape[1] % TYPES[type][2]:
        raise UsageError(
            f"{type} rows must be uint8 [rows, a multiple of {TYPES[type][2]} bytes], "
            f"not an array of shape {raw_rows.shape}"
        )
    rows = raw_rows.shape[0]
    per_row = raw_rows.shape[1] // TYPES[type][2]
    codes, scale, minimum = _split(type, raw_rows)
    return Blocks(
        number=number,
        codes=codes.reshape(rows, per_row * 32),
        scales=np.ascontiguousarray(scale).reshape(rows, per_row),
        mins=None if minimum is None else np.negative(minimum).reshape(rows, per_row),
    )


def dequantize(type: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The elements of whole blocks: data uint8 [n * block bytes] -> float32 [n * block elements].

    Temporaries are a few times the result. UnsupportedError: a type that cannot be decoded.
    """
    # Damaged scales give infinities and NaN; whether those are acceptable is the caller's question.
    with np.errstate(all="ignore"):
        if type in _PLAIN:
            return data.view(_PLAIN[type]).astype(np.float32)
        if type == "BF16":
            return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        if type in LOSSLESS:
            return _dequantize_simple(type, data)
        return _dequantize_by_gguf(type, data)


def _split(
    type: str, data: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16] | None]:
    """Blocks -> codes uint8 [n, 32] (unsigned), d float16 [n, 1], the file's m float16 [n, 1] or None."""
    block = data.reshape(-1, TYPES[type][2])
    scale = block[:, :2].view("<f2")
    if type == "Q8_0":
        return block[:, 2:] ^ np.uint8(0x80), scale, None  # int8 two's complement -> q + 128
    has_min = type in ("Q4_1", "Q5_1")
    minimum = block[:, 2:4].view("<f2") if has_min else None
    nibbles = block[:, -16:]
    codes = np.empty((len(block), 32), np.uint8)
    np.bitwise_and(nibbles, np.uint8(15), out=codes[:, :16])
    np.right_shift(nibbles, np.uint8(4), out=codes[:, 16:])
    if type in ("Q5_0", "Q5_1"):
        fifth = np.unpackbits(block[:, -20:-16], axis=1, bitorder="little")
        codes |= fifth << np.uint8(4)
    return codes, scale, minimum


def _dequantize_simple(type: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    codes, scale, minimum = _split(type, data)
    values = codes.astype(np.float32)
    if minimum is None:
        values -= np.float32({"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}[type])
    values *= scale.astype(np.float32)
    if minimum is not None:
        values += minimum.astype(np.float32)
    return values.reshape(-1)


def _dequantize_by_gguf(type: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
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
