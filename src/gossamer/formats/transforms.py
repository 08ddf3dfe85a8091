"""Maps of the input before the inner map: ``hadamard(BLOCK|full, SEED|none, A)``, ``permute(A)``, ``scale(A)``.

A site y = W x stores W' = W T^-1 in the format A and computes y = W' (T x), T x in float32 from float32 x.

    hadamard   T x = H (d * x), W' = (W * d) H^T                   no arrays of its own
    permute    T x = x[index], W' = W[:, index]                    index    U32 [cols]
    scale      T x = x * factors, W' = W / factors                 factors  F32 [cols]
    0.…        the arrays of W' in the format A

H is orthonormal: BLOCK x BLOCK matrices along the diagonal, or one of all columns (full). Of size n = K 2^m it is the
Kronecker product of H_K and the Sylvester matrix of 2^m, times 1 / sqrt(n); see ``hadamard_factors``. The signs d are
+-1: d_i is negative where bit 63 of the i-th output (from 0) of SplitMix64 (Steele, Lea & Flood 2014) with the state
SEED is set; ``none`` means d = 1. Transforms are computed in float64 and rounded to float32 once.

Without hints ``permute`` sorts the columns by descending max|w|, of equal ones those that come first, and the factors
of ``scale`` are the root of the column's max|w|, 1 for a column of zeros. Hints: ``order`` (what stands at each place)
and ``factors`` (positive float32).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats.composite import (
    F32,
    MAX_INDEX,
    Arrays,
    Branch,
    Composite,
    Hints,
    chosen,
    decode_branch,
    encode_parts,
    padded,
    refuse_infinite,
    text,
)
from gossamer.formats.node import Field

__all__ = ["MAX_BLOCK", "MAX_SEED", "Hadamard", "Permute", "Scale", "hadamard_factors", "hadamard_matrix", "signs"]

MAX_BLOCK = 1 << 20
MAX_SEED = (1 << 32) - 1
MAX_FACTOR = 172  # of the part that is no power of two: it costs so many additions an element
STEP = 256  # rows transformed at once


# ---------------------------------------------------------------- Hadamard matrices


@lru_cache
def hadamard_factors(n: int) -> tuple[int, int] | None:
    """(K, 2^m) with n = K 2^m and the smallest K that has a matrix of its own; None where there is none.

    K is 1, or q + 1 for a prime q = 3 mod 4 (Paley's first construction), or 2 (q + 1) for a prime q = 1 mod 4 (his
    second), up to 172: 12, 20, 28, 36, 44, 60, 68, 76, 84, 104, 108, 124, 132, 140, 148, 164.
    """
    if n < 1:
        return None
    power = n & -n
    while power:
        k = n // power
        if k > MAX_FACTOR:
            return None
        if k == 1 or _paley(k):
            return k, power
        power //= 2
    return None


def _paley(k: int) -> int:
    """1 or 2: which of Paley's constructions gives a matrix of size k; 0 for none."""
    if k % 4:
        return 0
    if _is_prime(k - 1):  # then k - 1 = 3 mod 4
        return 1
    return 2 if k // 2 % 4 == 2 and _is_prime(k // 2 - 1) else 0


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


@lru_cache(maxsize=8)
def _core(k: int) -> npt.NDArray[np.float64]:
    """The +-1 matrix of size k = 1 or one of Paley's."""
    kind = _paley(k)
    if not kind:
        return np.ones((1, 1))
    q = k - 1 if kind == 1 else k // 2 - 1
    character = np.full(q, -1.0)
    character[0] = 0
    character[np.arange(1, q) ** 2 % q] = 1
    border = np.zeros((q + 1, q + 1))
    border[0, 1:] = 1
    border[1:, 0] = -1 if kind == 1 else 1
    border[1:, 1:] = character[(np.arange(q)[:, None] - np.arange(q)) % q]
    unit = np.eye(q + 1)
    if kind == 1:
        return unit + border
    sum_, swap = np.array([[1.0, 1], [1, -1]]), np.array([[1.0, -1], [-1, -1]])
    doubled: npt.NDArray[np.float64] = np.kron(border, sum_) + np.kron(unit, swap)
    return doubled


def hadamard_matrix(n: int) -> npt.NDArray[np.floating[Any]]:
    """The orthonormal matrix of size n, for tests and small sizes. Raises FormatError where none is known here."""
    factors = hadamard_factors(n)
    if factors is None:
        raise FormatError(f"no Hadamard matrix of size {n} is known here.")
    sylvester = np.ones((1, 1))
    while len(sylvester) < factors[1]:
        sylvester = np.kron(np.array([[1.0, 1], [1, -1]]), sylvester)
    return np.kron(_core(factors[0]), sylvester) / math.sqrt(n)


def _rotate(x: npt.NDArray[np.float64], n: int, transposed: bool) -> npt.NDArray[np.float64]:
    """H (or H^T) times each run of n elements of x [rows, multiple of n]."""
    factors = hadamard_factors(n)
    assert factors is not None  # check_shape has seen to it
    k, power = factors
    shape = x.shape
    h = 1
    while h < power:
        pair = x.reshape(-1, 2, h)
        x = np.stack([pair[:, 0] + pair[:, 1], pair[:, 0] - pair[:, 1]], axis=1)
        h *= 2
    if k > 1:
        # One product for each run, so that the sums do not depend on how many rows there are.
        x = np.matmul(_core(k).T if transposed else _core(k), x.reshape(-1, k, power))
    return x.reshape(shape) / math.sqrt(n)


def signs(seed: int | None, cols: int) -> F32:
    """The signs d, float32 [cols]."""
    if seed is None:
        return np.ones(cols, np.float32)
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, cols + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.where(z >> np.uint64(63), np.float32(-1), np.float32(1))


# ---------------------------------------------------------------- nodes


@dataclass(frozen=True)
class Hadamard(Composite):
    """A (block) Hadamard transform of the input; ``block`` None is all columns, ``seed`` None no signs."""

    block: int | None
    seed: int | None
    inner: Branch

    def __post_init__(self) -> None:
        if self.block is not None and not (2 <= self.block <= MAX_BLOCK and hadamard_factors(self.block)):
            raise FormatError(
                f"hadamard({self.block}, ...): no such matrix is known here; BLOCK is a power of two, or one times 12, "
                f"20, 28, 36 or others, up to {MAX_BLOCK}{_nearest_sizes(self.block)}."
            )
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise FormatError(f"seed {self.seed} of hadamard(...) is out of range; write 0 to {MAX_SEED} or none.")
        super().__post_init__()

    def __str__(self) -> str:
        block = "full" if self.block is None else self.block
        seed = "none" if self.seed is None else self.seed
        return f"hadamard({block}, {seed}, {text(self.inner)})"

    @property
    def parts(self) -> tuple[tuple[str, Branch], ...]:
        return (("0", self.inner),)

    def size(self, cols: int) -> int:
        return self.block or cols

    def check_shape(self, rows: int, cols: int) -> None:
        n = self.size(cols)
        if cols % n == 0 and 2 <= n <= MAX_BLOCK and hadamard_factors(n):
            return
        fits = [d for d in range(2, min(cols, MAX_BLOCK) + 1) if cols % d == 0 and hadamard_factors(d)]
        near = sorted(sorted(fits, key=lambda d: abs(d - n))[:3])
        write = f"write hadamard({' or '.join(map(str, near))}, ...)" if near else "no block divides it"
        wrong = f"blocks of {n} do not divide them" if cols % n else f"no matrix of size {n} is known"
        raise FormatError(f"{self} does not fit {cols} columns: {wrong}; {write}.")

    def transform(self, x: F32, arrays: Arrays) -> F32:
        """H (d * x) of float32 x [tokens, cols]."""
        cols = x.shape[1]
        rotated = _rotate(x.astype(np.float64) * signs(self.seed, cols), self.size(cols), False)
        return rotated.astype(np.float32)

    def encode_matrix(self, w: F32, hints: Hints) -> dict[str, npt.NDArray[Any]]:
        stored = np.empty(w.shape, np.float32)
        with np.errstate(over="ignore"):
            for r in range(0, len(w), STEP):
                stored[r : r + STEP] = self.transform(w[r : r + STEP], {})
        refuse_infinite(stored, self, "the transformed matrix")
        return encode_parts({"0": (self.inner, stored)}, hints)

    def decode_rows(self, arrays: Arrays, rows: int, cols: int, r0: int, r1: int) -> F32:
        out = decode_branch(self.inner, arrays, "0.", rows, cols, r0, r1)
        d = signs(self.seed, cols)
        with np.errstate(over="ignore"):
            for r in range(0, len(out), STEP):
                back = _rotate(out[r : r + STEP].astype(np.float64), self.size(cols), True)
                out[r : r + STEP] = (back * d).astype(np.float32)
        return out


def _nearest_sizes(n: int) -> str:
    near = [next((s for s in r if hadamard_factors(s)), None) for r in (range(n, 1, -1), range(n, MAX_BLOCK + 1))]
    found = " or ".join(str(s) for s in near if s and s <= MAX_BLOCK)
    return f"; near it are {found}" if 2 <= n <= MAX_BLOCK and found else ""


@dataclass(frozen=True)
class Permute(Composite):
    """The input columns in another order."""

    inner: Branch

    hints = ("order",)

    def __str__(self) -> str:
        return f"permute({text(self.inner)})"

    @property
    def parts(self) -> tuple[tuple[str, Branch], ...]:
        return (("0", self.inner),)

    def check_shape(self, rows: int, cols: int) -> None:
        if cols > MAX_INDEX:
            raise FormatError(f"{self} cannot number {cols} columns.")

    def own_fields(self, rows: int, cols: int) -> dict[str, Field]:
        return {"index": Field("U32", cols)}

    def transform(self, x: F32, arrays: Arrays) -> F32:
        """x[:, index] of float32 x [tokens, cols]."""
        return np.ascontiguousarray(x[:, arrays["index"][: x.shape[1]]])

    def choose(self, score: F32, hints: Hints) -> npt.NDArray[np.uint32]:
        """What stands at each place, from the hint or, without one, by falling score; of equal ones the first."""
        if "order" in hints:
            return chosen(hints["order"], len(score), len(score), "order")
        return np.argsort(-score, kind="stable").astype(np.uint32)

    def encode_matrix(self, w: F32, hints: Hints) -> dict[str, npt.NDArray[Any]]:
        index = self.choose(np.abs(w).max(axis=0), hints)
        return encode_parts({"0": (self.inner, w[:, index])}, hints, {"index": padded(index)})

    def decode_rows(self, arrays: Arrays, rows: int, cols: int, r0: int, r1: int) -> F32:
        out = np.empty((r1 - r0, cols), np.float32)
        out[:, arrays["index"][:cols]] = decode_branch(self.inner, arrays, "0.", rows, cols, r0, r1)
        return out

    def check_own(self, arrays: Arrays, rows: int, cols: int, where: str) -> None:
        if not np.array_equal(np.sort(arrays["index"][:cols]), np.arange(cols)):
            raise FormatError(f"{where}: array 'index' of {self} must hold each of 0 to {cols - 1} once.")


@dataclass(frozen=True)
class Scale(Composite):
    """The input columns multiplied with factors."""

    inner: Branch

    hints = ("factors",)

    def __str__(self) -> str:
        return f"scale({text(self.inner)})"

    @property
    def parts(self) -> tuple[tuple[str, Branch], ...]:
        return (("0", self.inner),)

    def own_fields(self, rows: int, cols: int) -> dict[str, Field]:
        return {"factors": Field("F32", cols)}

    def transform(self, x: F32, arrays: Arrays) -> F32:
        """x * factors of float32 x [tokens, cols]."""
        product: F32 = x * arrays["factors"][: x.shape[1]]
        return product

    def choose(self, w: F32, hints: Hints) -> F32:
        """The factors, float32 [cols], from the hint or by the rule."""
        if "factors" not in hints:
            size = np.abs(w).max(axis=0)
            return np.sqrt(np.where(size > 0, size, np.float32(1)))
        factors = np.asarray(hints["factors"], np.float32)
        if factors.shape != (w.shape[1],) or not (np.isfinite(factors) & (factors > 0)).all():
            raise FormatError(f"the hint 'factors' of {self} must be {w.shape[1]} positive numbers.")
        return factors

    def encode_matrix(self, w: F32, hints: Hints) -> dict[str, npt.NDArray[Any]]:
        factors = self.choose(w, hints)
        with np.errstate(over="ignore"):
            stored = w / factors
        refuse_infinite(stored, self, "the matrix divided by the factors")
        return encode_parts({"0": (self.inner, stored)}, hints, {"factors": padded(factors.astype("<f4"))})

    def decode_rows(self, arrays: Arrays, rows: int, cols: int, r0: int, r1: int) -> F32:
        with np.errstate(over="ignore"):
            out: F32 = decode_branch(self.inner, arrays, "0.", rows, cols, r0, r1) * arrays["factors"][:cols]
        return out

    def check_own(self, arrays: Arrays, rows: int, cols: int, where: str) -> None:
        factors = arrays["factors"][:cols]
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise FormatError(f"{where}: array 'factors' of {self} must hold positive numbers.")
