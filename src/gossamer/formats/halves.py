"""bfloat16 as numpy sees it: uint16 bits. Rounding is to nearest, ties to even; NaN stays NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NUMPY", "from_float", "next_up", "to_float"]

F32 = npt.NDArray[np.float32]

# The numpy type that holds each float format in memory and in files.
NUMPY: dict[str, np.dtype[Any]] = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype("<u2")}


# The largest finite number of each.
LARGEST = {"f32": np.finfo(np.float32).max, "f16": np.float32(65504.0), "bf16": np.float32(2.0**128 - 2.0**120)}


def from_float(x: F32, name: str) -> npt.NDArray[Any]:
    """float32 to the storage type of ``name`` ("f32", "f16" or "bf16"); finite values too large for it saturate."""
    if name == "f32":
        return x.astype("<f4")
    x = np.where(np.isfinite(x), np.clip(x, -LARGEST[name], LARGEST[name]), x)
    if name == "f16":
        return x.astype("<f2")
    bits = np.ascontiguousarray(x, dtype="<f4").view("<u4")
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16).astype("<u2") | 0x40, rounded).astype("<u2")


def next_up(x: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """The next larger number of the storage type of ``name``, for each finite x; the largest one stays."""
    bits = x.view("<u4" if name == "f32" else "<u2")
    # Sign and magnitude: away from zero above it, towards zero below it, and from either zero to the smallest.
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    up = np.where(bits < sign, bits + 1, np.where(bits == sign, 1, bits - 1))
    up = np.where(to_float(x, name) == LARGEST[name], bits, up)
    result: npt.NDArray[Any] = up.astype(bits.dtype).view(x.dtype)
    return result


def to_float(x: npt.NDArray[Any], name: str) -> F32:
    """The storage type of ``name`` to float32, exactly."""
    if name == "bf16":
        return (x.astype("<u4") << 16).view("<f4")
    with np.errstate(invalid="ignore"):  # a signaling NaN of a damaged file is a NaN like others
        return x.astype("<f4")
