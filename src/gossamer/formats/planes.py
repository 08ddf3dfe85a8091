"""The same codes, bit by bit: ``planes(CODED)`` for intB, uintB and bipolarB.

    p{B-1} … p0    U8: bit B-1 (the highest) to bit 0 of the stored codes, each in the layout of a 1-bit code
                   [panel][block of 16 columns][4 quads] 64 bits, bit 4 r + i is column 4 h + i; padding as CODED's
    …              the scales, zeros and mins of CODED, with its names

Nothing changes in what the weight means. The highest k planes alone are a weight of k bits, see ``Planes.top``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats import layout, scales
from gossamer.formats.coded import Coded
from gossamer.formats.composite import F32, Arrays, Branch, Composite, Hints, padded
from gossamer.formats.node import PANEL, ArraySource, Field, allocate, encode
from gossamer.formats.numbers import NUMBERS

__all__ = ["Planes"]

FAMILIES = ("int", "uint", "bipolar")
STEP = 32  # panels repacked at once


@dataclass(frozen=True)
class Planes(Composite):
    """Integer codes whose bits lie apart."""

    inner: Coded

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Coded) or self.inner.number.family not in FAMILIES:
            raise FormatError(
                f"planes({self.inner}) cannot be: planes are the bits of int, uint or bipolar codes with a group, "
                "such as planes(int4/g64)."
            )
        super().__post_init__()

    def __str__(self) -> str:
        return f"planes({self.inner})"

    @property
    def bits(self) -> int:
        return self.inner.number.bits

    @property
    def parts(self) -> tuple[tuple[str, Branch], ...]:
        return (("0", self.inner),)

    def children(self, rows: int, cols: int) -> list[tuple[str, Branch, int, int]]:
        return []  # the codes lie in arrays of this node's own

    def check_shape(self, rows: int, cols: int) -> None:
        self.inner.check(rows, cols)

    def _names(self) -> list[str]:
        return [f"p{b}" for b in range(self.bits - 1, -1, -1)]

    def own_fields(self, rows: int, cols: int) -> dict[str, Field]:
        plane = layout.code_fields(1, rows, cols)["q1"]
        codes = layout.code_fields(self.bits, rows, cols)
        rest = {name: field for name, field in self.inner.fields(rows, cols).items() if name not in codes}
        return {**dict.fromkeys(self._names(), plane), **rest}

    def encode_matrix(self, w: F32, hints: Hints) -> dict[str, npt.NDArray[Any]]:
        return self.split(encode(self.inner, ArraySource(w)).arrays, *w.shape)

    def split(self, inner: Arrays, rows: int, cols: int) -> dict[str, npt.NDArray[Any]]:
        """The arrays of this format from those of the inner one: the inverse of ``merge``."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        plane = layout.code_fields(1, rows, cols)["q1"]
        for name in self._names():
            arrays[name] = np.zeros(plane.length, np.uint8)
        fill = self.inner.number.zero_code or 0
        for p in range(0, layout.panels(rows), STEP):
            stop = min(layout.panels(rows), p + STEP)
            n = min(rows, stop * PANEL) - p * PANEL
            codes = layout.unpack_codes(inner, self.bits, cols, p, stop)[:n]
            for b in range(self.bits):
                bit = (codes >> np.uint8(b)) & np.uint8(1)
                layout.pack_codes(bit, 1, (fill >> b) & 1, {"q1": arrays[f"p{b}"]}, p * PANEL)
        fields = layout.code_fields(self.bits, rows, cols)
        return {**arrays, **{name: a for name, a in inner.items() if name not in fields}}

    def _codes(self, arrays: Arrays, cols: int, p0: int, p1: int, k: int) -> npt.NDArray[np.uint8]:
        """The codes of panels p0..p1 from their highest k bits: uint8 [16 (p1 - p0), cols]."""
        codes = np.zeros(((p1 - p0) * PANEL, cols), np.uint8)
        for name in self._names()[:k]:
            codes = (codes << np.uint8(1)) | layout.unpack_codes({"q1": arrays[name]}, 1, cols, p0, p1)
        return codes

    def _packed(self, arrays: Arrays, rows: int, cols: int, p0: int, p1: int, k: int) -> dict[str, npt.NDArray[Any]]:
        """The code arrays of a k-bit matrix of this shape, filled in for the panels p0..p1 alone."""
        packed = {name: np.zeros(f.length, f.numpy) for name, f in layout.code_fields(k, rows, cols).items()}
        fill = (self.inner.number.zero_code or 0) >> (self.bits - k)
        for p in range(p0, p1, STEP):
            stop = min(p1, p + STEP)
            n = min(rows, stop * PANEL) - p * PANEL
            layout.pack_codes(self._codes(arrays, cols, p, stop, k)[:n], k, fill, packed, p * PANEL)
        return packed

    def merge(self, arrays: Arrays, rows: int, cols: int) -> dict[str, npt.NDArray[Any]]:
        """The arrays of the inner format: the same codes with their bits together."""
        packed = self._packed(arrays, rows, cols, 0, layout.panels(rows), self.bits)
        return {**{n: a for n, a in arrays.items() if n not in self._names()}, **packed}

    def decode_rows(self, arrays: Arrays, rows: int, cols: int, r0: int, r1: int) -> F32:
        packed = self._packed(arrays, rows, cols, r0 // PANEL, layout.panels(r1), self.bits)
        return self.inner.decode_rows({**arrays, **packed}, rows, cols, r0, r1)

    def top(self, k: int, arrays: Arrays, rows: int, cols: int) -> tuple[Coded, dict[str, npt.NDArray[Any]]]:
        """The weight of k bits in the highest k planes, and its arrays; lower planes need not be there.

        With c the stored code and d = B - k the bits left out, the scale times 2^d stands beside the code c >> d:
            intB              s 2^d ((c >> d) - 2^(k-1))
            uintB, zero z     s 2^d ((c >> d) - (z >> d)): what was exactly zero stays so
            uintB, minimum m  s 2^d (c >> d) - m
            bipolarB          s 2^d (2 (c >> d) - (2^k - 1)): the middle of what the missing bits leave open
        intB and uintB are cut, so their values fall by half of 2^d - 1 steps on average. The scales become float32
        (times a power of two, so exactly). k is 1 to B for bipolarB, else 2 to B.
        """
        inner, number = self.inner, self.inner.number
        least = 1 if number.family == "bipolar" else 2
        if not least <= k <= self.bits:
            raise FormatError(f"{self} has the highest {least} to {self.bits} planes to read, not {k}.")
        low = self.bits - k
        zero = bool(inner.zero)
        coded = Coded(NUMBERS[f"{number.family}{k}"], inner.group, "f32", zero, inner.minimum)
        found = allocate(coded, rows, cols)
        found.update(self._packed(arrays, rows, cols, 0, layout.panels(rows), k))
        found["scales"] = self._scales(arrays, rows, cols, np.float32(1 << low))
        if zero:
            groups, panels = inner.groups(cols), layout.panels(rows)
            zeros = layout.unpack_zeros(arrays["zeros"], self.bits, groups, 0, panels) >> np.uint8(low)
            layout.pack_zeros(zeros, k, found["zeros"], 0)
        found.update({name: a for name, a in arrays.items() if name.partition(".")[0] == "mins"})
        return coded, found

    def _scales(self, arrays: Arrays, rows: int, cols: int, factor: np.float32) -> npt.NDArray[Any]:
        """The scales times ``factor`` as an array of float32 in the same order."""
        inner = self.inner
        tiles, groups = inner.matrix(rows, cols)
        count = groups * (tiles if inner.group.shared else layout.panels(rows) * PANEL)
        if isinstance(inner.scale, Coded):
            found = inner.scale.decode_rows(layout.under(arrays, "scales."), tiles, groups, 0, tiles)
            flat = np.zeros(count, np.float32)
            if inner.group.shared:
                flat[:] = found.ravel()
            else:
                layout.pack_by_row(found, flat, 0)
        else:
            flat = scales.load(arrays["scales"][:count], str(inner.scale))
        return padded((flat * factor).astype("<f4"))
