"""Low-rank compensation: factors U V of what a format leaves of a matrix, E = W - W_hat.

With S the root of the input's second moments, ||(E - U V) S||_F is the error of the output. The best U of rank r is
spanned by the first r left singular vectors P of E S, and V then projects: U V = P P^T E, for every S. So no inverse of
S is needed, however singular it is. Stored are U = P Sigma^(1/2) and V = Sigma^(-1/2) P^T E, Sigma the singular values
of E S, so that both factors have entries of one size (in the units of W and of the whitened input).

    plain     S = I           LoRC: Yao et al. 2023, ZeroQuant-V2, section 5
    rms       S = diag(rms x) the diagonal of H alone, as ASVD (Yuan et al. 2023) scales
    whiten    S S^T = H       whitening: SVD-LLM (Wang et al. 2025, section 3.1), EoRA (Liu et al. 2024)
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from gossamer.errors import UsageError
from gossamer.formats.lowrank import truncated_svd

__all__ = ["SCALINGS", "Scaling", "factors", "root"]

F32 = npt.NDArray[np.float32]

Scaling = Literal["plain", "rms", "whiten"]
SCALINGS: tuple[str, ...] = get_args(Scaling)

FLOOR = 1e-4  # of the largest rms: a channel that calibration never saw still counts a little
DAMPING = 1e-8  # of the mean of H's diagonal, the first tried; ten times more while the factorization fails
MOST_DAMPING = 1e-2


def factors(
    error: F32,
    rank: int,
    scaling: Scaling = "plain",
    *,
    hessian: F32 | None = None,
    square: F32 | None = None,
    where: str = "the matrix",
    log: list[str] | None = None,
) -> tuple[F32, F32]:
    """U [rows, rank] and V [rank, cols], float32, of least error of the output among products of that rank.

    error: float32 [rows, cols]. hessian: E[x x^T] [cols, cols], for ``whiten``; square: E[x^2] [cols], for ``rms``.
    A rank above min(rows, cols) is filled with zeros. Raises UsageError where what the scaling needs is missing, has
    NaNs or cannot be factorized.
    """
    rows, cols = error.shape
    most = min(rank, rows, cols)
    if scaling == "plain":
        u, v = truncated_svd(error, most)
    elif scaling == "rms":
        if square is None:
            raise UsageError(
                f"low-rank factors of {where} scaled by rms need the mean squares of its input; calibrate."
            )
        u, v = _projected(error, error * _rms(square, where), most)
    elif scaling == "whiten":
        if hessian is None:
            raise UsageError(f"whitened low-rank factors of {where} need the second moments of its input; calibrate.")
        u, v = _projected(error, error @ root(hessian, where, log).astype(np.float32), most)
    else:
        raise UsageError(f"low-rank scaling '{scaling}' is not known; there are {', '.join(SCALINGS)}.")
    if most == rank:
        return u, v
    return np.pad(u, ((0, 0), (0, rank - most))), np.pad(v, ((0, rank - most), (0, 0)))


def _projected(error: F32, scaled: F32, rank: int) -> tuple[F32, F32]:
    """U = P Sigma^(1/2), V = Sigma^(-1/2) P^T E with the singular values and left vectors of E S."""
    u, _ = truncated_svd(scaled, rank)
    wide = u.astype(np.float64)
    sigma = (wide**2).sum(axis=0)  # the columns of u are root(sigma) times unit vectors
    v = (wide.T @ error) / np.where(sigma > 0, sigma, 1)[:, None]
    v[sigma == 0] = 0
    return u, v.astype(np.float32)


def _rms(square: F32, where: str) -> F32:
    if not np.isfinite(square).all() or (square < 0).any():
        raise UsageError(f"the mean squares of the input of {where} are not finite, so its error cannot be scaled.")
    rms = np.sqrt(square.astype(np.float64))
    largest = float(rms.max(initial=0))
    return np.maximum(rms / largest, FLOOR).astype(np.float32) if largest > 0 else np.ones(len(square), np.float32)


def root(hessian: F32, where: str, log: list[str] | None = None) -> npt.NDArray[np.float64]:
    """The lower Cholesky factor of H plus as little of the mean of its diagonal as lets it exist: float64 [cols, cols].

    A larger damping than the first is logged. Raises UsageError where even a hundredth of the mean is too little.
    """
    if not np.isfinite(hessian).all() or np.diagonal(hessian).min() < 0:
        raise UsageError(
            f"the second moments of the input of {where} hold a NaN, an infinity or a negative number; calibrate again."
        )
    h = hessian.astype(np.float64)
    mean = float(np.trace(h)) / len(h)
    if mean == 0:
        return np.eye(len(h))  # an input that is always zero: nothing to weigh
    diagonal = np.einsum("ii->i", h)
    damping, added = DAMPING, 0.0
    while damping <= MOST_DAMPING:
        diagonal += (damping - added) * mean
        added = damping
        try:
            return np.asarray(np.linalg.cholesky(h))
        except np.linalg.LinAlgError:
            damping *= 10
            if log is not None:
                log.append(
                    f"{where}: H is singular, its damping for low rank raised to {damping:g} of the mean diagonal"
                )
    raise UsageError(
        f"the second moments of the input of {where} are not positive definite even with {MOST_DAMPING:g} of their "
        "mean added; calibrate with more tokens."
    )
