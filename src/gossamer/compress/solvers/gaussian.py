"""The scale of least squared error for normally distributed weights, for each number format."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np

from gossamer.formats.numbers import Number

__all__ = ["normal_error", "normal_steps"]

SCAN = 60  # scales looked at before the search, each 5 % smaller


def _sorted_values(number: Number) -> list[float]:
    values = number.values[: number.levels].astype(np.float64)
    if number.family == "uint":  # with a zero point or a minimum: centred
        values = values - values.mean()
    return sorted(set(values[np.isfinite(values)].tolist()))


def normal_error(number: Number, s: float) -> float:
    """E[(x - q(x))^2] of x ~ N(0, 1) rounded to the nearest of s times the number's values (uint: about their mean)."""
    values = [s * v for v in _sorted_values(number)]
    bounds = [-math.inf, *((a + b) / 2 for a, b in pairwise(values)), math.inf]
    error = 0.0
    for v, (a, b) in zip(values, pairwise(bounds)):
        mass = 0.5 * (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2)))
        # The first two moments of the normal density over [a, b].
        first = _density(a) - _density(b)
        second = mass + (a * _density(a) if math.isfinite(a) else 0.0) - (b * _density(b) if math.isfinite(b) else 0.0)
        error += second - 2 * v * first + v * v * mass
    return error


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0


@cache
def normal_steps(number: Number) -> float:
    """The scale s of least ``normal_error``: a fine scan, then golden section around its minimum."""
    widest = 8.0 / number.largest if number.family != "uint" else 16.0 / number.largest
    tried = [widest * 0.95**i for i in range(SCAN)]
    best = min(range(SCAN), key=lambda i: normal_error(number, tried[i]))
    low, high = tried[min(best + 1, SCAN - 1)], tried[max(best - 1, 0)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(30):
        a, b = high - golden * (high - low), low + golden * (high - low)
        if normal_error(number, a) < normal_error(number, b):
            high = b
        else:
            low = a
    return (low + high) / 2
