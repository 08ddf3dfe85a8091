"""Number formats: one table entry each.

A code of B bits is stored unsigned, c in [0, 2^B - 1]. ``Number.values[c]`` is what it means before it is scaled:
    intB      c - 2^(B-1)            B = 2..8
    uintB     c                      B = 2..8; goes with a zero point, a minimum, or neither
    ternary   c - 1                  2 bits, codes 0, 1, 2
    bipolarB  2c - (2^B - 1)         B = 1..8: odd integers, no zero
    eXmY      a minifloat            3 to 8 bits, see minifloat.py
    nf4       a table of quantiles   4 bits
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats.minifloat import Minifloat, normal_float

__all__ = ["FLOATS", "NUMBERS", "SCALES", "Float", "Number", "number"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Float:
    """A plain floating-point number: ``name`` as in safetensors (lower case), ``bytes`` per value."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Number:
    """A number of at most 8 bits.

    ``family``: "int", "uint", "ternary", "bipolar", "minifloat" or "nf". ``signed``: some values are negative.
    ``levels``: codes in use are 0..levels-1. Without a table, value(c) = step * c - zero.
    """

    name: str
    bits: int
    family: str

    @property
    def signed(self) -> bool:
        return self.family != "uint"

    @property
    def levels(self) -> int:
        return 3 if self.family == "ternary" else 1 << self.bits

    @property
    def step(self) -> int:
        return 2 if self.family == "bipolar" else 1

    @property
    def zero(self) -> int:
        return {"int": self.levels // 2, "ternary": 1, "bipolar": self.levels - 1}.get(self.family, 0)

    @property
    def table(self) -> F32 | None:
        """float32 [2^bits] for minifloats and NF4, whose values are no arithmetic sequence; else None."""
        return self.values if self.family in ("minifloat", "nf") else None

    @property
    def values(self) -> F32:
        """float32 [2^bits], read-only: what each code means before it is scaled."""
        return _values(self)

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return float(self.values[: self.levels][np.isfinite(self.values[: self.levels])].max())

    @property
    def zero_code(self) -> int | None:
        """The code that means zero, or None (bipolar)."""
        where = np.flatnonzero(self.values == 0)
        return int(where[0]) if len(where) else None

    @property
    def minifloat(self) -> Minifloat:
        match = re.fullmatch(r"e(\d)m(\d)", self.name)
        assert match is not None  # asked of minifloats alone
        return Minifloat(int(match[1]), int(match[2]))


@cache
def _values(n: Number) -> F32:
    if n.family == "minifloat":
        values = n.minifloat.values()
    elif n.family == "nf":
        values = normal_float()
    else:
        values = (n.step * np.arange(1 << n.bits) - n.zero).astype(np.float32)
    values.flags.writeable = False
    return values


def _all() -> list[Number]:
    found = [Number(f"{family}{b}", b, family) for family in ("int", "uint") for b in range(2, 9)]
    found.append(Number("ternary", 2, "ternary"))
    found += [Number(f"bipolar{b}", b, "bipolar") for b in range(1, 9)]
    found += [Number(f"e{x}m{b - 1 - x}", b, "minifloat") for b in range(3, 9) for x in range(1, b)]
    return [*found, Number("nf4", 4, "nf")]


NUMBERS: dict[str, Number] = {n.name: n for n in _all()}
FLOATS: dict[str, Float] = {f.name: f for f in (Float("f32", 4), Float("f16", 2), Float("bf16", 2))}
SCALES: tuple[str, ...] = (*FLOATS, "e8m0", "e4m3")  # what a scale may be, beside a format of its own


def number(name: str) -> Number:
    """The number of this name; FormatError when there is none."""
    if name not in NUMBERS:
        close = difflib.get_close_matches(name[:60].lower(), NUMBERS, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else "write for example int4, uint4, e2m1 or nf4."
        raise FormatError(f"'{name[:60]}' is not a number format; {hint}")
    return NUMBERS[name]
