"""Weights kept out of the grid, by what rounding them would cost (SpQR, Dettmers et al. 2023, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gossamer.errors import UsageError
from gossamer.formats import Coded, fit
from gossamer.formats.node import ROWS_PER_STEP

__all__ = ["OutlierRule", "threshold", "without_outliers"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class OutlierRule:
    """threshold: a weight is kept out where rounding it would cost more than so many times what the whole spread of
    its column costs on the average; ``most``: at most this share of the weights, the costliest (the sweep is repeated
    with a higher threshold where more reach it)."""

    threshold: float = 0.2
    most: float = 0.05

    def __post_init__(self) -> None:
        if not self.threshold > 0 or not 0 <= self.most <= 1:
            raise UsageError(
                f"outliers above {self.threshold:g}, at most {self.most:g} of the weights, cannot be; use a threshold "
                "above 0 (0.2 is usual) and a share from 0 to 1."
            )


def threshold(rule: OutlierRule, w: F32, cost: F32) -> float:
    """The cost above which weights of w [rows, cols] are kept out; ``cost`` [cols]: that of a unit squared error."""
    mean = w.mean(axis=0, dtype=np.float64)
    square = np.einsum("ij,ij->j", w, w, dtype=np.float64) / len(w)
    return rule.threshold * float(np.mean(np.maximum(square - mean * mean, 0) * cost))


def without_outliers(fmt: Coded, w: F32, cost: F32, limit: float) -> F32:
    """w [rows, cols] with those elements replaced by the mean of their group's others that make the rounding of their
    group cost more than ``limit`` beyond what it costs without them.

    Only a group's extremes set its range, so only leaving one of these out changes the others' errors.
    """
    out = np.empty(w.shape, np.float32)
    for r in range(0, len(w), ROWS_PER_STEP):
        out[r : r + ROWS_PER_STEP] = _without(fmt, w[r : r + ROWS_PER_STEP], cost, limit)
    return out


def _without(fmt: Coded, w: F32, cost: F32, limit: float) -> F32:
    n, cols = w.shape
    x = fit.grouped(fmt, np.ascontiguousarray(w, np.float32))
    counts = np.zeros(x.shape[1] * x.shape[2], np.float32)
    counts[:cols] = cost
    counts = counts.reshape(x.shape[1:])
    own = _errors(fmt, x) * counts
    likely: Bools = np.greater(own, limit)
    total = own.sum(axis=-1)
    inside = np.ascontiguousarray(np.broadcast_to(np.arange(counts.size).reshape(counts.shape) < cols, x.shape))
    for which in (_extreme(x, inside, False), _extreme(x, inside, True)):
        at = which[..., None]
        middle = np.take_along_axis(x, _other(which, x, inside)[..., None], axis=-1)
        rest = x.copy()
        np.put_along_axis(rest, at, middle, axis=-1)  # a second one of another: the range is that of the others
        cost_of_rest = _errors(fmt, rest) * counts
        np.put_along_axis(cost_of_rest, at, 0, axis=-1)
        np.put_along_axis(likely, at, (total - cost_of_rest.sum(axis=-1) > limit)[..., None], axis=-1)
    likely &= inside
    others = inside & ~likely
    mean = np.where(others, x, 0).sum(axis=-1) / np.maximum(others.sum(axis=-1), 1)
    return np.where(likely, mean[..., None], x).reshape(n, -1)[:, :cols]


def _extreme(x: F32, inside: Bools, top: bool) -> I64:
    """Where the smallest or largest element of each group is."""
    if top:
        return np.asarray(np.where(inside, x, -np.inf).argmax(axis=-1))
    return np.asarray(np.where(inside, x, np.inf).argmin(axis=-1))


def _other(which: I64, x: F32, inside: Bools) -> I64:
    """An element of each group beside the one at ``which`` (that itself where it is the only one)."""
    count = inside.sum(axis=-1)
    return np.asarray((which + 1) % np.maximum(count, 1))


def _errors(fmt: Coded, x: F32) -> F32:
    """The squared errors of each group x [n, groups, width] on the grid of its range, its scale not yet stored."""
    m = None if fmt.minimum is None else -x.min(axis=-1)
    s = fit.ideal(fmt, x, x.shape[1] * x.shape[2], m, False)[0].astype(np.float32)
    z = None
    if fmt.zero:
        low = np.minimum(x.min(axis=-1), 0)
        z = np.clip(np.rint(-low / np.where(s == 0, np.inf, s)), 0, fmt.number.levels - 1).astype(np.float32)[..., None]
    codes = fit.nearest_codes(fmt, x, s[..., None], z, None if m is None else m[..., None])
    d: F32 = x - fit.values(fmt.number, codes, s[..., None], z, None if m is None else m[..., None])
    d *= d
    return d
