"""What is known about the input of a part of a site: statistics of fewer columns, or of a mapped input T x.

Second moments, means and samples map exactly. Ranges of a rotated input are those of the samples: a lower bound.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers.lowrank import root
from gossamer.compress.statistics import Statistics
from gossamer.errors import UsageError
from gossamer.formats import Hadamard

__all__ = ["check", "columns", "remaining", "rotated", "scaled"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

STEP = 256  # rows or columns of a Hessian mapped at once


def check(stats: Statistics, cols: int, where: str) -> None:
    """Refuses statistics of another input, in one sentence."""
    shapes = {name: getattr(stats, name).shape for name in ("absmax", "mean_abs", "mean", "square")}
    wrong = [name for name, shape in shapes.items() if shape != (cols,)]
    if stats.samples.ndim != 2 or stats.samples.shape[1] != cols:
        wrong.append("samples")
    if stats.hessian is not None and stats.hessian.shape != (cols, cols):
        wrong.append("hessian")
    if wrong:
        raise UsageError(
            f"{where} has {cols} input columns, but its statistics' {wrong[0]} is {getattr(stats, wrong[0]).shape}; "
            "collect them for this model."
        )


def columns(stats: Statistics, index: I64) -> Statistics:
    """Of these input columns alone, in this order."""
    return replace(
        stats,
        hessian=None if stats.hessian is None else _square(stats.hessian, index),
        absmax=stats.absmax[index],
        mean_abs=stats.mean_abs[index],
        mean=stats.mean[index],
        square=stats.square[index],
        samples=np.ascontiguousarray(stats.samples[:, index]),
    )


def _square(hessian: F32, index: I64) -> F32:
    """H[index][:, index] without a copy of whole rows of all of H."""
    out = np.empty((len(index), len(index)), np.float32)
    for r in range(0, len(index), STEP):
        out[r : r + STEP] = hessian[index[r : r + STEP]][:, index]
    return out


def scaled(stats: Statistics, factors: F32) -> Statistics:
    """Of x * factors."""
    hessian = None
    if stats.hessian is not None:
        hessian = stats.hessian * factors
        hessian *= factors[:, None]
    return replace(
        stats,
        hessian=hessian,
        absmax=stats.absmax * factors,
        mean_abs=stats.mean_abs * factors,
        mean=stats.mean * factors,
        square=stats.square * factors**2,
        samples=stats.samples * factors,
    )


def rotated(stats: Statistics, node: Hadamard) -> Statistics:
    """Of T x: H becomes T H T^T."""
    hessian = None
    if stats.hessian is not None:
        hessian = np.empty_like(stats.hessian)
        for r in range(0, len(hessian), STEP):
            hessian[r : r + STEP] = node.transform(stats.hessian[r : r + STEP], {})
        for c in range(0, len(hessian), STEP):
            column = np.ascontiguousarray(hessian[:, c : c + STEP].T)
            hessian[:, c : c + STEP] = node.transform(column, {}).T
    samples = node.transform(stats.samples, {})
    size = np.abs(samples)
    square = (samples.astype(np.float64) ** 2).mean(axis=0).astype(np.float32) if len(samples) else stats.square
    return replace(
        stats,
        hessian=hessian,
        absmax=size.max(axis=0, initial=0),
        mean_abs=size.mean(axis=0) if len(samples) else stats.mean_abs,
        mean=node.transform(stats.mean[None], {})[0],
        square=square if hessian is None else np.ascontiguousarray(np.diagonal(hessian)),
        samples=samples,
    )


def remaining(hessian: F32, first: I64, last: I64, where: str, log: list[str]) -> tuple[F32, F32]:
    """H of the columns ``first`` when those in ``last`` may still follow their errors, and how they follow.

    Returns the Schur complement H11 - H12 H22^-1 H21, float32, and H12 H22^-1 [first, last]: an error E1 of the first
    columns is made up for, as far as it can be, by adding E1 H12 H22^-1 to the last ones. Solving the first columns
    with it, then the last, is one sweep over both (the inverse of the complement is a block of H^-1).
    """
    corner = _square(hessian, last)
    factor = root(corner, where, log)  # corner + a little = factor factor^T
    across = np.empty((len(first), len(last)), np.float32)
    for r in range(0, len(first), STEP):
        across[r : r + STEP] = hessian[first[r : r + STEP]][:, last]
    half = np.linalg.solve(factor, across.T.astype(np.float64))
    follow = np.linalg.solve(factor.T, half).T.astype(np.float32)
    rest = _square(hessian, first)
    for r in range(0, len(first), STEP):
        rest[r : r + STEP] -= (half[:, r : r + STEP].T @ half).astype(np.float32)
    diagonal = np.einsum("ii->i", rest)
    # What the last columns can make up for as a whole rounds around zero, but is no column without an input.
    np.maximum(diagonal, 1e-6 * max(float(diagonal.mean()), 0.0), out=diagonal)
    return rest, follow
