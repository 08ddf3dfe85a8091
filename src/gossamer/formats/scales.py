"""Plain scales: what ``f32``, ``f16``, ``bf16``, ``e8m0`` and ``e4m3`` hold, and how a real number becomes one.

``e8m0`` is a power of two, 2^(byte - 127), byte 255 a NaN; ``e4m3`` is the 8-bit float, without a scale of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.formats import halves
from gossamer.formats.numbers import NUMBERS

__all__ = ["FIELD", "NUMPY", "load", "store", "store_power_of_two"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

# The safetensors type and the numpy type of each.
FIELD = {"f32": "F32", "f16": "F16", "bf16": "BF16", "e8m0": "U8", "e4m3": "U8"}
NUMPY: dict[str, np.dtype[Any]] = {**halves.NUMPY, "e8m0": np.dtype("u1"), "e4m3": np.dtype("u1")}
SMALLEST = {"f32": 2.0**-149, "f16": 2.0**-24, "bf16": 2.0**-133, "e4m3": 2.0**-9}


def load(stored: npt.NDArray[Any], kind: str) -> F32:
    """What stored scales are, in float32, exactly."""
    if kind == "e8m0":
        bits = stored.astype(np.uint32) << 23
        bits[stored == 0] = 1 << 22  # 2^-127 is subnormal
        bits[stored == 255] = 0x7FC00000
        return bits.view(np.float32)
    if kind == "e4m3":
        found: F32 = NUMBERS["e4m3"].values[stored]
        return found
    return halves.to_float(stored, kind)


def store(s: F64, kind: str, short: bool = False) -> npt.NDArray[Any]:
    """Real scales in the storage type of ``kind`` (not e8m0): nearest, ties to even, saturating.

    A scale that is not zero stays so, as the smallest number. ``short``: an f32 scale keeps 16 significant bits, so
    that its products with codes are exact and the range of the values gives the scale back.
    """
    tiny = (s != 0) & (np.abs(s) < SMALLEST[kind])
    s = np.where(tiny, np.copysign(SMALLEST[kind], s), s)
    if kind == "f32" and short:
        mantissa, exponent = np.frexp(s)
        s = np.ldexp(np.rint(mantissa * 65536) / 65536, exponent)
    single = s.astype(np.float32)
    if kind == "e4m3":
        stored: npt.NDArray[Any] = NUMBERS["e4m3"].minifloat.encode(single)
    else:
        stored = halves.from_float(single, kind)
    stored[load(stored, kind) == 0] = 0  # no negative zero
    return stored


def store_power_of_two(s: F64, largest: float, mean: bool) -> npt.NDArray[np.uint8]:
    """e8m0 scales for ideal ones ``s`` = absmax / ``largest`` (or, for ``mean``, a mean of absolute values).

    The rule of OCP MX 1.0: 2^(floor(log2 absmax) - floor(log2 largest)), where values beyond the largest saturate.
    Where the largest code is itself a power of two (NF4, e3m0, int2) that would cut off up to half of the range, so the
    next power of two from absmax / largest is taken; for a mean the nearest one.
    """
    fraction, exponent = np.frexp(largest)
    if mean:
        f, e = np.frexp(s)
        power = np.where(f >= 0.75, e, e - 1)
    elif fraction == 0.5:
        f, e = np.frexp(s.astype(np.float32))
        power = np.where(f == 0.5, e - 1, e)
    else:
        # In float32 the quotient times its divisor is absmax again.
        power = np.frexp((s * largest).astype(np.float32))[1] - int(exponent)
    # The largest value times the scale is below 2^128.
    return np.where(s == 0, 0, np.clip(power + 127, 0, 255 - max(1, int(exponent)))).astype(np.uint8)
