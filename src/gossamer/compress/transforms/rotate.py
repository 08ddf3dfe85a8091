"""Rotations that are folded into the weights: of the values by head, and of the whole residual stream.

An orthonormal Hadamard matrix spreads what stands out in one channel over all of them (QuaRot, Ashkboos et al. 2024).
RMSNorm without a gain commutes with rotations (SliceGPT, Ashkboos et al. 2024, section 3), so gains are moved into the
sites that read them first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from gossamer.compress.edits import Edited
from gossamer.compress.maps import Blocks, Diagonal, HadamardMap, Map
from gossamer.compress.transforms.base import Transform
from gossamer.errors import UsageError
from gossamer.formats.transforms import signs
from gossamer.models.topology import Topology

__all__ = ["FoldNorms", "RotateStream", "RotateValues", "rotate_values"]

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RotateValues(Transform):
    """Each value head, and the columns of the output site that read it, times a Hadamard matrix of the head's size.

    ``seed`` gives the signs in front of the matrix, None for none.
    """

    where: str  # the site that makes the values
    seed: int | None = None

    name: ClassVar[str] = "rotate values"

    def edit(self, edited: Edited) -> None:
        attention = edited.topology.values_of(self.where)
        if attention is None:
            raise UsageError(f"'{self.where}' does not make the values of an attention, so it has no heads to rotate.")
        d = signs(self.seed, attention.kv_heads * attention.head_dim)
        for name, flips in ((attention.v, d), (attention.o, attention.spread(d))):
            maps: list[Map] = [Diagonal(flips), HadamardMap(len(flips), attention.head_dim)]
            for m in maps:
                (edited.map_output if name == attention.v else edited.map_input)(name, m)

    def describe(self) -> str:
        return f"rotate: the heads of {self.where} by Hadamard matrices, seed {self.seed}"


def rotate_values(topology: Topology, seed: int | None = None) -> list[RotateValues]:
    """``RotateValues`` in every layer, each with a seed of its own where one is given."""
    return [RotateValues(a.v, None if seed is None else seed + a.layer) for a in topology.attention]


@dataclass(frozen=True)
class FoldNorms(Transform):
    """The gain of every norm that reads the residual stream moves into the columns of what it feeds.

    The last norm feeds the head, which needs a table of its own: ``untie`` gives it one where it has none, and without
    ``untie`` the last norm of a tied model stays as it is.
    """

    untie: bool = False
    where: str = "every norm"

    name: ClassVar[str] = "fold norms"

    def edit(self, edited: Edited) -> None:
        if self.untie:
            edited.untie()
        topology = edited.topology
        for norm, consumers in topology.stream.readers:
            if topology.site(consumers[0]).role == "embed":
                continue
            vector = next(v for v in topology.vectors if v.name == norm)
            gain = edited.vector(vector).astype(np.float64)
            # A channel with the gain 0 (there are such) was read as 0, so its columns become 0.
            undone = np.divide(1.0, gain, out=np.zeros_like(gain), where=gain != 0)
            edited.set_gain(norm, np.ones(vector.size))
            for consumer in consumers:
                edited.map_input(consumer, Diagonal(undone, gain))

    def describe(self) -> str:
        return f"fold norms: gains moved into what they feed{', head untied' if self.untie else ''}"


@dataclass(frozen=True, eq=False)
class RotateStream(Transform):
    """The residual stream times an orthogonal matrix, folded into everything that writes or reads it.

    The matrix is ``matrix`` float64 [hidden, hidden], or the Hadamard matrix of ``block`` channels (None for all of
    them) along the diagonal, with signs by ``seed`` (None for none). Gains are folded first (``FoldNorms``). A tied
    table has to be untied, which ``untie`` allows: it is then stored twice. Models with norms between a block and the
    stream are refused, since such a gain cannot move.
    """

    block: int | None = None
    seed: int | None = 0
    matrix: F64 | None = None
    untie: bool = False
    where: str = "the residual stream"

    name: ClassVar[str] = "rotate stream"

    def edit(self, edited: Edited) -> None:
        topology, hidden = edited.topology, edited.config.hidden
        if topology.stream.posts:
            raise UsageError(
                "the residual stream of this model cannot be rotated: a norm with a gain stands between each block and "
                "the stream; rotate values, or use hadamard(...) in the formats."
            )
        if topology.tied and not self.untie:
            raise UsageError(
                "the residual stream cannot be rotated while the embedding is the head too, since the last norm's gain "
                "has to move into the head alone; allow it to be untied, which stores the table twice."
            )
        m = self._map(hidden)
        FoldNorms(self.untie).edit(edited)
        for name in edited.topology.stream.writers:
            edited.map_output(name, m)
        for _, consumers in edited.topology.stream.readers:
            for consumer in consumers:
                edited.map_input(consumer, m)

    def _map(self, hidden: int) -> Map:
        if self.matrix is None:
            return HadamardMap(hidden, self.block or hidden, self.seed)
        if np.shape(self.matrix) != (hidden, hidden):
            raise UsageError(
                f"the stream has {hidden} channels, which a matrix of {np.shape(self.matrix)} does not fit."
            )
        return Blocks(hidden, self.matrix)

    def describe(self) -> str:
        what = f"Hadamard matrices of {self.block or 'all'} channels, seed {self.seed}"
        return f"rotate: the residual stream by {what if self.matrix is None else 'a given matrix'}, gains folded"
