"""The Hessian's part of a solve: damping, column order, and the Cholesky factor of the inverse."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gossamer.errors import UsageError

__all__ = ["UnstableError", "check_hessian", "describe", "inverse_factor", "order_of"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]

DOUBLE = 8192  # columns up to which factors are computed in float64; beyond, float32 halves the memory
PANEL = 256


class UnstableError(Exception):
    """The factor cannot be computed, or what was solved with it is out of all proportion: damp more."""


def check_hessian(hessian: F32, cols: int, where: str) -> Bools:
    """Refuses a matrix that is no second moment of inputs. Returns which inputs were never other than zero [cols]."""
    if hessian.shape != (cols, cols):
        raise UsageError(
            f"{where} has {cols} columns but the second moments of its inputs are {hessian.shape}; collect them for "
            "this model."
        )
    diagonal = np.diagonal(hessian)
    if not np.isfinite(diagonal).all() or (diagonal < 0).any() or not _finite(hessian):
        raise UsageError(
            f"the second moments of the inputs of {where} hold NaN, infinite or negative variances, so nothing can be "
            "fitted to them; check the calibration text and the checkpoint."
        )
    return np.asarray(diagonal == 0)


def _finite(x: F32) -> bool:
    return all(bool(np.isfinite(x[r : r + 1024]).all()) for r in range(0, len(x), 1024))


def order_of(hessian: F32, order: str, last: I64) -> I64:
    """All columns, int64 [cols], in the order of the sweep: "none" as they are, "act" by falling variance of the
    input; the columns ``last`` at the end."""
    columns = np.arange(len(hessian))
    if order == "act":
        columns = np.argsort(-np.diagonal(hessian), kind="stable")
    late = np.isin(columns, last)
    return np.concatenate([columns[~late], columns[late]])


def inverse_factor(hessian: F32, columns: I64, dead: Bools, damping: float) -> F32:
    """U, float32 [cols, cols], upper triangular, with U^T U = (H + damping * mean variance * 1)^-1.

    H is ``hessian`` with rows and columns in the order ``columns``; inputs that are ``dead`` (in the order of
    ``hessian``) get the mean variance, so that they take part in nothing. Raises UnstableError where H is not positive
    definite enough. No inverse is formed: with the columns reversed H = R R^T, R upper, and U = R^-1.
    """
    kind = np.float64 if len(columns) <= DOUBLE else np.float32
    back = columns[::-1]
    work: Floats = np.empty(hessian.shape, kind)
    for r in range(0, len(back), 1024):
        work[r : r + 1024] = hessian[back[r : r + 1024]][:, back]
    none = dead[back]
    if none.any():
        work[none] = 0
        work[:, none] = 0
    live = np.diagonal(hessian)[~dead].astype(np.float64)
    mean = float(live.mean()) if len(live) else 1.0
    at = np.arange(len(back))
    work[at, at] += np.where(none, (1 + damping) * mean, damping * mean).astype(kind)
    _cholesky(work)
    _invert_lower(work)
    upper: F32 = work.astype(np.float32, copy=False)
    del work
    _turn(upper.ravel())
    if not np.isfinite(np.diagonal(upper)).all() or not (np.diagonal(upper) > 0).all():
        raise UnstableError
    return upper


def _cholesky(a: Floats) -> None:
    """The lower Cholesky factor of a, in its place."""
    n = len(a)
    for i in range(0, n, PANEL):
        j = min(n, i + PANEL)
        if i:
            a[i:, i:j] -= a[i:, :i] @ a[i:j, :i].T
        try:
            corner = np.linalg.cholesky(a[i:j, i:j])
        except np.linalg.LinAlgError:
            raise UnstableError from None
        a[i:j, i:j] = corner
        a[i:j, j:] = 0
        if j < n:
            a[j:, i:j] = a[j:, i:j] @ np.linalg.inv(corner).T


def _invert_lower(a: Floats) -> None:
    """The inverse of a lower triangular matrix, in its place."""
    n = len(a)
    if n <= PANEL // 2:
        a[...] = np.tril(np.linalg.inv(a))
        return
    h = n // 2
    _invert_lower(a[:h, :h])
    _invert_lower(a[h:, h:])
    a[h:, :h] = -(a[h:, h:] @ (a[h:, :h] @ a[:h, :h]))


def _turn(a: F32) -> None:
    """Reverses the elements, in their place: for a matrix, its rows and its columns."""
    n = len(a)
    for i in range(0, n // 2, 1 << 20):
        j = min(n // 2, i + (1 << 20))
        first = a[i:j].copy()
        a[i:j] = a[n - j : n - i][::-1]
        a[n - j : n - i] = first[::-1]


def describe(hessian: F32) -> str:
    """The extreme eigenvalues of H and their ratio, roughly and in words, by power iteration: for messages."""
    rng = np.random.default_rng(0)
    bound = np.float32(max(np.abs(row).sum(dtype=np.float64) for row in hessian))  # of every eigenvalue

    def extreme(sign: int) -> float:
        v = rng.standard_normal(len(hessian)).astype(np.float32)
        for _ in range(60):
            v = bound * v + np.float32(sign) * (hessian @ v)
            v /= np.linalg.norm(v) or np.float32(1)
        return float(v @ (hessian @ v))

    largest, smallest = extreme(1), extreme(-1)
    ratio = f"{largest / smallest:.1e}" if smallest > 0 else "infinite"
    return f"eigenvalues from {smallest:.1e} to {largest:.1e}, condition {ratio}"
