"""Invertible linear maps of a site's channels: factors, orders, block-diagonal matrices, Hadamard matrices.

A map M of the input channels turns x into M x and the weights W into W M^-1; one of the output channels turns y into
M y and W into M W. Everything is float64 [channels, n] or [n, channels]; the one who applies them rounds once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import UsageError
from gossamer.formats import Dense, Hadamard
from gossamer.formats.transforms import signs

__all__ = ["Blocks", "Diagonal", "HadamardMap", "Map", "Order", "inverse_order"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

STEP = 512  # columns of a matrix that are mapped at once


class Map(ABC):
    """M [size, size], block-diagonal in runs of ``block`` channels."""

    size: int
    block: int

    @abstractmethod
    def rows(self, w: F64, first: int) -> F64:
        """(M W)[first : first + len(w)] from those rows of W [.., n]; both ends lie on multiples of ``block``."""

    @abstractmethod
    def columns(self, w: F64) -> F64:
        """W M^-1 of W [n, size]."""

    @property
    def dual(self) -> Map:
        """M^-T, which is M itself where M is orthogonal."""
        return self

    @property
    def orthogonal(self) -> bool:
        return True

    def vector(self, x: npt.NDArray[Any]) -> F64:
        """M x of x [size]."""
        return self.rows(np.asarray(x, np.float64)[:, None], 0)[:, 0]

    def tokens(self, x: npt.NDArray[Any]) -> F64:
        """M applied to each row of x [n, size]."""
        return self.dual.columns(np.asarray(x, np.float64))


class Diagonal(Map):
    """M = diag(factors), of any sign, none of them zero.

    With ``inverse`` a factor may be zero where nothing depends on the channel: weights are then multiplied by what
    stands there, which may be zero too.
    """

    def __init__(self, factors: npt.NDArray[Any], inverse: npt.NDArray[Any] | None = None) -> None:
        self.factors = np.asarray(factors, np.float64)
        self.size, self.block = len(self.factors), 1
        sound = self.factors.ndim == 1 and bool(np.isfinite(self.factors).all())
        if not sound or (inverse is None and not self.factors.all()):
            raise UsageError("the factors of a channel scaling must be finite and not zero; check the statistics.")
        self.inverse = 1 / self.factors if inverse is None else np.asarray(inverse, np.float64)

    def rows(self, w: F64, first: int) -> F64:
        return w * self.factors[first : first + len(w), None]

    def columns(self, w: F64) -> F64:
        return w * self.inverse

    def then(self, other: Diagonal) -> Diagonal:
        """This map, and the other after it."""
        return Diagonal(self.factors * other.factors, self.inverse * other.inverse)

    @property
    def dual(self) -> Map:
        return Diagonal(self.inverse, self.factors)

    @property
    def orthogonal(self) -> bool:
        return bool((np.abs(self.factors) == 1).all())


class Order(Map):
    """(M x)[i] = x[index[i]]: the channels in another order."""

    def __init__(self, index: npt.NDArray[Any], block: int | None = None) -> None:
        self.index = np.asarray(index, np.int64)
        self.size = len(self.index)
        self.block = block or self.size
        places = np.arange(self.size)
        if not np.array_equal(np.sort(self.index), places):
            raise UsageError(f"an order of {self.size} channels must name each of them once.")
        if self.size % self.block or (self.index // self.block != places // self.block).any():
            raise UsageError(f"the order moves channels out of their runs of {self.block}.")

    def rows(self, w: F64, first: int) -> F64:
        return w[self.index[first : first + len(w)] - first]

    def columns(self, w: F64) -> F64:
        return w[:, self.index]


def inverse_order(index: I64) -> I64:
    """The order that undoes ``index``."""
    back = np.empty_like(index)
    back[index] = np.arange(len(index))
    return back


class Blocks(Map):
    """Orthogonal matrices [k, b, b] along the diagonal, or one matrix [b, b] repeated."""

    def __init__(self, size: int, matrices: npt.NDArray[Any]) -> None:
        matrices = np.asarray(matrices, np.float64)
        matrices = matrices[None] if matrices.ndim == 2 else matrices
        count, self.block = matrices.shape[0], matrices.shape[1]
        self.size = size
        if matrices.shape != (count, self.block, self.block) or size % self.block:
            raise UsageError(f"matrices of shape {matrices.shape} do not lie along the diagonal of {size} channels.")
        if count not in (1, size // self.block):
            raise UsageError(f"{size} channels take 1 or {size // self.block} blocks of {self.block}, not {count}.")
        error = np.abs(matrices @ matrices.swapaxes(1, 2) - np.eye(self.block)).max()
        if not error < 1e-5:
            raise UsageError(f"a rotation must be orthogonal, and this matrix is not (its error is {error:.2g}).")
        self.matrices = matrices

    def rows(self, w: F64, first: int) -> F64:
        runs = w.reshape(-1, self.block, w.shape[1])
        chosen = self.matrices
        if len(chosen) > 1:
            chosen = chosen[first // self.block : first // self.block + len(runs)]
        turned: F64 = np.matmul(chosen, runs).reshape(w.shape)
        return turned

    def columns(self, w: F64) -> F64:
        runs = w.reshape(len(w), -1, self.block).swapaxes(0, 1)  # [block, row, channel]
        turned = np.matmul(runs, self.matrices.swapaxes(1, 2))
        return np.ascontiguousarray(turned.swapaxes(0, 1)).reshape(w.shape)


@dataclass(frozen=True)
class HadamardMap(Map):
    """M x = H (d * x) with the matrices and signs of ``hadamard(BLOCK, SEED, ...)``, in n log n additions."""

    size: int
    block: int
    seed: int | None = None

    def __post_init__(self) -> None:
        self._format.check(1, self.size)

    @cached_property
    def _format(self) -> Hadamard:
        return Hadamard(self.block, None, Dense("f32"))

    def columns(self, w: F64) -> F64:
        # M is orthogonal, so W M^-1 is M applied to each row of W.
        turned = self._format.transform((w * signs(self.seed, self.size)).astype(np.float32), {})
        return turned.astype(np.float64)

    def rows(self, w: F64, first: int) -> F64:
        d = signs(self.seed, self.size)[first : first + len(w), None]
        out = np.empty_like(w)
        for c in range(0, w.shape[1], STEP):
            part = np.ascontiguousarray((w[:, c : c + STEP] * d).T, np.float32)
            out[:, c : c + STEP] = self._format.transform(part, {}).T
        return out
