"""Searched scales and minima into their storage: plain, a power of two, or a format of their own, and its neighbours.

A scale is coarse where its storage leaves few choices (e8m0, e4m3, a nested format): then it matters which one is
taken, and solvers try the neighbours of the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers.grid import Stored
from gossamer.formats import ArraySource, Coded, fit, halves, scales, shared
from gossamer.formats.coded import Parts
from gossamer.formats.numbers import FLOATS, NUMBERS, Number

__all__ = ["ROUNDINGS", "Matrix", "coarse", "store_mins", "store_scales"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

ROUNDINGS = ("nearest", "ceil", "mse")


def coarse(kind: str | Coded | None) -> bool:
    return kind is not None and not (isinstance(kind, str) and kind in FLOATS)


@dataclass
class Matrix:
    """A matrix of scales or minima as it is stored in ``kind``, and as float32: ``single`` [row tiles, groups]."""

    kind: str | Coded
    stored: Stored
    single: F32
    state: fit.State

    def shifted(self, by: int) -> Matrix:
        """Each element moved to the next value but ``by`` - 1 of its storage (away from zero; kept at the ends)."""
        if isinstance(self.stored, Parts):
            assert isinstance(self.kind, Coded)
            codes = _next(self.kind.number, self.stored.codes, by)
            moved = Parts(codes, self.stored.scales, self.stored.zeros, self.stored.mins, self.stored.shared)
            single = fit.dequantize(self.kind, moved, np.arange(len(codes)), self.state)
            return Matrix(self.kind, moved, single, self.state)
        assert isinstance(self.kind, str)
        if self.kind == "e8m0":
            bytes_ = np.clip(self.stored.astype(np.int32) + by, 0, max(int(self.stored.max()), 1)).astype(np.uint8)
        else:
            bytes_ = _next(NUMBERS["e4m3"], self.stored, by)
        return Matrix(self.kind, bytes_, scales.load(bytes_, self.kind), self.state)

    def replaced(self, where: Bools, other: Matrix) -> Matrix:
        """This one, with the elements of ``other`` where the mask [row tiles, groups] holds."""
        single = np.where(where, other.single, self.single)
        if isinstance(self.stored, Parts):
            assert isinstance(other.stored, Parts)
            codes = np.where(where, other.stored.codes, self.stored.codes)
            p = self.stored
            return Matrix(self.kind, Parts(codes, p.scales, p.zeros, p.mins, p.shared), single, self.state)
        assert isinstance(other.stored, np.ndarray)
        return Matrix(self.kind, np.where(where, other.stored, self.stored), single, self.state)


def _next(number: Number, codes: npt.NDArray[Any], by: int) -> npt.NDArray[Any]:
    """Codes whose values are the next ones; those of a minifloat keep their sign."""
    if number.family != "minifloat":
        return np.clip(codes.astype(np.int32) + by, 0, number.levels - 1).astype(np.uint8)
    sign = codes & np.uint8(1 << (number.bits - 1))
    size = np.clip((codes ^ sign).astype(np.int32) + by, 0, number.minifloat.largest)
    moved: npt.NDArray[np.uint8] = size.astype(np.uint8) | sign
    return moved


def store_scales(fmt: Coded, s: F64, m: F32 | None, rounding: str) -> Matrix:
    """Scales of a whole matrix, real numbers [row tiles, groups], in the format of ``fmt``'s scales.

    ``rounding`` is for coarse ones: "ceil" takes none that is smaller than the real number where there is one,
    otherwise the nearest is taken (of powers of two the nearest exponent).
    """
    kind = fmt.scale
    assert kind is not None
    limit, rows = fit.largest_scale(fmt, m), np.arange(len(s))
    state = fit.NOTHING
    if isinstance(kind, Coded):
        wanted = np.clip(s, -limit / 2, limit / 2).astype(np.float32)
        state = fit.State(scales=shared.prepare(kind, ArraySource(wanted), True))
    if kind == "e8m0":
        stored: Stored = _powers(s, fmt.number.largest, rounding)
        assert isinstance(stored, np.ndarray)
        found = Matrix(kind, stored, scales.load(stored, "e8m0"), fit.NOTHING)
    else:
        stored, single = fit.store_scales(fmt, s, limit, rows, state)
        found = Matrix(kind, stored, single, state.scales or fit.NOTHING)
        if rounding == "ceil" and coarse(kind):
            more = found.shifted(1)
            short = (np.abs(found.single) < np.abs(s)) & (np.abs(more.single) > np.abs(found.single))
            found = found.replaced(short, more)
    return found


def _powers(s: F64, largest: float, rounding: str) -> npt.NDArray[np.uint8]:
    """e8m0 codes of the powers of two at the exponents nearest to those of s, or not below s; no logarithm is taken,
    so that powers of two stay as they are."""
    fraction, exponent = np.frexp(s)
    up = fraction > 0.5 if rounding == "ceil" else fraction * fraction >= 0.5
    top = 255 - max(1, int(np.frexp(largest)[1]))  # the largest value times the scale is below 2^128
    return np.where(s <= 0, 0, np.clip(exponent - 1 + up + 127, 0, top)).astype(np.uint8)


def store_mins(fmt: Coded, m: F64) -> Matrix:
    """Minima of a whole matrix, [row tiles, groups], at the nearest numbers of their format."""
    kind = fmt.minimum
    assert kind is not None
    single = np.clip(m, -fit.FLOAT32_MAX / 2, fit.FLOAT32_MAX / 2).astype(np.float32)
    if isinstance(kind, str):
        plain = halves.from_float(single, kind)
        return Matrix(kind, plain, halves.to_float(plain, kind), fit.NOTHING)
    state = shared.prepare(kind, ArraySource(single), True)
    rows = np.arange(len(single))
    parts = fit.quantize(kind, single, rows, state, np.zeros(single.shape, np.bool_))
    return Matrix(kind, parts, fit.dequantize(kind, parts, rows, state), state or fit.NOTHING)
