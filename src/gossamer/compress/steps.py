"""The transforms and allocators that a recipe may name: their options, and what calibration must collect for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["ALLOCATORS", "TRANSFORMS", "Mechanism", "out_of_order"]


@dataclass(frozen=True)
class Mechanism:
    """``options`` is a frozen dataclass; ``needs`` are entries of recipe.NEEDS; ``after`` names that may not follow it."""

    options: type
    needs: frozenset[str] = frozenset()
    last_of: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ByRole:
    """The recipe's own formats, settled for each site's shape."""


ALLOCATORS: Mapping[str, Mechanism] = {"by_role": Mechanism(ByRole)}
TRANSFORMS: Mapping[str, Mechanism] = {}


def out_of_order(names: Sequence[str]) -> str | None:
    """Why these transforms cannot run one after the other, or None."""
    return None
