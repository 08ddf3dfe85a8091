"""From a checkpoint to a model that runs: one site at a time, in the formats asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from gossamer.errors import UsageError
from gossamer.formats import Packed, SiteFormat
from gossamer.formats.dispatch import Leaf, Runner, make_runner
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.memory import Region
from gossamer.models.topology import Site, Topology
from gossamer.models.transformer import Transformer

__all__ = ["Choose", "Loaded", "Plan", "Progress", "load", "plan", "unfused"]

Choose = Callable[[Site], SiteFormat | None]
Progress = Callable[[int, int], None]  # steps done, steps in all: sites, windows, repetitions, tokens


@dataclass(frozen=True)
class Loaded:
    """A model in memory, the format of every site, and the sites that run without a fused kernel (with the reason)."""

    transformer: Transformer
    topology: Topology
    formats: dict[str, SiteFormat]
    packed: dict[str, Packed]
    unfused: dict[str, str]

    def explain(self, name: str) -> list[Leaf]:
        """How a site runs: each stored matrix, what multiplies it, why not faster. UsageError: no such site."""
        if name not in self.formats:
            raise UsageError(f"'{name}' is no site of this model; a site is for example '{next(iter(self.formats))}'.")
        return self.transformer.runners[name].leaves

    @property
    def weight_bytes(self) -> int:
        """Packed bytes of all matrices; a tied table counts once."""
        return sum(p.nbytes for p in self.packed.values())

    @property
    def data_bytes(self) -> int:
        """Packed matrices, norms and biases: what a compressed folder's data section holds."""
        return self.weight_bytes + self.topology.vector_bytes

    @property
    def bits_per_weight(self) -> float:
        """8 x ``data_bytes`` / parameters."""
        return 8 * self.data_bytes / self.topology.parameters


@dataclass(frozen=True)
class Plan:
    """What a choice of formats comes to, known before anything is converted.

    ``data_bytes`` are packed matrices, norms and biases; ``bits_per_weight`` is 8 x that / parameters. Both are
    estimates where the bytes of sparse parts depend on the weights.
    """

    formats: dict[str, SiteFormat]
    data_bytes: int
    bits_per_weight: float


def plan(checkpoint: Checkpoint, choose: Choose | None = None) -> Plan:
    """Checks every site's format against its shape and adds up the bytes. Raises FormatError."""
    topology = checkpoint.topology
    formats: dict[str, SiteFormat] = {}
    total = topology.vector_bytes
    for site in topology.sites:
        fmt = formats[site.name] = (choose(site) if choose else None) or checkpoint.native(site)
        fmt.weight.check(site.rows, site.cols)
        total += sum(field.nbytes for field in fmt.weight.fields(site.rows, site.cols).values())
    return Plan(formats, total, 8 * total / topology.parameters)


def load(checkpoint: Checkpoint, formats: Mapping[str, SiteFormat], progress: Progress | None = None) -> Loaded:
    """Loads every site in its format of ``formats`` (see ``plan``)."""
    topology = checkpoint.topology
    packed: dict[str, Packed] = {}
    runners = {}
    region = Region.of(formats, topology.sites)
    for done, site in enumerate(topology.sites):
        fmt = formats[site.name]
        packed[site.name] = region.move(checkpoint.pack(site, fmt), partial(checkpoint.release, site))
        checkpoint.release(site)
        runners[site.name] = make_runner(packed[site.name], fmt, checkpoint.bias(site))
        if progress:
            progress(done + 1, len(topology.sites))
    vectors = {v.name: checkpoint.vector(v) for v in topology.vectors}
    transformer = Transformer(checkpoint.config, runners, vectors)
    return Loaded(transformer, topology, dict(formats), packed, unfused(topology.sites, runners))


def unfused(sites: Iterable[Site], runners: Mapping[str, Runner]) -> dict[str, str]:
    """The sites that run without a fused kernel, with the reason."""
    found = {name: r.refused for name, r in runners.items() if r.refused is not None}
    for site in sites:
        if site.role == "embed" and runners[site.name].only is None:
            found.setdefault(site.name, "its rows are looked up in a float32 copy, since it is stored in parts")
    return found
