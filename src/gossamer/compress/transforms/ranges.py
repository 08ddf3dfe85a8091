"""Ranges of weights and inputs by channel, and statistics of an input after a map."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from gossamer.compress.maps import Diagonal, Map, Order
from gossamer.compress.statistics import Statistics
from gossamer.formats.node import ROWS_PER_STEP
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.topology import Site, Topology

__all__ = ["by_producer", "column_absmax", "moved", "read", "row_absmax"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def read(checkpoint: Checkpoint, site: Site) -> F32:
    """The whole matrix, float32 [rows, cols]."""
    source, out = checkpoint.source(site), np.empty((site.rows, site.cols), np.float32)
    for r in range(0, site.rows, ROWS_PER_STEP):
        out[r : r + ROWS_PER_STEP] = source.read(r, min(site.rows, r + ROWS_PER_STEP))
    return out


def column_absmax(checkpoint: Checkpoint, sites: Iterable[Site]) -> F64:
    """max |w| of each column over all rows of all sites, which have equally many columns."""
    found: F64 | None = None
    for site in sites:
        source = checkpoint.source(site)
        for r in range(0, site.rows, ROWS_PER_STEP):
            part = np.abs(source.read(r, min(site.rows, r + ROWS_PER_STEP))).max(axis=0).astype(np.float64)
            found = part if found is None else np.maximum(found, part)
    assert found is not None
    return found


def row_absmax(checkpoint: Checkpoint, site: Site) -> F64:
    """max |w| of each row."""
    source, out = checkpoint.source(site), np.empty(site.rows)
    for r in range(0, site.rows, ROWS_PER_STEP):
        out[r : r + ROWS_PER_STEP] = np.abs(source.read(r, min(site.rows, r + ROWS_PER_STEP))).max(axis=1)
    return out


def by_producer(topology: Topology, producer: str, columns: npt.NDArray[np.floating], how: str = "max") -> F64:
    """Values for each column of the consumers as one for each channel of the producer.

    Where several columns read one channel (values under grouped queries) it is their "max" or "mean".
    """
    attention = topology.values_of(producer)
    values = np.asarray(columns, np.float64)
    if attention is None:
        return values
    heads = attention.by_kv(values)
    joined: F64 = (heads.max(axis=1) if how == "max" else heads.mean(axis=1)).reshape(-1)
    return joined


def moved(statistics: Statistics, maps: Iterable[Map]) -> Statistics:
    """Statistics of M x from those of x, for maps applied one after the other.

    Exact for factors and orders. After a rotation the Hessian, the mean and the samples are exact, and so is
    ``square`` where there is a Hessian; what else is there is found from the samples alone.
    """
    s = statistics
    for m in maps:
        if isinstance(m, Diagonal):
            f = m.factors
            size = np.abs(f)
            h = None if s.hessian is None else _f32(s.hessian * f[:, None] * f)
            s = Statistics(
                s.tokens,
                h,
                _f32(s.absmax * size),
                _f32(s.mean_abs * size),
                _f32(s.mean * f),
                _f32(s.square * f * f),
                _f32(s.samples * f),
            )
        elif isinstance(m, Order):
            i = m.index
            h = None if s.hessian is None else s.hessian[i][:, i]
            s = Statistics(s.tokens, h, s.absmax[i], s.mean_abs[i], s.mean[i], s.square[i], s.samples[:, i])
        else:
            h = None if s.hessian is None else _f32(m.tokens(m.tokens(s.hessian).T))
            samples = _f32(m.tokens(s.samples))
            size = np.abs(samples)
            square = _f32(np.square(samples, dtype=np.float64).mean(axis=0)) if h is None else np.diag(h).copy()
            mean_abs = _f32(size.mean(axis=0, dtype=np.float64))
            s = Statistics(s.tokens, h, size.max(axis=0), mean_abs, _f32(m.vector(s.mean)), square, samples)
    return s


def _f32(x: npt.NDArray[np.floating]) -> F32:
    return np.ascontiguousarray(x, np.float32)
