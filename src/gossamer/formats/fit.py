"""How codes, scales and offsets are found: round to nearest.

The ideal scale of a group follows from its elements, is stored in its format (recursively where that is nested), and
the codes are those nearest with the scale AS STORED. ``quantize`` is idempotent: what codes stand for is quantized to
the same values again. docs/formats.md says where that has limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer.formats import halves, scales
from gossamer.formats.numbers import FLOATS, Number

if TYPE_CHECKING:
    from gossamer.formats.coded import Coded

__all__ = [
    "FLOAT32_MAX",
    "NOTHING",
    "Parts",
    "State",
    "by_mean",
    "dequantize",
    "fit_once",
    "grouped",
    "ideal",
    "largest_scale",
    "nearest_codes",
    "quantize",
    "settle",
    "signed",
    "steps_of",
    "store_mins",
    "store_scales",
    "values",
]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass
class Parts:
    """Some rows, unpacked. ``codes``: uint8 [n, cols] as stored; ``zeros``: uint8 [n, groups] or None.

    ``scales`` and ``mins``: [n, groups] in their storage type, or Parts where they are a format themselves. With
    ``shared`` (rows share scales) they are those of the whole matrix, [row tiles, groups].
    """

    codes: npt.NDArray[Any]
    scales: npt.NDArray[Any] | Parts
    zeros: npt.NDArray[Any] | None = None
    mins: npt.NDArray[Any] | Parts | None = None
    shared: bool = False

    def take(self, where: Bools | slice) -> Parts:
        """Some rows (or groups, by a mask [n, groups])."""

        def some(x: Any) -> Any:
            return x.take(where) if isinstance(x, Parts) else None if x is None else x[where]

        if self.shared:
            return Parts(self.codes[where], self.scales, some(self.zeros), self.mins, True)
        return Parts(self.codes[where], some(self.scales), some(self.zeros), some(self.mins))

    def put(self, where: Bools, other: Parts) -> None:
        """Replaces what ``take`` gives."""
        self.codes[where] = other.codes
        if self.zeros is not None:
            self.zeros[where] = other.zeros
        if self.shared:
            return
        for mine, theirs in ((self.scales, other.scales), (self.mins, other.mins)):
            if isinstance(mine, Parts):
                assert isinstance(theirs, Parts)
                mine.put(where, theirs)
            elif mine is not None:
                mine[where] = theirs


@dataclass(frozen=True)
class State:
    """What rows share. ``stored_*``: scales and minima of the whole matrix as Parts hold them; ``s``, ``m``: their
    float32 [row tiles, groups]; ``scales``, ``mins``: the states of nested formats whose own rows share something."""

    stored_scales: npt.NDArray[Any] | Parts | None = None
    stored_mins: npt.NDArray[Any] | Parts | None = None
    s: F32 | None = None
    m: F32 | None = None
    tile_rows: int = 1
    scales: State | None = None
    mins: State | None = None


NOTHING = State()


def values(number: Number, codes: npt.NDArray[Any], s: F32, zeros: F32 | None, m: F32 | None) -> F32:
    """What codes mean with scales, zero points and minima that broadcast to them: the definition, in float32."""
    if number.table is not None:
        w: F32 = number.table[codes]
        with np.errstate(invalid="ignore"):  # the infinity of e5m2 times zero: nothing that was encoded
            w *= s
        return w
    w = codes.astype(np.float32)
    if m is not None:
        w *= s
        w -= m
        return w
    if number.step != 1:
        w *= np.float32(number.step)
    w -= np.float32(number.zero) if zeros is None else zeros
    w *= s
    return w


# ------------------------------------------------------------ quantizing rows


def quantize(fmt: Coded, w: F32, rows: I64, state: State | None, least: Bools | None = None) -> Parts:
    """float32 rows [n, cols], numbers ``rows`` of the matrix, to Parts.

    ``least`` is for a matrix of scales: there, scales of scales are positive, and an element where ``least`` holds
    does not become zero but the smallest number above (a group would vanish otherwise).
    """
    n, cols = w.shape
    inner = least is not None
    x = grouped(fmt, w)
    state = state or NOTHING
    if fmt.group.shared:
        assert state.s is not None  # the caller prepared
        assert state.stored_scales is not None
        tiles = rows // state.tile_rows
        m = None if state.m is None else state.m[tiles]
        codes, zeros = _round(fmt, x, state.s[tiles], m, inner)
        found = Parts(codes, state.stored_scales, zeros, state.stored_mins, True)
    else:
        found = fit_once(fmt, x, cols, rows, state, inner)
        settle(fmt, found, cols, rows, state, inner)
    parts = Parts(found.codes.reshape(n, -1)[:, :cols].astype(np.uint8), found.scales, found.zeros, found.mins,
                  found.shared)  # fmt: skip
    if least is not None and least.any():
        lost = least & (dequantize(fmt, parts, rows, state) == 0)
        parts.codes[lost] = np.minimum(parts.codes[lost] + 1, fmt.number.levels - 1)
    return parts


def dequantize(fmt: Coded, parts: Parts, rows: I64, state: State | None) -> F32:
    """What ``quantize`` kept, float32 [n, cols]."""
    cols = parts.codes.shape[1]
    s, zeros, m = steps_of(fmt, parts, rows, state or NOTHING)
    width = fmt.width(cols)

    def spread(x: F32 | None) -> F32 | None:
        return None if x is None else np.repeat(x, width, axis=1)[:, :cols]

    per_element = spread(s)
    assert per_element is not None
    return values(fmt.number, parts.codes, per_element, spread(zeros), spread(m))


def steps_of(fmt: Coded, parts: Parts, rows: I64, state: State) -> tuple[F32, F32 | None, F32 | None]:
    """Scales, zero points and minima of each row and group, float32."""
    zeros = None if parts.zeros is None else parts.zeros.astype(np.float32)
    if parts.shared:
        assert state.s is not None
        tiles = rows // state.tile_rows
        return state.s[tiles], zeros, None if state.m is None else state.m[tiles]
    m = None if fmt.minimum is None else _load(fmt.minimum, parts.mins, rows, state.mins)
    return _load(fmt.scale, parts.scales, rows, state.scales), zeros, m


def _load(scale: str | Coded | None, stored: npt.NDArray[Any] | Parts | None, rows: I64, state: State | None) -> F32:
    if isinstance(stored, Parts):
        assert scale is not None
        assert not isinstance(scale, str)
        return dequantize(scale, stored, rows, state)
    assert isinstance(scale, str)
    assert stored is not None
    return scales.load(stored, scale)


def grouped(fmt: Coded, w: F32) -> F32:
    """[n, cols] to [n, groups, width]; what pads the last group does not change its range."""
    n, cols = w.shape
    width, groups = fmt.width(cols), fmt.groups(cols)
    if cols == groups * width:
        return np.ascontiguousarray(w).reshape(n, groups, width)
    padded = np.zeros((n, groups * width), np.float32)
    padded[:, :cols] = w
    if fmt.minimum is not None:
        padded[:, cols:] = padded[:, (groups - 1) * width, None]  # a zero would pull the minimum towards itself
    return padded.reshape(n, groups, width)


def fit_once(fmt: Coded, x: F32, cols: int, rows: I64, state: State, inner: bool) -> Parts:
    """One round to nearest of x [..., width]: codes [..., width] (of any type), scales and offsets [...]."""
    mins = m = None
    if fmt.minimum is not None:
        mins, m = store_mins(fmt, -x.min(axis=-1), rows, state)
    s, limit = ideal(fmt, x, cols, m, inner)
    stored, steps = store_scales(fmt, s, limit, rows, state)
    codes, zeros = _round(fmt, x, steps, m, inner)
    return Parts(codes, stored, zeros, mins)


def by_mean(number: Number) -> bool:
    """Whether the scale is a mean of magnitudes: where -1, 0 and 1 are all there is."""
    return number.family == "ternary" or number.name == "bipolar1"


def signed(fmt: Coded, inner: bool) -> bool:
    """Whether a scale may be negative: not where it is a scale's own, a power of two or (by convention) e4m3."""
    if inner:
        return False
    return fmt.scale in FLOATS if isinstance(fmt.scale, str) else fmt.scale is not None and fmt.scale.number.signed


def ideal(fmt: Coded, x: F32, cols: int, m: F32 | None, inner: bool) -> tuple[F64, Any]:
    """The scale of each group as a real number, and how large it may be for values to stay within float32.

    The extreme of an int group sits on -2^(B-1) if the scale may be negative, which uses every code; else on the
    largest code. A ternary scale is the one of least squared error; so is that of bipolar1, the mean magnitude.
    """
    number = fmt.number
    top = number.levels - 1
    limit = largest_scale(fmt, m)
    if number.family == "ternary":
        return _best_ternary(x), limit
    if by_mean(number):
        width = x.shape[-1]
        valid = np.clip(cols - width * np.arange(x.shape[-2]), 1, width)
        return np.abs(x).sum(axis=-1, dtype=np.float64) / valid, limit
    low, high = x.min(axis=-1).astype(np.float64), x.max(axis=-1).astype(np.float64)
    if m is not None:
        return np.maximum(high + m, 0) / top, limit
    if fmt.zero:
        return (np.maximum(high, 0) - np.minimum(low, 0)) / top, limit
    if number.family == "int" and signed(fmt, inner):
        return np.where(-low >= high, low, high) / -number.zero, limit
    if number.family == "uint":
        return (np.where(-low > high, low, high) / top if signed(fmt, inner) else np.maximum(high, 0) / top), limit
    return np.maximum(-low, high) / number.largest, limit


def largest_scale(fmt: Coded, m: F32 | None) -> Any:
    """How large a scale may be for all values to stay within float32, as a real number or one for each minimum."""
    if m is not None:
        return (FLOAT32_MAX + np.minimum(m, 0)) / (fmt.number.levels - 1)
    return FLOAT32_MAX / max(fmt.number.largest, float(fmt.number.zero))


def _best_ternary(x: F32) -> F64:
    """The s of least squared error with codes -1, 0, 1: the mean of the k largest magnitudes, k maximizing
    (their sum)^2 / k. It is never worse than the rule of ternary weight networks, or than the largest magnitude."""
    magnitude = -np.sort(-np.abs(x), axis=-1)
    total = np.cumsum(magnitude, axis=-1, dtype=np.float64)
    count = np.arange(1, x.shape[-1] + 1)
    best = np.argmax(total * (total / count), axis=-1)[..., None]
    return np.asarray(np.take_along_axis(total, best, axis=-1)[..., 0] / (best[..., 0] + 1))


def store_scales(fmt: Coded, s: F64, limit: Any, rows: I64, state: State) -> tuple[npt.NDArray[Any] | Parts, F32]:
    """Scales in their format and as float32, so that no value overflows float32 (``limit``)."""
    scale, number = fmt.scale, fmt.number
    if not isinstance(scale, str):
        assert scale is not None
        limit = limit / 2  # the rounding of a nested format may enlarge a scale so much
        least = np.ones(s.shape, np.bool_) if number.zero_code is not None else s != 0
        stored = quantize(scale, np.clip(s, -limit, limit).astype(np.float32), rows, state.scales, least)
        return stored, dequantize(scale, stored, rows, state.scales)
    mean = by_mean(number)
    if scale == "e8m0":
        powers = scales.store_power_of_two(s, number.largest, mean)
        return powers, scales.load(powers, scale)
    limit = limit * (1 - 2.0**-8)  # room for rounding up
    short = number.family != "int" and not mean
    plain = scales.store(np.clip(s, -limit, limit), scale, short)
    return plain, scales.load(plain, scale)


def store_mins(fmt: Coded, m: F32, rows: I64, state: State) -> tuple[npt.NDArray[Any] | Parts, F32]:
    """Minima in their format and as float32: a float one lies at or below the group's (m is its negative)."""
    kind = fmt.minimum
    if isinstance(kind, str):
        stored = halves.from_float(m, kind)
        stored = np.where(halves.to_float(stored, kind) < m, halves.next_up(stored, kind), stored)
        return stored, halves.to_float(stored, kind)
    assert kind is not None
    parts = quantize(kind, m, rows, state.mins, np.zeros(m.shape, np.bool_))
    return parts, dequantize(kind, parts, rows, state.mins)


def nearest_codes(
    fmt: Coded, x: F32, s: F32, zeros: F32 | None, m: F32 | None, inner: bool = False
) -> npt.NDArray[Any]:
    """The codes (of any type) nearest to x with scales, zero points and minima that broadcast to it, all float32."""
    number = fmt.number
    top = number.levels - 1
    divisor = _divisor(s)
    if number.family == "uint" and m is not None:
        with np.errstate(over="ignore"):  # an infinity is cut to the last code
            return _clipped((x + m) / divisor, 0, top)
    t: F32 = x / divisor
    if zeros is not None:
        t += zeros
        return _clipped(t, 0, top)
    if number.family == "minifloat":
        return number.minifloat.encode(t)
    if number.family == "nf":
        table = number.values
        return np.searchsorted((table[1:] + table[:-1]) / 2, t).astype(np.uint8)
    if number.family == "bipolar":
        t += np.float32(number.zero) + 1
        t /= 2
        np.floor(t, out=t)  # ties up, so that a group of zeros has positive codes: plus zero
    else:
        t += np.float32(number.zero)
    # With the extreme on the largest code, the one below its negative is left alone.
    narrow = number.family == "int" and not signed(fmt, inner)
    return _clipped(t, 1 if narrow else 0, top)


def _round(fmt: Coded, x: F32, s: F32, m: F32 | None, inner: bool) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """The nearest codes of x [..., width] with scales s [...], and the zero points if there are."""
    top = fmt.number.levels - 1
    if not fmt.zero:
        return nearest_codes(fmt, x, s[..., None], None, _last(m), inner), None
    low, high = np.minimum(x.min(axis=-1), 0), np.maximum(x.max(axis=-1), 0)
    divisor = _divisor(s)
    zeros = np.clip(np.rint(-low.astype(np.float64) / divisor), 0, top)
    codes = nearest_codes(fmt, x, s[..., None], zeros.astype(np.float32)[..., None], None, inner)
    # The rounded zero point may leave the largest element just below the middle between the last two codes.
    wide = (high.astype(np.float64) - low) / divisor > top - 0.5
    short = wide & (codes.max(axis=-1) == top - 1) & (high > 0)
    codes[short] = np.where(x[short] == high[short, None], np.float32(top), codes[short])
    return codes, zeros.astype(np.uint8)


def _clipped(codes: F32, low: int, high: int) -> F32:
    np.rint(codes, out=codes)
    np.clip(codes, low, high, out=codes)
    return codes


def _divisor(s: F32) -> F32:
    """The scale to divide by; a zero one (an all-zero group) makes every quotient zero."""
    return np.where(s == 0, np.float32(np.inf), s)


# ------------------------------------------------------------ idempotence


def settle(fmt: Coded, found: Parts, cols: int, rows: I64, state: State, inner: bool) -> None:
    """Quantizes what the codes stand for again, until nothing changes; replaces ``found`` where it does.

    Groups that use their extreme codes give the same scale and offset again at once. With plain scales a few do not,
    mostly because their scale has few bits left (a subnormal one); each round makes their scale smaller or their
    minimum larger, or neither, so that this ends; three rounds are the most seen. Nested scales are always tried.
    """
    nested = not (isinstance(fmt.scale, str) and (fmt.minimum is None or isinstance(fmt.minimum, str)))
    rest = np.ones(len(rows), np.bool_) if nested else ~_settled(fmt, found)
    for _ in range(100):
        if not rest.any():
            return
        part = found.take(rest)
        some = rows[rest] if nested else rows
        s, zeros, m = steps_of(fmt, part, some, state)
        v = values(fmt.number, _whole(fmt, part.codes), s[..., None], _last(zeros), _last(m))
        if nested and cols < v.shape[1] * v.shape[2]:
            v = grouped(fmt, v.reshape(len(v), -1)[:, :cols])
        again = fit_once(fmt, v, cols, some, state, inner)
        s, zeros, m = steps_of(fmt, again, some, state)
        differs = values(fmt.number, _whole(fmt, again.codes), s[..., None], _last(zeros), _last(m)) != v
        if nested:
            differs.reshape(len(v), -1)[:, cols:] = False
        found.put(rest, again)
        rest[rest] = differs.any(axis=(1, 2) if nested else -1)


def _last(x: F32 | None) -> F32 | None:
    return None if x is None else x[..., None]


def _whole(fmt: Coded, codes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Codes fit to look up a table."""
    return codes.astype(np.uint8) if fmt.number.table is not None else codes


def _settled(fmt: Coded, found: Parts) -> Bools:
    """Which groups with plain scales use their extreme codes, so that their values give the same scale again."""
    number, codes = fmt.number, found.codes
    shape = codes.shape[:-1]
    if by_mean(number):
        return np.ones(shape, np.bool_)  # the mean of what is kept is s
    if fmt.scale == "e8m0" and number.family != "uint" and np.frexp(number.largest)[0] != 0.5:
        return np.ones(shape, np.bool_)  # the floor rule leaves the extreme in its binade
    if fmt.scale not in FLOATS:
        return np.zeros(shape, np.bool_)
    if number.family == "minifloat":
        magnitude = codes & np.uint8((1 << (number.bits - 1)) - 1)
        return np.asarray(magnitude.max(axis=-1) == number.minifloat.largest)
    first, last = codes.min(axis=-1), codes.max(axis=-1)
    if number.family == "int":
        return np.asarray(first == 0)  # where the extreme sits
    if number.family in ("bipolar", "nf"):
        return np.asarray((first == 0) | (last == number.levels - 1))
    if found.zeros is not None:  # zero belongs to the range
        first, last = np.minimum(first, found.zeros), np.maximum(last, found.zeros)
    elif fmt.minimum is None:
        return np.asarray(last == number.levels - 1)
    return np.asarray((first == 0) & (last == number.levels - 1))
