"""How many columns share a scale, matrix by matrix, and which groups of columns get more bits.

``group_size`` is FineQuant's (Kim et al. 2023): a matrix keeps one group size, the largest whose range would not shrink
enough by going further. The paper gives no threshold; ``alpha``, the list of sizes and the guard against outliers are
ours. ``wide_groups`` follows "Enabling Fast 2-bit LLM on GPUs" (Li et al. 2023): of every aligned block of groups a
fixed number is stored wider. There each row chooses its own groups; a split here is of whole columns, so one choice
holds for all rows of a matrix. The rest is the same: rows of equal length, aligned groups, as many wide ones per block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.compress.allocate.by_role import settle
from gossamer.compress.allocate.salience import Allocation
from gossamer.errors import UsageError
from gossamer.formats import Cols, SiteFormat, parse, project
from gossamer.models.topology import Site

__all__ = ["ALPHA", "SCORES", "aligned", "finequant", "group_scores", "group_size", "wide_groups"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

ALPHA = 0.9  # a smaller group must shrink the mean range to less than this share
OUTLIER = 30.0  # max|w| over root mean square of a row, above which groups are at most GUARDED columns
GUARDED = 128
SIZES = (1024, 512, 256, 128, 64, 32, 16)
SCORES = ("error", "range", "hessian-range")
ROWS = 512  # of a matrix scored at once


def group_size(w: F32, *, alpha: float = ALPHA, least: int = 64) -> int | None:
    """Columns of w float32 [rows, cols] that share a scale; None: a whole row.

    From a row down over the powers of two from 1024 to ``least`` that divide cols: a smaller group is taken while it
    shrinks the mean over all groups of max|w| below ``alpha`` times what it was; once, a step that does not is passed
    over if the one after it does. Where the max|w| of any row is more than 30 times its root mean square, the group
    has at most 128 columns, if one that small divides.
    """
    if not 0 < alpha < 1:
        raise UsageError(
            f"alpha {alpha:g} is out of range; a smaller group must shrink the range below 0 to 1 times it."
        )
    cols = w.shape[1]
    sizes: list[int | None] = [None, *(g for g in SIZES if least <= g < cols and cols % g == 0)]
    ranges = _ranges(w, sizes)
    at, escaped = 0, False
    while at + 1 < len(sizes):
        if ranges[at + 1] < alpha * ranges[at]:
            at += 1
        elif not escaped and at + 2 < len(sizes) and ranges[at + 2] < alpha * ranges[at + 1]:
            at, escaped = at + 2, True
        else:
            break
    if _has_outliers(w):
        small = [i for i, size in enumerate(sizes) if size is not None and size <= GUARDED]
        at = max(at, small[0]) if small else at
    return sizes[at]


def _ranges(w: F32, sizes: Sequence[int | None]) -> list[float]:
    """The mean over all groups of max|w| for each size."""
    rows, cols = w.shape
    sums = np.zeros(len(sizes))
    for r in range(0, rows, ROWS):
        part = np.abs(w[r : r + ROWS])
        for i in reversed(range(len(sizes))):
            width = sizes[i] or cols
            part = part.reshape(len(part), cols // width, -1).max(
                axis=2
            )  # of the groups before: each size divides the next
            sums[i] += part.sum(dtype=np.float64)
    return [float(total / (rows * (cols // (size or cols)))) for total, size in zip(sums, sizes)]


def _has_outliers(w: F32) -> bool:
    for r in range(0, len(w), ROWS):
        part = w[r : r + ROWS]
        square = np.einsum("nk,nk->n", part, part, dtype=np.float64) / w.shape[1]
        if (np.abs(part).max(axis=1) > OUTLIER * np.sqrt(square)).any():
            return True
    return False


def finequant(
    sites: Sequence[Site],
    read: Callable[[Site], F32],
    *,
    number: str = "int4",
    input: str = "bf16",
    alpha: float = ALPHA,
    least: int = 64,
) -> dict[str, SiteFormat]:
    """``number`` with the group size of each site's own matrix, which ``read`` gives as float32 [rows, cols]."""
    found = {}
    for site in sites:
        size = group_size(read(site), alpha=alpha, least=least)
        found[site.name] = settle(f"{number}/{'row' if size is None else f'g{size}'} @ {input}", site)
    return found


# ---------------------------------------------------------------- wide groups of columns


def group_scores(w: F32, narrow: SiteFormat, group: int, inverse: F32 | None = None, score: str = "error") -> F64:
    """What each group of ``group`` columns would gain by more bits: float64 [groups].

    score "error": the squared error of ``narrow`` rounding, each column's divided by ``inverse``, the diagonal of the
    inverse Hessian float32 [cols] (without one, plain); "range": the mean over rows of max - min; "hessian-range": that
    times the mean of 1 / inverse over the group.
    """
    cols = w.shape[1]
    if score not in SCORES:
        raise UsageError(f"'{score}' scores no groups; choose {', '.join(SCORES)}.")
    weight = np.ones(cols) if inverse is None else 1 / np.asarray(inverse, np.float64)
    if weight.shape != (cols,) or not np.isfinite(weight).all() or (weight <= 0).any():
        raise UsageError(f"the diagonal of the inverse Hessian must be {cols} positive numbers.")
    starts = np.arange(0, cols, group)
    if score == "error":
        delta = project(narrow.weight, w) - w
        square = np.einsum("nk,nk->k", delta, delta, dtype=np.float64)
        error: F64 = np.add.reduceat(square * weight, starts)
        return error
    spread = np.maximum.reduceat(w, starts, axis=1) - np.minimum.reduceat(w, starts, axis=1)
    found: F64 = spread.mean(axis=0, dtype=np.float64)
    if score == "hessian-range":
        found = found * np.add.reduceat(weight, starts) / np.diff(np.append(starts, cols))
    return found


def aligned(scores: npt.NDArray[Any], block: int, wide: int) -> I64:
    """The ``wide`` best of every ``block`` consecutive groups, ascending; of equal ones those that come first.

    A last block with fewer groups gives its share, rounded to the nearest (halves to even).
    """
    if block < 1 or not 0 <= wide <= block:
        raise UsageError(f"{wide} wide groups in a block of {block} cannot be; choose 0 to {block} of at least 1.")
    chosen = []
    for start in range(0, len(scores), block):
        part = np.asarray(scores[start : start + block], np.float64)
        count = wide if len(part) == block else round(wide * len(part) / block)
        chosen.append(start + np.argsort(-part, kind="stable")[:count])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def wide_groups(
    sites: Sequence[Site],
    read: Callable[[Site], F32],
    *,
    wide: str,
    narrow: str,
    group: int = 16,
    block: int = 4,
    count: int = 1,
    inverse: Callable[[Site], F32] | None = None,
    score: str = "error",
) -> Allocation:
    """``cols(N: wide, narrow)`` for every site, N columns in the ``count`` best groups of every ``block``.

    ``wide`` and ``narrow`` are weight expressions, the second perhaps with a mask (outliers in narrow groups alone);
    ``read`` gives a site's weight and ``inverse`` the diagonal of its inverse Hessian. A count of 0 or of the whole
    block gives the plain format. Groups stay whole and in order, so each keeps the scales it would have alone.
    """
    wider, narrower = parse(wide), parse(narrow)
    if wider.input != narrower.input:
        raise UsageError(
            "the columns of a site are rounded alike, so wide and narrow must name the same input after '@'."
        )
    formats: dict[str, SiteFormat] = {}
    hints: dict[str, dict[str, Any]] = {}
    for site in sites:
        groups = -(-site.cols // group)
        if count in (0, block):
            best = aligned(np.zeros(groups), block, count)
        else:
            scores = group_scores(read(site), narrower, group, inverse(site) if inverse else None, score)
            best = aligned(scores, block, count)
        columns = (best[:, None] * group + np.arange(group)).ravel()
        columns = columns[columns < site.cols]
        if len(columns) in (0, site.cols):
            formats[site.name] = settle(wider if len(columns) else narrower, site)
            continue
        split = Cols((len(columns),), (wider.weight, narrower.weight))
        formats[site.name] = settle(SiteFormat(split, narrower.input), site)
        hints[site.name] = {"columns": [columns]}
    return Allocation(formats, hints)
