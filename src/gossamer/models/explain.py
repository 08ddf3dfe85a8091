"""How the sites of a checkpoint would run, told without loading or converting its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gossamer.formats import Composite, Packed, SiteFormat, allocate, bits_per_weight
from gossamer.formats.dispatch import Leaf, make_runner
from gossamer.formats.node import PANEL
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.load import unfused
from gossamer.models.topology import Site

__all__ = ["Explained", "explain"]


@dataclass(frozen=True)
class Explained:
    """A site in the checkpoint's own format: its matrices, and why it is unfused, or None."""

    site: Site
    format: SiteFormat
    bits_per_weight: float
    leaves: list[Leaf]
    unfused: str | None

    @property
    def path(self) -> str:
        """The paths of its matrices, "int8 + sparse"."""
        return " + ".join(dict.fromkeys(leaf.path for leaf in self.leaves))


def explain(checkpoint: Checkpoint, sites: list[Site]) -> list[Explained]:
    """Explains each site. Raises CheckpointError for stored arrays that are wrong."""
    known: dict[tuple[str, int, int], Explained] = {}
    found = []
    for site in sites:
        fmt = checkpoint.native(site)
        key = (str(fmt), site.rows, site.cols)
        if key not in known:
            known[key] = _explain(checkpoint, site, fmt)
        found.append(replace(known[key], site=site))
    return found


def _explain(checkpoint: Checkpoint, site: Site, fmt: SiteFormat) -> Explained:
    if isinstance(fmt.weight, Composite):  # which only folders of ours hold, ready to be mapped
        packed = checkpoint.pack(site)
        runner = make_runner(packed, fmt)
        why = unfused([site], {site.name: runner}).get(site.name)
        return Explained(site, fmt, packed.bits_per_weight, runner.leaves, why)
    # The path follows from the format, the columns and the input: a few rows of zeros do.
    arrays = allocate(fmt.weight, PANEL, site.cols)
    runner = make_runner(Packed(fmt.weight, (PANEL, site.cols), arrays), fmt)
    leaves = [replace(leaf, macs=site.rows * site.cols) for leaf in runner.leaves]
    return Explained(site, fmt, bits_per_weight(fmt.weight, site.rows, site.cols), leaves, runner.refused)
