"""A product of two thin matrices: ``rankR(F)``, W ~ U V with U [rows, R] and V [R, cols].

    0.…  the arrays of U in the format F
    1.…  the arrays of V in the format F

decode adds the products u_k v_k for k = 0, 1, ..., R - 1 in float32. At run time y = U (V x), and F's input format (or
the one around it) says what x is rounded to before V, and what V x is rounded to before U.

encode is the truncated singular value decomposition, the roots of the singular values on both sides; of a large
matrix a randomized one (Halko, Martinsson & Tropp 2011) with a fixed seed and two power iterations. The component
of each column of U that is largest is positive. Hint ``factors``: (U, V) to store instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats.composite import F32, Arrays, Branch, Composite, Hints, decode_branch, encode_parts, text

__all__ = ["MAX_RANK", "Rank", "truncated_svd"]

F64 = npt.NDArray[np.float64]

MAX_RANK = 65536
EXACT = 1024  # the shorter side up to which the whole decomposition is found
OVERSAMPLE = 16  # more directions than are asked for make a randomized decomposition accurate
BLOCK = 64  # rows decoded at once: their sums stay in the cache


@dataclass(frozen=True)
class Rank(Composite):
    """U V with both factors in one format."""

    rank: int
    inner: Branch

    hints = ("factors",)

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise FormatError(f"rank{self.rank} cannot be; a rank is 1 to {MAX_RANK}, such as rank32(bf16).")
        super().__post_init__()

    def __str__(self) -> str:
        return f"rank{self.rank}({text(self.inner)})"

    @property
    def parts(self) -> tuple[tuple[str, Branch], ...]:
        return (("0", self.inner), ("1", self.inner))

    def children(self, rows: int, cols: int) -> list[tuple[str, Branch, int, int]]:
        return [("0.", self.inner, rows, self.rank), ("1.", self.inner, self.rank, cols)]

    def check_shape(self, rows: int, cols: int) -> None:
        if self.rank > min(rows, cols):
            raise FormatError(
                f"{self} asks for a higher rank than a {rows} x {cols} matrix has; write rank{min(rows, cols)} or less."
            )

    def encode_matrix(self, w: F32, hints: Hints) -> dict[str, npt.NDArray[Any]]:
        if "factors" in hints:
            u, v = (np.asarray(f, np.float32) for f in hints["factors"])
            if u.shape != (len(w), self.rank) or v.shape != (self.rank, w.shape[1]):
                raise FormatError(
                    f"the hint 'factors' must be matrices of {len(w)} x {self.rank} and {self.rank} x {w.shape[1]}, "
                    f"not {u.shape} and {v.shape}."
                )
        else:
            u, v = truncated_svd(w, self.rank)
        return encode_parts({"0": (self.inner, u), "1": (self.inner, v)}, hints)

    def decode_rows(self, arrays: Arrays, rows: int, cols: int, r0: int, r1: int) -> F32:
        u = decode_branch(self.inner, arrays, "0.", rows, self.rank, r0, r1)
        v = decode_branch(self.inner, arrays, "1.", self.rank, cols, 0, self.rank)
        out = np.zeros((r1 - r0, cols), np.float32)
        product = np.empty((BLOCK, cols), np.float32)
        for start in range(0, r1 - r0, BLOCK):
            some = u[start : start + BLOCK]
            for k in range(self.rank):  # one at a time: the sum does not depend on how many rows are asked for
                out[start : start + BLOCK] += np.multiply(some[:, k, None], v[k], out=product[: len(some)])
        return out


def truncated_svd(w: F32, rank: int) -> tuple[F32, F32]:
    """U [rows, rank] and V [rank, cols], the roots of the singular values in both."""
    if w.shape[0] > w.shape[1]:
        v, u = _decompose(w.T, rank)
        u, v = u.T, v.T
    else:
        u, v = _decompose(w, rank)
    sign = np.where(np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0)[0] < 0, -1.0, 1.0)
    return (u * sign).astype(np.float32), (sign[:, None] * v).astype(np.float32)


def _decompose(w: F32, rank: int) -> tuple[F64, F64]:
    """The same for a matrix that is not higher than wide, signs as they come."""
    size = float(np.abs(w).max())
    if size == 0:
        return np.zeros((len(w), rank)), np.zeros((rank, w.shape[1]))
    # Singular vectors do not change with the size of the matrix; a usual one keeps squares within float32.
    unit = 2.0 ** np.floor(np.log2(size))
    probe = rank + OVERSAMPLE
    if len(w) <= EXACT or probe > len(w) // 2:
        wide = w.astype(np.float64) / unit
        u = _eigenvectors(wide @ wide.T, rank)
        v = u.T @ wide
    else:
        scaled = (w / np.float64(unit)).astype(np.float32)
        q = _orthonormal(scaled @ np.random.default_rng(0).standard_normal((w.shape[1], probe), np.float32))
        for _ in range(2):
            q = _orthonormal(scaled @ _orthonormal(scaled.T @ q))
        inner = (q.T @ scaled).astype(np.float64)
        turn = _eigenvectors(inner @ inner.T, rank)
        u, v = q.astype(np.float64) @ turn, turn.T @ inner
    singular = np.linalg.norm(v, axis=1)
    root = np.sqrt(singular)
    unscaled = np.where(singular > 0, np.sqrt(unit) / np.where(root > 0, root, 1), 0)
    return u * (root * np.sqrt(unit)), unscaled[:, None] * v


def _eigenvectors(gram: F64, count: int) -> F64:
    """Those of the largest eigenvalues of a symmetric matrix, the largest first: [n, count]."""
    vectors: F64 = np.linalg.eigh(gram)[1][:, ::-1][:, :count]
    return vectors


def _orthonormal(y: F32) -> F32:
    """An orthonormal basis of the columns of y, zero columns in the place of dependent ones.

    From the Gram matrix, twice because once leaves the rounding of a square: products of thin matrices are much faster
    than a QR decomposition.
    """
    q = y.astype(np.float64)
    for _ in range(2):
        values, vectors = np.linalg.eigh(q.T @ q)
        keep = values > values[-1] * 1e-12
        q = q @ (vectors * np.where(keep, 1 / np.sqrt(np.where(keep, values, 1)), 0))
    return q.astype(np.float32)
