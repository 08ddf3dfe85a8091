"""The transforms of a recipe, applied one after the other to a checkpoint that is read through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoints.safetensors import SafetensorsFile
from gossamer.compress.edits import Edited
from gossamer.compress.statistics import Statistics
from gossamer.compress.steps import Context
from gossamer.compress.transforms import apply_all, moved
from gossamer.formats import SiteFormat, project
from gossamer.models.topology import Site

if TYPE_CHECKING:
    from gossamer.compress.recipe import Step

__all__ = ["Inputs", "apply", "as_tensors", "from_part"]

F32 = npt.NDArray[np.float32]

_FIELDS = ("absmax", "mean_abs", "mean", "square", "samples")


class Inputs(Mapping[str, Statistics]):
    """Statistics of the inputs of ``edited`` as it is now, from those of the model before any edit.

    ``stored`` gives them by ``Site.shares`` one at a time; only what is asked for is read.
    """

    def __init__(self, edited: Edited, stored: Mapping[str, Callable[[], Statistics]]) -> None:
        self._edited, self._stored = edited, stored

    def __getitem__(self, shares: str) -> Statistics:
        found = self._stored[shares]()
        site = next(s for s in self._edited.topology.sites if s.shares == shares)
        return moved(found, self._edited.input_maps(site))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def apply(edited: Edited, steps: Sequence[Step], inputs: Inputs, formats: Mapping[str, SiteFormat]) -> None:
    """Applies every step; each sees the model, and its inputs, as those before it left them."""

    def quantize(site: Site, w: F32) -> F32:
        return project(formats[site.name].weight, w)

    for step in steps:
        apply_all(step.options.make(Context(edited, inputs, quantize)), edited)


def as_tensors(statistics: Mapping[str, Statistics]) -> dict[str, F32]:
    """Statistics without second moments, as the arrays of a part."""
    return {f"{shares}.{name}": getattr(s, name) for shares, s in statistics.items() for name in _FIELDS}


def from_part(part: SafetensorsFile, shares: str, tokens: int) -> Statistics:
    """What ``as_tensors`` made of one input, memory-mapped."""
    arrays: dict[str, Any] = {name: part.raw(f"{shares}.{name}") for name in _FIELDS}
    return Statistics(tokens, None, **arrays)
