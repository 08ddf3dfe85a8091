"""What every transform is, and the one most of them come to: a scaling moved from producer to consumers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gossamer.compress.edits import Edited
from gossamer.compress.maps import Diagonal
from gossamer.errors import UsageError
from gossamer.formats import SiteFormat
from gossamer.models.topology import Site, Topology

__all__ = ["PLACES", "Migrate", "Transform", "apply_all", "as_seen", "chosen_feeds", "fed_by", "place"]

F64 = npt.NDArray[np.float64]

PLACES = ("norm", "values", "hidden")  # norm -> what it feeds, values -> output, up -> down


class Transform(ABC):
    """A change of the model that keeps its function: a frozen value with a place.

    ``folded`` transforms change weights, gains and biases and cost nothing at run time; the others change how a
    site's weight is expressed, and the map of its input is computed in every step.
    """

    name: ClassVar[str]
    folded: ClassVar[bool] = True
    where: str

    def apply(self, edited: Edited) -> None:
        """Makes the change and logs it. Raises UsageError where the model does not allow it."""
        self.edit(edited)
        edited.log.append(self.describe())

    def edit(self, edited: Edited) -> None:  # noqa: B027 (online transforms edit nothing)
        """The change itself."""

    def format(self, site: Site, fmt: SiteFormat) -> SiteFormat:
        """What ``fmt`` becomes at a site: folded transforms leave it as it is."""
        return fmt

    def hints(self, site: Site) -> dict[str, Any]:
        """What the node that ``format`` adds at a site is told when it is encoded (``formats.encode_with``)."""
        return {}

    @abstractmethod
    def describe(self) -> str:
        """One line for the ledger."""


def apply_all(transforms: Iterable[Transform], edited: Edited) -> Edited:
    """Applies transforms in their order, and gives ``edited`` back."""
    for transform in transforms:
        transform.apply(edited)
    return edited


@dataclass(frozen=True, eq=False)
class Migrate(Transform):
    """The outputs of ``where`` (a norm or a site) times factors, the matching columns of its consumers divided by them.

    ``factors`` float64 [outputs of the producer], none of them zero. ``method`` says who found them.
    """

    where: str
    factors: F64
    method: str

    name: ClassVar[str] = "migrate"

    def edit(self, edited: Edited) -> None:
        topology = edited.topology
        consumers = fed_by(topology, self.where)
        m = Diagonal(self.factors)
        if any(v.name == self.where for v in topology.vectors):
            edited.map_gain(self.where, m)
        else:
            edited.map_output(self.where, m)
        seen = Diagonal(as_seen(topology, self.where, self.factors))
        for consumer in consumers:
            edited.map_input(consumer, seen)

    def describe(self) -> str:
        low, high = np.abs(self.factors).min(), np.abs(self.factors).max()
        return f"{self.method}: {self.where} scaled by {low:.4g} to {high:.4g} against what it feeds"


def fed_by(topology: Topology, producer: str) -> tuple[str, ...]:
    """The sites that a producer of ``Topology.feeds`` feeds. Raises UsageError for another."""
    for name, consumers in topology.feeds:
        if name == producer:
            return consumers
    raise UsageError(f"'{producer}' feeds no site alone, so nothing can be moved from it to what reads it.")


def place(topology: Topology, producer: str) -> str:
    """Which of PLACES a producer of ``Topology.feeds`` stands at."""
    if any(v.name == producer for v in topology.vectors):
        return "norm"
    return "values" if topology.values_of(producer) else "hidden"


def chosen_feeds(
    topology: Topology, shares: Collection[str], places: Collection[str]
) -> Iterator[tuple[str, list[Site]]]:
    """(producer, consumers) of the feeds at ``places`` whose consumers read one of the inputs ``shares``."""
    if unknown := sorted(set(places) - set(PLACES)):
        raise UsageError(f"'{unknown[0]}' is no place to move scales at; the places are {', '.join(PLACES)}.")
    for producer, names in topology.feeds:
        consumers = [topology.site(name) for name in names]
        if consumers[0].shares in shares and place(topology, producer) in places:
            yield producer, consumers


def as_seen(topology: Topology, producer: str, values: npt.NDArray[Any]) -> F64:
    """Values for each output channel of a producer, as the columns of its consumers are ordered."""
    attention = topology.values_of(producer)
    spread = values if attention is None else attention.spread(values)
    return np.asarray(spread, np.float64)
