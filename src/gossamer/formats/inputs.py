"""Input formats: what a site's input is rounded to before it is multiplied.

    f32 | bf16 | NUMBER/GROUP[-o(THRESHOLD)]      NUMBER: int8 int4 uint8 uint4 e4m3; GROUP: token, gN, static(SCALE)

All in float32. A group is a token (a row of x), N columns of one (the last may be shorter), or a token with the given
scale. With x the elements of one group,
    int8, int4     s = max|x| / T, T = 127 or 7       q = clamp(rint(x / s), -T, T)              value s * q
    uint8, uint4   s = (hi - lo) / T, T = 255 or 15   z = clamp(rint(-lo / s), 0, T)
                   lo = min(0, x), hi = max(0, x)     q = clamp(rint(x / s) + z, 0, T)           value s * (q - z)
    e4m3           s = max|x| / 448                   q = x / s to the nearest e4m3, ties to even, cut at 448; s * q
where rint rounds ties to even. static(F) puts F in place of s, whatever x is. A group whose s is 0 (all zero, or so
small that s underflows) has q = 0 and z = 0. A group with a NaN or an infinity, or whose hi - lo is beyond float32,
has s = NaN, which makes every value NaN.

-o(THRESHOLD): elements with |x| >= THRESHOLD, infinities among them, are taken out: their place counts as zero, and
they are multiplied in float32, unrounded, with their decoded weight column and added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats.numbers import NUMBERS

__all__ = ["DEFAULT_INPUT", "InputFormat", "Quantized", "number_text"]

F32 = npt.NDArray[np.float32]

PLAIN = ("f32", "bf16")
TOPS = {"int8": 127, "int4": 7, "uint8": 255, "uint4": 15, "e4m3": 448}  # the largest code
E4M3 = NUMBERS["e4m3"]
GROUP_STEP, MAX_GROUP = 16, 1 << 20  # columns
SMALLEST, LARGEST = float(np.finfo(np.float32).smallest_normal), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Quantized:
    """What a quantized input is made of: the reference of the kernels.

    ``codes`` [tokens, cols]: int8 for int8 and int4, uint8 for uint8 and uint4, and the e4m3 byte for e4m3.
    ``scales`` float32 [tokens, groups]; ``zeros`` uint8 [tokens, groups] of the unsigned ones, else None.
    ``outliers`` float32 [tokens, cols]: the elements taken out, zero elsewhere; None without a threshold.
    """

    codes: npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    scales: F32
    zeros: npt.NDArray[np.uint8] | None
    outliers: F32 | None


@dataclass(frozen=True)
class InputFormat:
    """``number`` f32, bf16, int8, int4, uint8, uint4 or e4m3. ``group``: "token", columns a group (int), or the scale
    itself (float). ``outlier``: elements at least this large stay in float32; None keeps none apart."""

    number: str
    group: str | int | float = "token"
    outlier: float | None = None

    def __post_init__(self) -> None:
        if self.number in PLAIN:
            if self.group != "token" or self.outlier is not None:
                raise FormatError(f"input '{self.number}' takes no group and no outliers; write '@ {self.number}'.")
            return
        if self.number not in TOPS:
            known = ", ".join((*PLAIN, *TOPS))
            raise FormatError(f"'{self.number}' is no input number; inputs are made of {known}.")
        group = self.group
        if isinstance(group, bool) or (isinstance(group, str) and group != "token"):
            raise FormatError(f"input group '{group}' is not known; groups are token, gN and static(SCALE).")
        if isinstance(group, int) and (group % GROUP_STEP or not GROUP_STEP <= group <= MAX_GROUP):
            raise FormatError(f"input group 'g{group}' must be a multiple of {GROUP_STEP} up to {MAX_GROUP}.")
        if isinstance(group, float) and not SMALLEST <= group <= LARGEST:
            raise FormatError(f"a static scale must be a positive float32, not {group!r}.")
        if self.outlier is not None and not SMALLEST <= self.outlier <= LARGEST:
            raise FormatError(f"an outlier threshold must be a positive float32, not {self.outlier!r}.")

    def __str__(self) -> str:
        if self.number in PLAIN:
            return self.number
        if isinstance(self.group, str):
            group = self.group
        else:
            group = f"g{self.group}" if isinstance(self.group, int) else f"static({number_text(self.group)})"
        return f"{self.number}/{group}" + ("" if self.outlier is None else f"-o({number_text(self.outlier)})")

    @property
    def quantized(self) -> bool:
        return self.number not in PLAIN

    def groups(self, cols: int) -> int:
        """Scales a token has."""
        return -(-cols // self.group) if isinstance(self.group, int) else 1

    def apply(self, x: F32) -> F32:
        """What float32 x [tokens, cols] is rounded to, outliers included: the definition."""
        x = np.asarray(x, np.float32)
        if self.number == "f32":
            return x.copy()
        if self.number == "bf16":
            return nearest_bf16(x)
        q = self.quantize(x)
        cols = x.shape[1]
        width = self.group if isinstance(self.group, int) else max(cols, 1)
        codes = E4M3.values[q.codes] if self.number == "e4m3" else q.codes.astype(np.float32)
        if q.zeros is not None:
            codes = codes - np.repeat(q.zeros.astype(np.float32), width, axis=1)[:, :cols]
        with np.errstate(over="ignore", invalid="ignore"):
            values: F32 = np.repeat(q.scales, width, axis=1)[:, :cols] * codes
        return values if q.outliers is None else np.where(q.outliers != 0, q.outliers, values)

    def quantize(self, x: F32) -> Quantized:
        """The codes, scales, zero points and outliers of float32 x [tokens, cols]; not for f32 and bf16."""
        if not self.quantized:
            raise FormatError(f"input '{self}' has no codes.")
        x = np.asarray(x, np.float32)
        tokens, cols = x.shape
        outliers = None
        if self.outlier is not None:
            outliers = np.where(np.abs(x) >= np.float32(self.outlier), x, np.float32(0))
            x = np.where(outliers != 0, np.float32(0), x)
        width, groups = (self.group if isinstance(self.group, int) else cols), self.groups(cols)
        grouped = np.zeros((tokens, groups * width), np.float32)  # zeros change neither a maximum nor a range with 0
        grouped[:, :cols] = x
        codes, scales, zeros = self._fit(grouped.reshape(tokens, groups, width))
        return Quantized(codes.reshape(tokens, groups * width)[:, :cols], scales, zeros, outliers)

    def _fit(
        self, x: F32
    ) -> tuple[npt.NDArray[np.int8] | npt.NDArray[np.uint8], F32, npt.NDArray[np.uint8] | None]:
        """Codes of x [tokens, groups, width], scales and zeros [tokens, groups]."""
        top = np.float32(TOPS[self.number])
        unsigned = self.number.startswith("u")
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            sound = np.isfinite(x).all(axis=2)
            low, high = x.min(axis=2, initial=0), x.max(axis=2, initial=0)
            if isinstance(self.group, float):
                scales = np.full(low.shape, self.group, np.float32)
            else:
                scales = (high - low if unsigned else np.maximum(high, -low)) / top
                sound &= np.isfinite(scales)
            scales = np.where(sound, scales, np.float32(np.nan))
            live = sound & (scales > 0)
            divisor = np.where(live, scales, np.float32(1))
            quotient = (np.where(live[..., None], x, np.float32(0)) / divisor[..., None]).astype(np.float32)
            if self.number == "e4m3":
                return E4M3.minifloat.encode(quotient), scales, None
            codes = np.rint(quotient)
            if not unsigned:
                return np.clip(codes, -top, top).astype(np.int8), scales, None
            zeros = np.clip(np.rint(np.where(live, -low, np.float32(0)) / divisor), 0, top)
            return np.clip(codes + zeros[..., None], 0, top).astype(np.uint8), scales, zeros.astype(np.uint8)


DEFAULT_INPUT = InputFormat("bf16")


def number_text(value: float) -> str:
    """The shortest text that reads back as this float: 0.05, 3, 1e-05."""
    words = repr(float(value))
    return words[:-2] if words.endswith(".0") else words


def nearest_bf16(x: F32) -> F32:
    """float32 to the nearest bfloat16, ties to even, as float32; beyond the largest becomes infinite."""
    bits = np.ascontiguousarray(x, "<f4").view("<u4")
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, bits | 0x400000, rounded).astype("<u4").view("<f4")
