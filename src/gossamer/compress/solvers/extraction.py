"""Which entries or columns are kept apart in more bits.

Entries go to a ``mask(P%: F)``, which is added to what the codes give; columns to ``cols(N: F, ...)``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gossamer.errors import UsageError
from gossamer.formats.composite import largest

__all__ = ["SENSITIVE", "by_error", "by_magnitude", "by_sensitivity", "columns", "columns_above"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SENSITIVE = 0.05  # percent of the entries that SqueezeLLM keeps for their sensitivity


def columns(absmax: F32, count: int) -> I64:
    """The ``count`` input columns of largest max|x|, ascending; of equal ones those that come first.

    The outlier columns of QUIK (Ashkboos et al. 2023, section 3): by the input, not by the weight. Sites that share an
    input get the same ones.
    """
    return largest(_finite(absmax), count).astype(np.int64)


def columns_above(absmax: F32, threshold: float = 6.0) -> I64:
    """The columns in which some |x| reaches ``threshold``: those of LLM.int8() (Dettmers et al. 2022, section 3.2)."""
    return np.flatnonzero(_finite(absmax) >= threshold)


def by_magnitude(w: F32, count: int) -> Bools:
    """The ``count`` largest |w|, bool [rows, cols]; of equal ones those that come first. Zeros are never kept."""
    return _top(np.abs(w), count)


def by_error(error: F32, square: F32 | None, count: int) -> Bools:
    """The ``count`` entries of largest E[x_k^2] error^2: what one entry adds to the output's error on its own."""
    score = error.astype(np.float32) ** 2
    return _top(score if square is None else score * square, count)


def by_sensitivity(
    w: F32, fisher: F32, count: int, *, sensitive: float = SENSITIVE, reach: float | None = None
) -> Bools:
    """SqueezeLLM's extraction (Kim et al. 2024, section 4.2): first the sensitive entries, then the outliers.

    fisher: the mean over sequences of (dL/dw)^2, [rows, cols]. Kept are the ``sensitive`` percent of the entries of
    largest Fisher information (no more than ``count``), then of the others the largest |w|, to ``count`` in all. With
    ``reach``, only those beyond the quartiles: |w| >= max(|Q1 - reach IQR|, |Q3 + reach IQR|), 1.5 to 2 in the paper.
    """
    if fisher.shape != w.shape:
        raise UsageError(f"Fisher information of a {w.shape[0]} x {w.shape[1]} matrix cannot be {fisher.shape}.")
    if not np.isfinite(fisher).all() or fisher.min(initial=0) < 0:
        raise UsageError("Fisher information holds a NaN, an infinity or a negative number; collect it again.")
    kept = _top(fisher, min(count, round(sensitive / 100 * w.size)))
    size = np.where(kept, 0, np.abs(w))
    if reach is not None:
        low, high = np.percentile(w, [25, 75])
        edge = max(abs(low - reach * (high - low)), abs(high + reach * (high - low)))
        size[size < edge] = 0
    return kept | _top(size, count - int(np.count_nonzero(kept)))


def _finite(absmax: F32) -> F32:
    if not np.isfinite(absmax).all():
        raise UsageError(
            "the input's ranges hold a NaN or an infinity, so outlier columns cannot be told; calibrate again."
        )
    return absmax


def _top(score: F32, count: int) -> Bools:
    """The ``count`` largest positive scores, of equal ones those that come first: bool, the shape of ``score``."""
    flat = score.ravel()
    kept = np.zeros(len(flat), np.bool_)
    count = min(count, len(flat))
    if count > 0:
        least = np.partition(flat, len(flat) - count)[len(flat) - count]
        kept = flat > max(least, 0)
        if least > 0:
            ties = np.flatnonzero(flat == least)
            kept[ties[: count - int(np.count_nonzero(kept))]] = True
    return kept.reshape(score.shape)
