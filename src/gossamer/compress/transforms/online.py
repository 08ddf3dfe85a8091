"""Transforms that stay in the expression and are computed on the input in every step."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gossamer.compress.transforms.base import Transform
from gossamer.errors import UsageError
from gossamer.formats import Format, Hadamard, Permute, Scale, SiteFormat
from gossamer.formats.transforms import hadamard_factors
from gossamer.models.topology import Site

__all__ = ["OnlineHadamard", "OnlineOrder", "OnlineScale"]


class _Online(Transform):
    """At every site that reads the input ``where``: a ``Site.shares``, or the end of one, such as "mlp.hidden"."""

    folded = False

    def reaches(self, site: Site) -> bool:
        return site.role != "embed" and (site.shares == self.where or site.shares.endswith(f".{self.where}"))

    def format(self, site: Site, fmt: SiteFormat) -> SiteFormat:
        return replace(fmt, weight=self.wrap(site, fmt.weight)) if self.reaches(site) else fmt

    @abstractmethod
    def wrap(self, site: Site, weight: Format) -> Format:
        """The weight's format inside the node of this transform."""


@dataclass(frozen=True)
class OnlineHadamard(_Online):
    """``hadamard(BLOCK, SEED, ...)``; ``block`` None is the largest matrix there is for the columns."""

    where: str
    block: int | None = None
    seed: int | None = None

    name: ClassVar[str] = "hadamard"

    def wrap(self, site: Site, weight: Format) -> Format:
        block = self.block or largest_block(site.cols)
        return Hadamard(None if block == site.cols else block, self.seed, weight)

    def describe(self) -> str:
        return f"hadamard: inputs of {self.where} in runs of {self.block or 'all'} channels, seed {self.seed}, online"


def largest_block(cols: int) -> int:
    """The largest size of a known Hadamard matrix that divides ``cols``. Raises UsageError where only 1 does."""
    for block in range(cols, 1, -1):
        if cols % block == 0 and hadamard_factors(block):
            return block
    raise UsageError(f"no Hadamard matrix fits {cols} columns; leave the rotation of this input out.")


@dataclass(frozen=True, eq=False)
class OnlineOrder(_Online):
    """``permute(...)``: channel ``order[i]`` of the input is gathered to place i."""

    where: str
    order: npt.NDArray[np.integer]

    name: ClassVar[str] = "permute"

    def wrap(self, site: Site, weight: Format) -> Format:
        return Permute(weight)

    def hints(self, site: Site) -> dict[str, Any]:
        return {"order": self.order} if self.reaches(site) else {}

    def describe(self) -> str:
        return f"permute: inputs of {self.where}, online"


@dataclass(frozen=True, eq=False)
class OnlineScale(_Online):
    """``scale(...)``: the input times positive factors, where nothing before it can take them."""

    where: str
    factors: npt.NDArray[np.floating]

    name: ClassVar[str] = "scale"

    def wrap(self, site: Site, weight: Format) -> Format:
        return Scale(weight)

    def hints(self, site: Site) -> dict[str, Any]:
        return {"factors": self.factors} if self.reaches(site) else {}

    def describe(self) -> str:
        return f"scale: inputs of {self.where} by {self.factors.min():.4g} to {self.factors.max():.4g}, online"
