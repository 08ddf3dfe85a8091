"""More bits for the output rows that the loss feels most, ranked over the whole model (MixLLM, Zheng et al. 2024).

The salience of row n of a site is S_n = sum over sequences of |g_n . d_n + 1/2 (g_n . d_n)^2|, where d_n is how
rounding to the narrow format changes the row and g_n is the gradient of that sequence's loss with respect to it: first
order kept, the second by the empirical Fisher of the row. Rows of all sites compete in one list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.compress.allocate.by_role import settle
from gossamer.errors import UsageError
from gossamer.formats import Rows, SiteFormat, parse
from gossamer.formats.splits import MAX_PARTS
from gossamer.models.topology import Site

__all__ = ["Allocation", "Level", "row_salience", "salience"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Allocation:
    """``formats`` of every site, and for those that are split the ``hints`` for ``formats.encode_with``.

    A hint is {"rows": [indices of each part but the last]} or {"columns": ...}, int64 and ascending.
    """

    formats: dict[str, SiteFormat]
    hints: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Level:
    """``percent`` of all rows are stored as ``format``: those of largest ``scores`` that no earlier level took.

    ``scores`` maps site names to float [rows]: what it would cost to store a row in the next narrower format.
    """

    format: SiteFormat
    percent: float
    scores: Mapping[str, npt.NDArray[Any]]


def row_salience(delta: F32, x: F32, dy: F32) -> F64:
    """|g_n . d_n + 1/2 (g_n . d_n)^2| of one sequence: float64 [rows].

    ``delta`` float32 [rows, cols] is the rounded weight less the weight, ``x`` float32 [tokens, cols] the site's input
    and ``dy`` float32 [tokens, rows] the gradient of the sequence's loss with respect to its output. The gradient of
    the weight, dy^T x, is never formed: g_n . d_n is the sum over tokens of dy times the change of the output.
    """
    if x.shape[1] != delta.shape[1] or dy.shape != (len(x), len(delta)):
        raise UsageError(f"inputs {x.shape} and gradients {dy.shape} do not belong to a matrix of shape {delta.shape}.")
    change = np.einsum("tn,tn->n", dy, x @ delta.T, dtype=np.float64)
    found: F64 = np.abs(change + 0.5 * change**2)
    return found


def salience(
    sites: Sequence[Site], levels: Sequence[Level], rest: str | SiteFormat, *, multiple: int = 1
) -> Allocation:
    """Formats of ``sites`` with their most salient rows in those of ``levels`` (widest first) and others in ``rest``.

    A site that gives a level no row, or all of them, gets a plain format. Of equally salient rows those of the site and
    the row that come first are taken. ``multiple`` makes a site's rows of a level a multiple of that, so that panels
    are full (16); 1 is the published method.

    Raises UsageError for percentages outside 0 to 100, scores that do not fit their site or are not finite, and input
    formats that differ between parts.
    """
    narrow = parse(rest) if isinstance(rest, str) else rest
    if not 1 <= len(levels) < MAX_PARTS:
        raise UsageError(
            f"{len(levels)} levels of salience were given; there are 1 to {MAX_PARTS - 1} beside the rest."
        )
    if any(level.percent < 0 for level in levels) or sum(level.percent for level in levels) > 100:
        given = ", ".join(f"{level.percent:g}" for level in levels)
        raise UsageError(f"shares of {given} percent were given to levels of rows; each is 0 or more, all at most 100.")
    if any(level.format.input != narrow.input for level in levels):
        raise UsageError("the rows of a site read one input, so all levels must name the same input format after '@'.")
    total = sum(site.rows for site in sites)
    free = {site.name: np.ones(site.rows, bool) for site in sites}
    taken: dict[str, list[I64]] = {site.name: [] for site in sites}
    for level in levels:
        scores = {site.name: _scores(level.scores, site) for site in sites}
        for name, rows in _top(sites, scores, free, round(level.percent / 100 * total), multiple).items():
            taken[name].append(rows)
            free[name][rows] = False
    formats: dict[str, SiteFormat] = {}
    hints: dict[str, dict[str, Any]] = {}
    for site in sites:
        parts = [(level.format, rows) for level, rows in zip(levels, taken[site.name]) if len(rows)]
        left = int(free[site.name].sum())
        formats[site.name] = settle(_split(parts, narrow, left), site)
        named = parts if left else parts[:-1]
        if named:
            hints[site.name] = {"rows": [rows for _, rows in named]}
    return Allocation(formats, hints)


def _scores(given: Mapping[str, npt.NDArray[Any]], site: Site) -> F64:
    scores = np.asarray(given.get(site.name, ()), np.float64)
    if scores.shape != (site.rows,):
        raise UsageError(f"{site.name} has {site.rows} rows, but {scores.size} saliences were given for it.")
    if not np.isfinite(scores).all():
        raise UsageError(f"the salience of row {int(np.argmin(np.isfinite(scores)))} of {site.name} is not a number.")
    return scores


def _top(
    sites: Iterable[Site], scores: Mapping[str, F64], free: Mapping[str, npt.NDArray[np.bool_]], wanted: int, step: int
) -> dict[str, I64]:
    """About ``wanted`` of the free rows (never more): runs of ``step`` rows of one site compete by their mean score."""
    means, sizes, owners = [], [], []
    orders: list[I64] = []
    for i, site in enumerate(sites):
        rows = np.flatnonzero(free[site.name])
        order = rows[np.argsort(-scores[site.name][rows], kind="stable")]
        orders.append(order)
        starts = np.arange(0, len(order), step)
        if len(starts):
            size = np.diff(np.append(starts, len(order)))
            means.append(np.add.reduceat(scores[site.name][order], starts) / size)
            sizes.append(size)
            owners.append(np.full(len(starts), i))
    counts = np.zeros(len(orders), np.int64)
    if means and wanted > 0:
        mean, size, owner = (np.concatenate(parts) for parts in (means, sizes, owners))
        best = np.argsort(-mean, kind="stable")
        # Runs of a site are in falling order, so that what is taken of a site is always its best rows.
        kept = best[np.cumsum(size[best]) <= wanted]
        counts = np.bincount(owner[kept], weights=size[kept], minlength=len(orders)).astype(np.int64)
    return {site.name: np.sort(order[:n]) for site, order, n in zip(sites, orders, counts)}


def _split(parts: list[tuple[SiteFormat, I64]], narrow: SiteFormat, left: int) -> SiteFormat:
    """One format where all rows are alike, else rows(...) with the last part uncounted."""
    weights = [fmt.weight for fmt, _ in parts] + ([narrow.weight] if left else [])
    if len(weights) == 1:
        return SiteFormat(weights[0], narrow.input)
    counts = [len(rows) for _, rows in parts][: len(weights) - 1]
    return SiteFormat(Rows(tuple(counts), tuple(weights)), narrow.input)
