"""One site from its weights to its packed form, and what that lost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers.options import Nearest, Solver
from gossamer.compress.solvers.site import solve
from gossamer.compress.statistics import Statistics
from gossamer.errors import CheckpointError, FormatError
from gossamer.formats import Packed, RowSource, SiteFormat
from gossamer.formats.node import ROWS_PER_STEP
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.topology import Site

__all__ = ["Fitted", "fit", "read_site"]

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Fitted:
    """A site as it is stored; ``record`` is what the ledger says of it; ``bias`` is what to add to its bias."""

    packed: Packed
    format: SiteFormat
    record: dict[str, Any] = field(default_factory=dict)
    bias: F32 | None = None


def fit(
    checkpoint: Checkpoint,
    site: Site,
    fmt: SiteFormat,
    solver: Solver,
    stats: Statistics | None = None,
    *,
    hints: dict[str, Any] | None = None,
    fisher: F32 | None = None,
) -> Fitted:
    """Stores a site in ``fmt`` as ``solver`` finds it.

    Plain rounding of weights that nothing is known about reads a few rows at a time; everything else takes the matrix
    in memory. Raises FormatError for weights that cannot be stored, UsageError where the solver gives up.
    """
    where = f"{checkpoint.path.name}: {site.name}"
    if solver == Solver(Nearest()) and stats is None and not hints:
        packed = checkpoint.pack(site, fmt)
        record = _record(packed, fmt, _sqnr(packed, checkpoint.source(site)), None, None)
        checkpoint.release(site)
        return Fitted(packed, fmt, record)
    w = read_site(checkpoint, site)
    found = solve(fmt, w, stats, solver, where=where, fisher=fisher)
    e = found.error
    record = _record(found.packed, fmt, e.weight_sqnr_db, e.output_mse, e.output_relative)
    if found.log:
        record["log"] = list(found.log)
    return Fitted(found.packed, fmt, record, found.bias)


def read_site(checkpoint: Checkpoint, site: Site) -> F32:
    """The site's weights, float32 [rows, cols]. Raises CheckpointError for a NaN or an infinity among them."""
    source = checkpoint.source(site)
    w = np.empty((site.rows, site.cols), np.float32)
    for r in range(0, site.rows, ROWS_PER_STEP):
        w[r : r + ROWS_PER_STEP] = source.read(r, min(site.rows, r + ROWS_PER_STEP))
        if not np.isfinite(w[r : r + ROWS_PER_STEP]).all():
            raise CheckpointError(
                f"{checkpoint.path.name}: {site.name} holds a NaN or an infinity; check the checkpoint."
            )
    checkpoint.release(site)
    return w


def _record(packed: Packed, fmt: SiteFormat, sqnr: float, mse: float | None, relative: float | None) -> dict[str, Any]:
    """The entry of a ledger. An exact copy has no noise to measure, which JSON has no number for: null."""
    decoded = f"{packed.format} stores"
    if math.isnan(sqnr) or (mse is not None and not math.isfinite(mse)):
        raise FormatError(f"{decoded} a NaN or an infinity where the weights have none; report this as a fault.")
    return {
        "format": str(fmt),
        "bits": packed.bits_per_weight,
        "sqnr_db": sqnr if math.isfinite(sqnr) else None,
        "output_mse": mse,
        "output_relative": relative if relative is None or math.isfinite(relative) else None,
    }


def _sqnr(packed: Packed, source: RowSource) -> float:
    """10 log10(|W|^2 / |E|^2), infinite where nothing was lost, a few rows at a time."""
    rows, _ = packed.shape
    signal = noise = 0.0
    for r in range(0, rows, ROWS_PER_STEP):
        w = source.read(r, min(rows, r + ROWS_PER_STEP))
        error = (w - packed.decode(r, r + len(w))).ravel()
        signal += float(np.dot(w.ravel(), w.ravel()))
        noise += float(np.dot(error, error))
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
