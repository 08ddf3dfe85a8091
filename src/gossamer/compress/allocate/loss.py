"""How much a change of a weight matrix is predicted to cost, to second order, and the bytes of a format.

With H = E[x x^T] over the inputs of a site, tr(D H D^T) is the mean squared change of its output when its weight
changes by D [rows, cols]. The loss of the model changes by 1/2 sum_n G_n (D H D^T)_nn where its curvature is taken as
the Kronecker product of H and a diagonal G_n = E[(dL/dy_n)^2] (Martens & Grosse 2015, with a diagonal output factor).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import UsageError
from gossamer.formats import Format

__all__ = ["output_error", "packed_bytes", "second_order"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

ROWS = 256  # of the change, multiplied with H at once


def output_error(delta: F32, hessian: F32) -> F64:
    """(D H D^T)_nn for each output n: float64 [rows]; ``delta`` float32 [rows, cols], ``hessian`` [cols, cols]."""
    rows, cols = delta.shape
    if hessian.shape != (cols, cols):
        raise UsageError(
            f"a Hessian of {hessian.shape} was given for a matrix of {rows} x {cols}; it must be {cols}^2."
        )
    found = np.empty(rows, np.float64)
    for r in range(0, rows, ROWS):
        part = delta[r : r + ROWS]
        found[r : r + ROWS] = np.einsum("nk,nk->n", part @ hessian, part, dtype=np.float64)
    # Rounding can leave a tiny negative sum where H is singular.
    return np.maximum(found, 0)


def second_order(delta: F32, hessian: F32, out_fisher: npt.NDArray[Any] | None = None) -> float:
    """1/2 sum_n G_n (D H D^T)_nn with ``out_fisher`` G float [rows]; without it tr(D H D^T), no factor.

    The first is in nats per token if G is; the second is the mean squared change of the output, summed over outputs.
    """
    error = output_error(delta, hessian)
    if out_fisher is None:
        return float(error.sum())
    if np.shape(out_fisher) != error.shape:
        raise UsageError(f"{np.size(out_fisher)} output weights were given for a matrix of {len(error)} rows.")
    return float(0.5 * (np.asarray(out_fisher, np.float64) @ error))


def packed_bytes(fmt: Format, rows: int, cols: int) -> int:
    """Bytes of all arrays of a matrix of this shape, padding counted; an estimate from above where a mask is in it."""
    fmt.check(rows, cols)
    return sum(field.nbytes for field in fmt.fields(rows, cols).values())
