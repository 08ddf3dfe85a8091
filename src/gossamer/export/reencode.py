"""What an export does with each site: keep what it stores, or store it anew and measure what that loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from gossamer.errors import FormatError, UnsupportedError
from gossamer.formats import Packed, RowSource
from gossamer.formats.node import ROWS_PER_STEP
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.topology import Site

__all__ = ["Errors", "Exported", "Target", "choose"]

T = TypeVar("T")


@dataclass
class Errors:
    """Relative RMS errors, sqrt(sum (w' - w)^2 / sum w^2), of the sites stored anew, and over all sites."""

    sites: dict[str, float] = field(default_factory=dict)
    _lost: float = 0.0
    _all: float = 0.0

    def add(self, site: Site, source: RowSource, packed: Packed | None) -> None:
        """``packed`` is the site as it was stored anew; None says that it was kept as it is."""
        lost = total = 0.0
        for r0 in range(0, site.rows, ROWS_PER_STEP):
            r1 = min(site.rows, r0 + ROWS_PER_STEP)
            w = source.read(r0, r1)
            total += float(np.square(w).sum(dtype=np.float64))
            if packed is not None:
                w = w - packed.decode(r0, r1)
                lost += float(np.square(w).sum(dtype=np.float64))
        self._lost, self._all = self._lost + lost, self._all + total
        if packed is not None:
            self.sites[site.name] = math.sqrt(lost / total) if total else math.sqrt(lost)

    @property
    def overall(self) -> float:
        return math.sqrt(self._lost / self._all) if self._all else 0.0


@dataclass(frozen=True)
class Exported:
    """A published export.

    ``types``: what each site is stored as there. ``errors``: relative RMS error of every site that was stored anew
    (empty when all were kept bit for bit), ``overall`` that over all sites. ``data_bytes``: the tensors,
    ``total_bytes``: the file or folder.
    """

    path: Path
    data_bytes: int
    total_bytes: int
    types: dict[str, str]
    errors: dict[str, float]
    overall: float


@dataclass(frozen=True)
class Target(Generic[T]):
    """How a site leaves: ``kind`` in the words of the other program; ``lossy`` when it is stored anew."""

    kind: T
    lossy: bool


def choose(
    checkpoint: Checkpoint,
    kept: Callable[[Site], T | None],
    others: Sequence[T],
    fits: Callable[[Site, T], str | None],
    program: str,
    hint: str,
) -> Mapping[str, Target[T]]:
    """What becomes of every site, decided before anything is written.

    ``kept``: the kind that holds what the site stores, or None. ``others``: kinds to store the rest in, the first that
    ``fits`` (which says why not) being taken. UnsupportedError or FormatError names the first site without a place.
    """
    found: dict[str, Target[T]] = {}
    for site in checkpoint.topology.sites:
        kind = kept(site)
        if kind is not None and fits(site, kind) is None:
            found[site.name] = Target(kind, False)
            continue
        reasons = [fits(site, other) for other in others]
        if None in reasons:
            found[site.name] = Target(others[reasons.index(None)], True)
        elif others:
            raise FormatError(f"the site '{site.name}' takes none of the types of --lossy, {reasons[-1]}; {hint}.")
        else:
            why = fits(site, kind) if kind is not None else f"which {program} has no type for"
            raise UnsupportedError(f"the site '{site.name}' is stored as {checkpoint.native(site)}, {why}; {hint}.")
    return found
