"""Weighted one-dimensional k-means for tables of values: ``kmeansB/row`` and ``kmeansB/tensor``.

Minimises sum_k F_k (w_k - table[c_k])^2 for each output row, or for the matrix. With F the diagonal Fisher information
this is the sensitivity-weighted clustering of SqueezeLLM (Kim et al. 2024, section 4.1). Rows are sorted once, and
every update is exact from prefix sums; nothing is drawn, so there is no seed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gossamer.errors import UsageError
from gossamer.formats import ArraySource, KMeans, Packed, allocate, encode
from gossamer.formats.composite import refuse_infinite
from gossamer.formats.kmeans import cluster, nearest

__all__ = ["lloyd", "objective"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

ROUNDS = 50  # Lloyd iterations at most, from each start
ELEMENTS = 1 << 21  # worked on at once: a few float64 temporaries of 16 MB
BUCKET_BITS = 20  # of a float32: values of a tensor's table that share their upper 20 bits count as one


def lloyd(
    fmt: KMeans, w: F32, weights: F32 | None = None, *, without: Bools | None = None, where: str = "the matrix"
) -> Packed:
    """Stores float32 w [rows, cols] with tables of least weighted squared error, every entry in its nearest place.

    weights: not negative, [cols] or [rows, cols]; their unit does not matter. None, or one value everywhere, is plain
    k-means, the same as ``encode``. Rows whose weights are all zero count every entry alike. without: bool [rows,
    cols], entries that are stored elsewhere: they do not move the tables, but have codes like all.
    Never worse, by its objective, than plain k-means or abs-max rounding to the same number of bits.
    Raises FormatError for NaN or infinite entries of w, UsageError for weights that are NaN, infinite or negative.
    """
    rows, cols = w.shape
    fmt.check(rows, cols)
    refuse_infinite(w, fmt, where)
    if weights is not None:
        weights = _checked(weights, rows, cols, where)
    if without is not None and without.shape != w.shape:
        raise UsageError(f"the entries of {where} that are kept out must be {rows} x {cols} truth values.")
    if (without is None or not without.any()) and (weights is None or (weights == weights.flat[0]).all()):
        return encode(fmt, ArraySource(w), where)
    arrays = allocate(fmt, rows, cols)
    step = max(16, ELEMENTS // cols // 16 * 16)
    table = None if fmt.per == "row" else _table_of_tensor(w, weights, without, 1 << fmt.bits, step)
    for r in range(0, rows, step):
        some = w[r : r + step]
        own = table
        if own is None:
            own = _tables(some, *_part(weights, without, r, r + len(some), cols), 1 << fmt.bits)
        fmt.pack_rows(nearest(some, own), own, arrays, r)
    return Packed(fmt, (rows, cols), arrays)


def objective(w: F32, values: F32, weights: F32 | None = None) -> F64:
    """sum_k F_k (w_k - value_k)^2 of each row, float64 [rows]."""
    square = (w.astype(np.float64) - values) ** 2
    return np.asarray((square if weights is None else square * weights).sum(axis=1))


def _checked(weights: F32, rows: int, cols: int, where: str) -> F32:
    weights = np.asarray(weights)
    if weights.shape not in ((cols,), (rows, cols)):
        raise UsageError(
            f"the weights of {where} must be [{cols}] or [{rows}, {cols}], not {list(weights.shape)}; collect "
            "them again."
        )
    if not np.isfinite(weights).all() or weights.min() < 0:
        raise UsageError(
            f"the weights of {where} hold a NaN, an infinity or a negative number, so nothing can be weighed with "
            "them; collect them again."
        )
    return weights


def _part(weights: F32 | None, without: Bools | None, r0: int, r1: int, cols: int) -> tuple[F64, Bools]:
    """Weights float64 [n, cols] of rows r0..r1, zero where an entry is kept out, and which are not kept out."""
    inside = np.ones((r1 - r0, cols), np.bool_) if without is None else ~without[r0:r1]
    some: npt.NDArray[np.floating] | float = 1.0
    if weights is not None:
        some = weights if weights.ndim == 1 else weights[r0:r1]
    return np.where(inside, some, 0).astype(np.float64), inside


def _tables(w: F32, f: F64, inside: Bools, k: int) -> F32:
    """Ascending tables of k values for each row, float32 [n, k]."""
    largest = f.max(axis=1, keepdims=True)
    # A row without weights counts what is inside alike; one that is kept out as a whole, everything.
    f = np.where(largest > 0, f / np.where(largest > 0, largest, 1), inside | ~inside.any(axis=1, keepdims=True))
    # What has no weight repeats an entry that has: it is no distinct value, and no start lies on it.
    w = np.where(f > 0, w, np.take_along_axis(w, f.argmax(axis=1)[:, None], axis=1))
    order = np.argsort(w, axis=1, kind="stable")
    return _best(np.take_along_axis(w, order, axis=1).astype(np.float64), np.take_along_axis(f, order, axis=1), k)


def _best(p: F64, f: F64, k: int) -> F32:
    """The best of Lloyd's iteration from three starts, float32 [n, k]: p ascending [n, m], f not negative.

    The starts are the bins' optimum under f, plain k-means, and abs-max rounding. The iteration never raises the
    objective, so the result is no worse than any of them.
    """
    mass, moment = _prefix(f), _prefix(f * p)
    inside = (f > 0).astype(np.float64)
    starts = (cluster(p, f, k), cluster(p, inside, k), _rounding(p, k))
    best = starts[0].copy()
    least = _cost(best, p, mass, moment)
    noise = 1e-12 * (f * p * p).sum(axis=1)  # of the sums: less is no improvement
    for start in starts:
        for table in (start, _iterate(p, mass, moment, start.astype(np.float64)).astype(np.float32)):
            cost = _cost(table, p, mass, moment)
            better = cost < least - noise
            best[better], least[better] = table[better], cost[better]
    return best


def _rounding(p: F64, k: int) -> F32:
    """The values of abs-max rounding: s (c - k/2), the extreme of each row on -k/2."""
    extreme = np.where(-p[:, 0] >= p[:, -1], p[:, 0], p[:, -1])
    s = (extreme / -(k // 2)).astype(np.float32)
    return np.sort(s[:, None] * (np.arange(k, dtype=np.float32) - k // 2), axis=1)


def _prefix(x: F64) -> F64:
    return np.concatenate([np.zeros((len(x), 1)), np.cumsum(x, axis=1)], axis=1)


def _cuts(p: F64, table: F64) -> I64:
    """Where in the ascending points of each row the share of each value begins, and the end: [n, k + 1]."""
    middle = (table[:, 1:] + table[:, :-1]) / 2
    inner = np.array([np.searchsorted(a, b, side="right") for a, b in zip(p, middle)])
    return np.concatenate([np.zeros((len(p), 1), np.int64), inner, np.full((len(p), 1), p.shape[1])], axis=1)


def _shares(p: F64, mass: F64, moment: F64, table: F64) -> tuple[F64, F64]:
    """The weight, and the weighted sum, of what is nearest to each value: [n, k]."""
    cuts = _cuts(p, table)
    return np.diff(np.take_along_axis(mass, cuts, axis=1), axis=1), np.diff(
        np.take_along_axis(moment, cuts, axis=1), axis=1
    )


def _cost(table: F32, p: F64, mass: F64, moment: F64) -> F64:
    """The objective less sum f p^2, which no table changes: [n]."""
    t = table.astype(np.float64)
    share, total = _shares(p, mass, moment, t)
    return np.asarray((t * (t * share - 2 * total)).sum(axis=1))


def _iterate(p: F64, mass: F64, moment: F64, table: F64) -> F64:
    """Values moved to the weighted mean of what is nearest until nothing changes; only rows that still move."""
    table = np.sort(table, axis=1)
    moving = np.arange(len(p))
    for _ in range(ROUNDS):
        share, total = _shares(p[moving], mass[moving], moment[moving], table[moving])
        # A value that nothing is nearest to stays; rounding of the sums may take a mean past its neighbour.
        moved = np.sort(np.where(share > 0, total / np.where(share > 0, share, 1), table[moving]), axis=1)
        changed = (moved != table[moving]).any(axis=1)
        table[moving] = moved
        moving = moving[changed]
        if not len(moving):
            break
    return table


def _table_of_tensor(w: F32, weights: F32 | None, without: Bools | None, k: int, step: int) -> F32:
    """The table of a whole matrix, float32 [1, k], from weighted means of buckets of near values."""
    shift = np.uint32(32 - BUCKET_BITS)
    mass, total = np.zeros(1 << BUCKET_BITS), np.zeros(1 << BUCKET_BITS)
    plain, plain_total = mass.copy(), mass.copy()
    for r in range(0, len(w), step):
        x = w[r : r + step] + np.float32(0)  # one zero
        f, inside = _part(weights, without, r, r + len(x), x.shape[1])
        bucket = (x.view(np.uint32) >> shift).astype(np.int64).ravel()
        for into, values in ((mass, f), (total, f * x), (plain, inside), (plain_total, inside * x)):
            into += np.bincount(bucket, values.ravel().astype(np.float64), minlength=len(into))
    if not mass.any():
        mass, total = plain, plain_total
    if not mass.any():  # everything is kept out: any table does
        return np.zeros((1, k), np.float32)
    used = mass > 0
    mean = total[used] / mass[used]
    order = np.argsort(mean, kind="stable")
    f = mass[used][order]
    return _best(mean[None, order], f[None] / f.max(), k)
