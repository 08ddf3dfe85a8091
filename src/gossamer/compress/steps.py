"""The transforms and allocators that a recipe may name: their options, what they need, and how they are called.

This is where the names of recipes meet the functions; what those do stands with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gossamer.compress.transforms import (
    Quantize,
    RotateStream,
    Transform,
    awq_scales,
    equalise,
    rotate_values,
    smooth,
    smooth_attention,
    smooth_outliers,
    smooth_searched,
    sort_channels,
)
from gossamer.errors import UsageError

if TYPE_CHECKING:
    from gossamer.compress.edits import Edited
    from gossamer.compress.statistics import Statistics

__all__ = ["ALLOCATORS", "TRANSFORMS", "Allocator", "Context", "Transformer", "out_of_order"]

Place = Literal["norm", "values", "hidden"]
EVERYWHERE: tuple[Place, ...] = ("norm", "values", "hidden")
INPUTS = frozenset({"inputs"})


@dataclass(frozen=True)
class Context:
    """What transforms may look at: ``statistics`` of every input of the model as it is now, and the real rounding."""

    edited: Edited
    statistics: Mapping[str, Statistics]
    quantize: Quantize


# ---------------------------------------------------------------- transforms


@dataclass(frozen=True)
class Smooth:
    """SmoothQuant: max|x|^alpha / max|w|^beta. ``alpha`` None searches it; ``beta`` None is 1 - alpha."""

    alpha: float | None = 0.5
    beta: float | None = None
    places: tuple[Place, ...] = EVERYWHERE

    def make(self, c: Context) -> Sequence[Transform]:
        if self.alpha is None:
            if self.beta is not None:
                raise UsageError("beta goes with an alpha; a searched alpha takes 1 - alpha.")
            return smooth_searched(c.edited, c.statistics, c.quantize, places=self.places)
        return smooth(c.edited, c.statistics, self.alpha, self.beta, places=self.places)


@dataclass(frozen=True)
class SmoothOutliers:
    """DGQ: only the largest channels are scaled down."""

    fraction: float = 0.005
    places: tuple[Place, ...] = EVERYWHERE

    def make(self, c: Context) -> Sequence[Transform]:
        return smooth_outliers(c.edited, c.statistics, self.fraction, places=self.places)


@dataclass(frozen=True)
class SmoothAttention:
    """QoQ: keys divided by their largest values to the power alpha, queries multiplied."""

    alpha: float = 0.5

    def make(self, c: Context) -> Sequence[Transform]:
        return smooth_attention(c.edited, c.statistics, self.alpha)


@dataclass(frozen=True)
class Awq:
    """AWQ: E|x|^r with r searched on the output's error."""

    points: int = 20
    places: tuple[Place, ...] = EVERYWHERE

    def make(self, c: Context) -> Sequence[Transform]:
        return awq_scales(c.edited, c.statistics, c.quantize, points=self.points, places=self.places)


@dataclass(frozen=True)
class Equalise:
    """Equal ranges of rows and the columns that read them."""

    places: tuple[Literal["values", "hidden"], ...] = ("values", "hidden")

    def make(self, c: Context) -> Sequence[Transform]:
        return equalise(c.edited, places=self.places)


@dataclass(frozen=True)
class Rotate:
    """Hadamard matrices folded into the weights: of every value head, or of the residual stream (of untied models)."""

    place: Literal["values", "stream"] = "values"
    block: int | None = None
    seed: int | None = None

    def make(self, c: Context) -> Sequence[Transform]:
        if self.place == "stream":
            return [RotateStream(self.block, self.seed)]
        if self.block is not None:
            raise UsageError("rotate of values takes no block, for it is of whole heads; leave it out.")
        return rotate_values(c.edited.topology, self.seed)


@dataclass(frozen=True)
class SortChannels:
    """Channels with the largest inputs first, so that they share scales."""

    places: tuple[Literal["values", "hidden"], ...] = ("values", "hidden")

    def make(self, c: Context) -> Sequence[Transform]:
        return sort_channels(c.edited, c.statistics, places=self.places)


@dataclass(frozen=True)
class Transformer:
    """``options`` is a frozen dataclass whose ``make`` gives the transforms; ``undone_by`` may not follow it."""

    options: type
    needs: frozenset[str] = frozenset()
    undone_by: frozenset[str] = frozenset()


MIXING = frozenset({"rotate"})  # what makes one channel of many: scales and orders of channels before it are lost

TRANSFORMS: Mapping[str, Transformer] = {
    "equalise": Transformer(Equalise, frozenset(), MIXING),
    "smooth": Transformer(Smooth, INPUTS, MIXING),
    "smooth_outliers": Transformer(SmoothOutliers, INPUTS, MIXING),
    "smooth_attention": Transformer(SmoothAttention, INPUTS),
    "awq": Transformer(Awq, INPUTS, MIXING),
    "rotate": Transformer(Rotate),
    "sort_channels": Transformer(SortChannels, INPUTS, MIXING | {"smooth", "smooth_outliers", "awq", "equalise"}),
}


def out_of_order(names: Sequence[str]) -> str | None:
    """Why these transforms cannot run one after the other, or None."""
    for i, name in enumerate(names):
        for later in names[i + 1 :]:
            if later in TRANSFORMS[name].undone_by:
                return f"{later} after {name} undoes what {name} did; write {later} before it."
    return None


# ---------------------------------------------------------------- allocators


@dataclass(frozen=True)
class ByRole:
    """The recipe's own formats, settled for each site's shape."""


@dataclass(frozen=True)
class Salience:
    """MixLLM: ``percent`` of all rows, the most salient of the whole model, in the format ``wide``."""

    wide: str = "int8/g128"
    percent: float = 10.0
    multiple: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.percent <= 100:
            raise UsageError(f"percent {self.percent:g} is out of range; it is 0 to 100.")
        if self.multiple < 1:
            raise UsageError(f"multiple {self.multiple} is out of range; it is 1 or more.")


@dataclass(frozen=True)
class FineQuant:
    """FineQuant: a group size for each matrix, by how much smaller groups shrink the ranges."""

    alpha: float = 0.9
    least: int = 64


@dataclass(frozen=True)
class WideGroups:
    """``count`` of every ``block`` groups of ``group`` columns in the format ``wide``."""

    wide: str
    group: int = 16
    block: int = 4
    count: int = 1
    score: Literal["error", "range", "hessian-range"] = "error"


@dataclass(frozen=True)
class Allocator:
    """``options`` is a frozen dataclass; allocation.py runs it."""

    options: type
    needs: frozenset[str] = frozenset()


ALLOCATORS: Mapping[str, Allocator] = {
    "by_role": Allocator(ByRole),
    "salience": Allocator(Salience, frozenset({"fisher"})),
    "finequant": Allocator(FineQuant),
    "wide_groups": Allocator(WideGroups, frozenset({"hessian"})),
}
