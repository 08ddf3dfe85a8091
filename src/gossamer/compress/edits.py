"""A checkpoint with changes that keep the function: maps of channels, other gains and biases, applied on reading.

Nothing is converted when an edit is made. Weights are read from the checkpoint below a few rows at a time, mapped in
float64 and rounded to float32 once; a map that mixes rows far apart takes one site's matrix in memory while that site
is read. What keeps the function unchanged is the caller's business: an edit of one side alone changes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer.compress.maps import F64, Diagonal, Map
from gossamer.errors import UsageError
from gossamer.formats import Packed, RowSource, SiteFormat, parse
from gossamer.formats.node import ROWS_PER_STEP
from gossamer.models.checkpoint import Checkpoint, StoredTensor
from gossamer.models.topology import Site, Topology, Vector, describe

if TYPE_CHECKING:
    from gossamer.checkpoints.tokenizer import Tokenizer

__all__ = ["Edited"]

F32 = npt.NDArray[np.float32]

_TABLE, _HEAD = "model.embed_tokens", "lm_head"
_COLUMNS = 256  # of a matrix in memory, mapped at once
_described = lru_cache(maxsize=8)(describe)


class Edited(Checkpoint):
    """``base``, another ``Edited`` perhaps, with edits, which compose in the order in which they are made."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.kind, self.path, self.family = base.kind, base.path, base.family
        self.data_bytes, self.total_bytes = base.data_bytes, base.total_bytes
        self.log: list[str] = []  # what was done, a line for each transform, for the ledger
        self.config = base.config
        self._left: dict[str, list[Map]] = {}
        self._right: dict[str, list[Map]] = {}
        self._gains: dict[str, F64] = {}
        self._biases: dict[str, F64] = {}

    # ------------------------------------------------------------ edits

    @property
    def topology(self) -> Topology:
        return _described(self.config)

    def untie(self) -> None:
        """Gives the head a table of its own, which starts as a copy; nothing where it has one."""
        if self.config.tied:
            for edits in (self._left, self._right):
                if _TABLE in edits:
                    edits[_HEAD] = list(edits[_TABLE])
            self.config = replace(self.config, tied=False)

    def map_output(self, name: str, m: Map) -> None:
        """y -> M y of a site: W becomes M W, a bias b becomes M b. The embedding's output are its columns."""
        site = self._site(name, m)
        if site.role == "embed":
            self._refuse_tied("output")
            self._add(self._right, name, m.dual)
            return
        self._add(self._left, name, m)
        bias = self._bias(site)
        if bias is not None:
            self._biases[name] = m.vector(bias)

    def map_input(self, name: str, m: Map) -> None:
        """x -> M x in front of a site: W becomes W M^-1."""
        site = self._site(name, m, of="cols")
        if site.role == "embed":
            if not self.config.tied:
                raise UsageError(f"'{name}' is looked up in and has no input to change; change its output.")
            self._refuse_tied("input")
        self._add(self._right, name, m)

    def map_table(self, m: Map) -> None:
        """As ``map_output`` of the embedding and ``map_input`` of the head at once, for an orthogonal M.

        This is what a tied table can take: both of its uses change alike.
        """
        if not m.orthogonal:
            raise UsageError("both uses of a tied table can only be rotated or reordered together; untie it first.")
        self._site(_TABLE, m, of="cols")
        self._add(self._right, _TABLE, m)
        if not self.config.tied:
            self._add(self._right, _HEAD, m)

    def map_gain(self, name: str, m: Map) -> None:
        """g -> M g of a norm's gain (as it is multiplied with)."""
        self._gains[name] = m.vector(self._gain(self._vector(name)))

    def set_gain(self, name: str, gain: npt.NDArray[Any]) -> None:
        """Replaces a norm's gain [size], as it is multiplied with."""
        vector = self._vector(name)
        self._gains[name] = _checked(gain, vector.size, f"the gain of '{name}'")

    def set_bias(self, name: str, bias: npt.NDArray[Any]) -> None:
        """Replaces a site's bias [rows], or gives it one."""
        site = self._site(name)
        if site.role == "embed":
            raise UsageError(f"'{name}' is looked up in, so it can have no bias.")
        self._biases[name] = _checked(bias, site.rows, f"the bias of '{name}'")
        if not site.bias:
            self.config = replace(self.config, biased=self.config.biased | {name})

    def input_maps(self, site: Site) -> tuple[Map, ...]:
        """How the site's input here follows from the one in ``base``: maps applied one after the other."""
        return tuple(self._right.get(site.name, ()))

    def _add(self, edits: dict[str, list[Map]], name: str, m: Map) -> None:
        maps = edits.setdefault(name, [])
        if maps and isinstance(m, Diagonal) and isinstance(maps[-1], Diagonal):
            maps[-1] = maps[-1].then(m)
        else:
            maps.append(m)

    def _site(self, name: str, m: Map | None = None, of: str = "rows") -> Site:
        site = next((s for s in self.topology.sites if s.name == name), None)
        if site is None:
            raise UsageError(f"'{name}' is no site of this model.")
        size = site.cols if site.role == "embed" else getattr(site, of)
        if m is not None and m.size != size:
            raise UsageError(f"a map of {m.size} channels cannot be applied to the {size} of '{name}'.")
        return site

    def _vector(self, name: str) -> Vector:
        vector = next((v for v in self.topology.vectors if v.name == name), None)
        if vector is None:
            raise UsageError(f"'{name}' is no norm of this model.")
        return vector

    def _refuse_tied(self, side: str) -> None:
        if self.config.tied:
            raise UsageError(
                f"the {side} of '{_TABLE}' cannot be changed alone: the table is the head too; untie it first, "
                "which stores it twice."
            )

    # ------------------------------------------------------------ the checkpoint

    def _in_base(self, site: Site) -> bool:
        return not (site.role == "head" and self.base.config.tied)

    def _below(self, site: Site) -> Site:
        """The site of ``base`` that holds these weights."""
        return site if self._in_base(site) else replace(site, name=_TABLE, role="embed", shares="tokens")

    def native(self, site: Site) -> SiteFormat:
        return self.base.native(self._below(site)) if not self._mapped(site) else parse("f32 @ f32")

    def _mapped(self, site: Site) -> bool:
        return site.name in self._left or site.name in self._right

    def source(self, site: Site) -> RowSource:
        below = self.base.source(self._below(site))
        if not self._mapped(site):
            return below
        return _Mapped(below, tuple(self._left.get(site.name, ())), tuple(self._right.get(site.name, ())))

    def pack(self, site: Site, fmt: SiteFormat | None = None) -> Packed:
        if self._mapped(site):
            return super().pack(site, fmt)
        return self.base.pack(self._below(site), fmt)

    def release(self, site: Site) -> None:
        self.base.release(self._below(site))

    def _gain(self, vector: Vector) -> F64:
        found = self._gains.get(vector.name)
        return self.base.vector(vector).astype(np.float64) if found is None else found

    def vector(self, vector: Vector) -> F32:
        if vector.name not in self._gains:
            return self.base.vector(vector)
        return _finite(self._gains[vector.name], vector.name)

    def _bias(self, site: Site) -> F64 | None:
        if site.name in self._biases:
            return self._biases[site.name]
        bias = self.base.bias(site)
        return None if bias is None else bias.astype(np.float64)

    def bias(self, site: Site) -> F32 | None:
        if site.name not in self._biases:
            return self.base.bias(site)
        return _finite(self._biases[site.name], f"{site.name}.bias")

    def _read_tokenizer(self) -> Tokenizer:
        return self.base.tokenizer()

    def tensors(self) -> Iterator[StoredTensor]:
        return self.base.tensors()

    def provenance(self) -> dict[str, Any]:
        return {**self.base.provenance(), **({"edits": list(self.log)} if self.log else {})}

    def generation(self) -> dict[str, Any]:
        return self.base.generation()


class _Mapped:
    """Rows of L W R: exact reads of the runs of rows that the maps on the left mix."""

    def __init__(self, below: RowSource, left: tuple[Map, ...], right: tuple[Map, ...]) -> None:
        self.below, self.left, self.right = below, left, right
        self.block = math.lcm(*(m.block for m in left)) if left else 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.below.shape

    def read(self, r0: int, r1: int) -> F32:
        rows = self.shape[0]
        if self.block > ROWS_PER_STEP:
            return self._whole[r0:r1]
        first, last = r0 - r0 % self.block, min(rows, r1 + -r1 % self.block)
        w = self._turned(first, last)
        for m in self.left:
            w = m.rows(w, first)
        return _finite(w[r0 - first : r1 - first], "an edited matrix")

    def _turned(self, r0: int, r1: int) -> F64:
        w = self.below.read(r0, r1).astype(np.float64)
        for m in self.right:
            w = m.columns(w)
        return w

    @cached_property
    def _whole(self) -> F32:
        rows, cols = self.shape
        out = np.empty((rows, cols), np.float32)
        for r in range(0, rows, ROWS_PER_STEP):
            out[r : r + ROWS_PER_STEP] = self._turned(r, min(rows, r + ROWS_PER_STEP))
        for c in range(0, cols, _COLUMNS):
            w = out[:, c : c + _COLUMNS].astype(np.float64)
            for m in self.left:
                w = m.rows(w, 0)
            out[:, c : c + _COLUMNS] = _finite(w, "an edited matrix")
        return out


def _checked(values: npt.NDArray[Any], size: int, what: str) -> F64:
    values = np.array(values, np.float64)
    if values.shape != (size,) or not np.isfinite(values).all():
        raise UsageError(f"{what} must be {size} finite numbers, not an array of shape {values.shape}.")
    return values


def _finite(values: F64, where: str) -> F32:
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise UsageError(f"the edits of {where} give a NaN or an infinity; check the factors that were asked for.")
    return np.ascontiguousarray(rounded)
