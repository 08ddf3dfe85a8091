"""What compression did to each site: its format, its bits, and how far its weights and outputs are from the base's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gossamer.errors import UsageError
from gossamer.formats import Packed
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.load import Loaded, Progress
from gossamer.models.packed_checkpoint import PackedFolder
from gossamer.models.topology import Site

__all__ = ["SiteError", "by_role", "ledger_errors", "site_errors", "stored_errors"]

_ROWS = 512  # decoded at once


@dataclass(frozen=True)
class SiteError:
    """One site, or the mean of several.

    ``nbytes`` are those of the packed arrays and ``bits_per_weight`` is 8 x that / weights. ``sqnr_db`` is the signal
    to quantization noise ratio of the weights, 10 log10(sum w^2 / sum (w - q)^2), None for weights that are exactly
    the base's, and where it is not known. ``output_relative`` is the mean square error of the outputs on calibration
    text by their mean square, ``output_mse`` that error itself; None where nobody measured them.
    """

    name: str
    role: str
    format: str
    nbytes: int
    bits_per_weight: float
    sqnr_db: float | None
    exact: bool
    output_mse: float | None = None
    output_relative: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything as a dictionary that ``json.dumps`` takes."""
        return asdict(self)


def site_errors(
    base: Checkpoint,
    formats: Mapping[str, str],
    packed: Iterable[tuple[Site, Packed]],
    progress: Progress | None = None,
) -> list[SiteError]:
    """Compares packed sites with the weights of ``base``, a few hundred rows at once.

    It compares numbers with numbers: a candidate whose weights were rotated or rescaled has large differences
    although it computes the same; ``ledger_errors`` has what was measured then. Raises UsageError when a site of the
    candidate is not one of the base's, or has another shape.
    """
    sites = {s.name: s for s in base.topology.sites}
    rows = []
    for site, stored in packed:
        own = sites.get(site.name)
        if own is None or (own.rows, own.cols) != stored.shape:
            raise UsageError(
                f"{base.path.name} has no site '{site.name}' of {stored.shape[0]} x {stored.shape[1]} weights to "
                "compare with; choose the model that was compressed as the base."
            )
        error, signal = _energies(base, own, stored)
        sqnr = 10 * math.log10(signal / error) if error and signal else None
        rows.append(
            SiteError(
                site.name, site.role, formats[site.name], stored.nbytes, stored.bits_per_weight, sqnr, error == 0
            )
        )
        if progress:
            progress(len(rows), len(sites))
    return rows


def stored_errors(
    base: Checkpoint, candidate: Checkpoint | Loaded, progress: Progress | None = None
) -> list[SiteError]:
    """``site_errors`` of a checkpoint in its own formats, or of a model in memory."""
    sites = candidate.topology.sites
    if isinstance(candidate, Loaded):
        formats = {name: str(fmt) for name, fmt in candidate.formats.items()}
        loaded = candidate
        return site_errors(base, formats, ((s, loaded.packed[s.name]) for s in sites), progress)
    formats = {s.name: str(candidate.native(s)) for s in sites}
    return site_errors(base, formats, ((s, candidate.pack(s)) for s in sites), progress)


def _energies(base: Checkpoint, site: Site, stored: Packed) -> tuple[float, float]:
    """Sums of (w - q)^2 and of w^2 in float64."""
    source, error, signal = base.source(site), 0.0, 0.0
    for r0 in range(0, site.rows, _ROWS):
        w = source.read(r0, min(site.rows, r0 + _ROWS))
        difference = w - stored.decode(r0, min(site.rows, r0 + _ROWS))
        error += float(np.square(difference, dtype=np.float64).sum())
        signal += float(np.square(w, dtype=np.float64).sum())
    return error, signal


def ledger_errors(folder: PackedFolder) -> list[SiteError]:
    """What the ledger of a compressed folder says of its sites; [] when it says nothing.

    Sizes are those of the stored arrays. Entries that are no numbers count as not known.
    """
    ledger = folder.ledger.get("sites")
    if not isinstance(ledger, dict):
        return []
    rows = []
    for site in folder.topology.sites:
        entry = ledger.get(site.name)
        entry = entry if isinstance(entry, dict) else {}
        nbytes = sum(a.nbytes for a in folder.stored(site).arrays.values())
        rows.append(
            SiteError(
                site.name,
                site.role,
                str(folder.native(site)),
                nbytes,
                8 * nbytes / (site.rows * site.cols),
                _number(entry, "sqnr_db"),
                entry.get("sqnr_db", 0) is None,  # an exact copy has no noise to measure
                _number(entry, "output_mse"),
                _number(entry, "output_relative"),
            )
        )
    return rows


def _number(entry: Mapping[str, Any], name: str) -> float | None:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def by_role(rows: Iterable[SiteError]) -> list[SiteError]:
    """One row for each role: bytes added up, errors as means over its sites, decibels and shares alike."""
    groups: dict[str, list[SiteError]] = {}
    for row in rows:
        groups.setdefault(row.role, []).append(row)
    return [_summed(role, group) for role, group in groups.items()]


def _summed(role: str, group: list[SiteError]) -> SiteError:
    def mean(values: Iterable[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    nbytes = sum(r.nbytes for r in group)
    weights = sum(8 * r.nbytes / r.bits_per_weight for r in group)
    formats = list(dict.fromkeys(r.format for r in group))
    return SiteError(
        name=f"{len(group)} sites" if len(group) > 1 else group[0].name,
        role=role,
        format=formats[0] if len(formats) == 1 else f"{len(formats)} formats",
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / weights,
        sqnr_db=mean(r.sqnr_db for r in group),
        exact=all(r.exact for r in group),
        output_mse=mean(r.output_mse for r in group),
        output_relative=mean(r.output_relative for r in group),
    )
