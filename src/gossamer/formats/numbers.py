"""Number formats: one table entry each.

An integer code of B bits is stored unsigned. ``intB`` holds q in [-2^(B-1), 2^(B-1)-1] as q + 2^(B-1);
``uintB`` holds q in [0, 2^B-1] as it is and needs a zero point or a minimum beside its scale.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FLOATS", "INTEGERS", "Float", "Integer"]


@dataclass(frozen=True)
class Float:
    """A plain floating-point number: ``name`` as in safetensors (lower case), ``bytes`` per value."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Integer:
    """An integer code: ``bits`` wide, ``signed`` around zero or unsigned with an offset."""

    name: str
    bits: int
    signed: bool

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def zero(self) -> int:
        """The stored code that stands for 0 in a signed format; 0 for an unsigned one."""
        return self.levels // 2 if self.signed else 0


FLOATS = {f.name: f for f in (Float("f32", 4), Float("f16", 2), Float("bf16", 2))}
INTEGERS = {
    i.name: i
    for i in (
        Integer("int8", 8, True),
        Integer("int5", 5, True),
        Integer("int4", 4, True),
        Integer("uint8", 8, False),
        Integer("uint5", 5, False),
        Integer("uint4", 4, False),
    )
}
