"""Small floating-point numbers eXmY: a sign, X exponent bits, Y mantissa bits; and the NF4 table.

Bias 2^(X-1) - 1 (1 for X = 1). With E = 0 the value is 2^(1-bias) * M/2^Y, else 2^(E-bias) * (1 + M/2^Y). All codes
are numbers, except in the two 8-bit formats that others define: ``e4m3`` is the "fn" variant of OCP (S.1111.111 is
NaN, the largest number 448), ``e5m2`` is IEEE-like (E = 31 is infinity and NaN, the largest number 57344).
Sources: OCP Microscaling Formats 1.0; OCP 8-bit Floating Point 1.0; Dettmers et al. 2023 (NF4), appendix E.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

__all__ = ["Minifloat", "normal_float"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Minifloat:
    """``exponent`` >= 1 and ``mantissa`` >= 0 bits beside the sign, at most 8 in all."""

    exponent: int
    mantissa: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return max(1, (1 << (self.exponent - 1)) - 1)

    @property
    def largest(self) -> int:
        """The positive code of the largest number."""
        code = (1 << (self.bits - 1)) - 1
        return {(4, 3): code - 1, (5, 2): code - (1 << self.mantissa)}.get((self.exponent, self.mantissa), code)

    def values(self) -> F32:
        """float32 [2^bits]: what each code means."""
        code = np.arange(1 << (self.bits - 1))
        e, m = code >> self.mantissa, code & ((1 << self.mantissa) - 1)
        whole = np.where(e == 0, m, m + (1 << self.mantissa)).astype(np.float64)
        positive = np.ldexp(whole, np.maximum(e, 1) - self.bias - self.mantissa).astype(np.float32)
        positive[self.largest + 1 :] = np.nan
        if (self.exponent, self.mantissa) == (5, 2):
            positive[self.largest + 1] = np.inf
        return np.concatenate([positive, -positive])

    def encode(self, x: F32) -> U8:
        """The code of the nearest number for each finite x or infinity: ties to the even multiple of the step between
        neighbours (the even mantissa), too large ones to the largest number, never a negative zero."""
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        exponent = ((bits >> 23) & 255).astype(np.int32)  # biased by 127; a float32 subnormal is far below any step
        np.clip(exponent, 128 - self.bias, 127 + (1 << self.exponent) - 1 - self.bias, out=exponent)
        # |x| in steps of its binade: a power of two is multiplied, so exactly
        step = ((254 + self.mantissa - exponent) << 23).astype(np.uint32).view(np.float32)
        with np.errstate(over="ignore"):  # an infinity saturates like others
            steps = np.abs(x) * step
        np.rint(steps, out=steps)
        exponent -= 128 - self.bias
        exponent <<= self.mantissa
        # Saturation; the bound keeps the sum in an integer.
        index = np.minimum(np.minimum(steps, 512).astype(np.int32) + exponent, self.largest)
        sign = np.where(index > 0, bits >> 31, 0).astype(np.uint8)
        codes: U8 = index.astype(np.uint8) | (sign << np.uint8(self.bits - 1))
        return codes


@cache
def _normal_float() -> tuple[float, ...]:
    offset, inverse = 0.9677083, NormalDist().inv_cdf
    positive = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    return tuple(v / positive[0] for v in sorted([*negative, 0.0, *positive]))


def normal_float() -> F32:
    """float32 [16], ascending from -1 to 1: the quantiles of a normal distribution that NF4 stores, zero among them."""
    return np.array(_normal_float(), np.float32)
