"""A GGUF file as a checkpoint: types that a format holds without loss are repacked, the others decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoints.gguf import LOSSLESS, GGUFFile, parts
from gossamer.errors import CheckpointError, FormatError, UnsupportedError
from gossamer.formats import Coded, Packed, RowSource, SiteFormat, allocate, parse, parse_weight
from gossamer.formats.node import PANEL, ROWS_PER_STEP
from gossamer.models.checkpoint import Checkpoint, StoredTensor, expect_shape, finite, refuse_unknown
from gossamer.models.config import Fields
from gossamer.models.family import by_gguf, gguf_name
from gossamer.models.topology import Site, Vector

if TYPE_CHECKING:
    from gossamer.checkpoints.tokenizer import Tokenizer

__all__ = ["GgufCheckpoint"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

assert ROWS_PER_STEP % PANEL == 0

# The sites that may have a bias; those of the MLP in llama alone.
_ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
_MLP = {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}


@dataclass(frozen=True)
class _Rows:
    file: GGUFFile
    name: str
    shape: tuple[int, int]
    order: I64 | None  # row i of the matrix is row order[i] of the file

    def read(self, r0: int, r1: int) -> F32:
        if self.order is None:
            return self.file.read(self.name, r0, r1)
        rows = self.order[r0:r1]
        low, high = int(rows.min()), int(rows.max()) + 1
        return self.file.read(self.name, low, high)[rows - low]

    def raw(self, r0: int, r1: int) -> npt.NDArray[np.uint8]:
        raw = self.file.raw(self.name)
        return raw[r0:r1] if self.order is None else raw[self.order[r0:r1]]


class GgufCheckpoint(Checkpoint):
    kind = "gguf"

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.path = file, file.path
        where = file.path.name
        if Fields(file.metadata, where).integer("split.count", 0) > 1:
            raise UnsupportedError(f"{where} is one part of a split GGUF; merge the parts into one file first.")
        arch = file.metadata.get("general.architecture")
        self.family = by_gguf(arch, where)
        config = self.family.from_gguf(Fields(file.metadata, where), str(arch))
        names = {**_ATTENTION, **(_MLP if arch == "llama" else {})}
        biased = frozenset(role for role, name in names.items() if f"blk.0.{name}.bias" in file.tensors)
        self.config = replace(config, tied="output.weight" not in file.tensors, biased=config.biased | biased)
        self.data_bytes, self.total_bytes = file.data_bytes, file.path.stat().st_size
        self._roles = {self._name(s.name): s for s in self.topology.sites}
        known = set(self._roles) | {self._name(v.name) for v in self.topology.vectors}
        known |= {self._name(s.name, "bias") for s in self.topology.sites if s.bias}
        self._apply_rope_factors()
        refuse_unknown(where, set(file.tensors) - known - {"rope_freqs.weight"})
        # Everything is looked for now, not after minutes of conversion.
        for site in self.topology.sites:
            self._tensor(self._name(site.name), (site.rows, site.cols))
            if site.bias:
                self._tensor(self._name(site.name, "bias"), (site.rows,))
        for vector in self.topology.vectors:
            self._tensor(self._name(vector.name), (vector.size,))

    def _apply_rope_factors(self) -> None:
        """Llama 3.x files carry their frequency scaling as one divisor per frequency."""
        if "rope_freqs.weight" not in self.file.tensors:
            return
        factors = self.file.read("rope_freqs.weight").ravel()
        half = self.config.head_dim // 2
        expect_shape(self.path.name, "rope_freqs.weight", factors.shape, (half,))
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            raise CheckpointError(f"{self.path.name}: 'rope_freqs.weight' must be positive and finite.")
        ropes = {r: replace(r, divisors=tuple(float(f) for f in factors)) for r in set(self.config.ropes)}
        self.config = replace(self.config, ropes=tuple(ropes[r] for r in self.config.ropes))

    def _name(self, name: str, part: str = "weight") -> str:
        return f"{gguf_name(name, self.config)}.{part}"

    def _tensor(self, name: str, shape: tuple[int, ...]) -> str:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path.name} lacks the tensor '{name}', which its architecture needs.")
        expect_shape(self.path.name, name, tensor.shape, shape)
        return tensor.type

    def _rows(self, site: Site) -> _Rows:
        name = self._name(site.name)
        self._tensor(name, (site.rows, site.cols))
        order = self._order(site.rows) if self.family.interleaved_gguf and site.role in ("q", "k") else None
        return _Rows(self.file, name, (site.rows, site.cols), order)

    def _order(self, rows: int) -> I64:
        """File rows in our order: GGUF puts rotary pairs side by side, Hugging Face half a head apart."""
        d = self.config.head_dim
        return np.arange(rows).reshape(rows // d, d // 2, 2).swapaxes(1, 2).reshape(-1)

    def native(self, site: Site) -> SiteFormat:
        kind = self._tensor(self._name(site.name), (site.rows, site.cols))
        if kind in LOSSLESS:
            return SiteFormat(parse_weight(LOSSLESS[kind]))
        if kind == "BF16":
            return parse("bf16")
        return parse("f32 @ f32" if kind == "F32" else "f16 @ f32")

    def is_exact(self, site: Site) -> bool:
        """Whether the native format holds what the file does; types that no format holds are decoded to f16."""
        return self._tensor(self._name(site.name), (site.rows, site.cols)) in (*LOSSLESS, "F32", "F16", "BF16")

    def source(self, site: Site) -> RowSource:
        return self._rows(site)

    def pack(self, site: Site, fmt: SiteFormat | None = None) -> Packed:
        rows = self._rows(site)
        kind = self.file.tensors[rows.name].type
        weight = (fmt or self.native(site)).weight
        if isinstance(weight, Coded) and LOSSLESS.get(kind) == str(weight):
            packed = self._move(site, rows, kind, weight)
        else:
            packed = super().pack(site, fmt)
        self.file.release(rows.name)
        return packed

    def _move(self, site: Site, rows: _Rows, kind: str, weight: Coded) -> Packed:
        """Codes and scales of the file's own blocks in our layout: no value is computed, so none can change."""
        arrays = allocate(weight, site.rows, site.cols)
        for r0 in range(0, site.rows, ROWS_PER_STEP):
            try:
                step = parts(kind, rows.raw(r0, min(site.rows, r0 + ROWS_PER_STEP)))
            except FormatError as error:
                raise FormatError(f"{self.path.name}: {rows.name} cannot be used: {error}; check the file.") from None
            weight.pack_parts(step, arrays, r0)
        return Packed(weight, (site.rows, site.cols), arrays)

    def vector(self, vector: Vector) -> F32:
        name = self._name(vector.name)
        self._tensor(name, (vector.size,))
        return finite(self.file.read(name).ravel(), self.path.name, name)

    def bias(self, site: Site) -> F32 | None:
        if not site.bias:
            return None
        name = self._name(site.name, "bias")
        self._tensor(name, (site.rows,))
        bias = finite(self.file.read(name).ravel(), self.path.name, name)
        if self.family.interleaved_gguf and site.role in ("q", "k"):
            bias = bias[self._order(site.rows)]
        return bias

    def _read_tokenizer(self) -> Tokenizer:
        from gossamer.checkpoints.tokenizer import Tokenizer

        return Tokenizer.from_gguf(self.file.metadata, self.path.name)

    def tensors(self) -> Iterator[StoredTensor]:
        for name, t in self.file.tensors.items():
            site = self._roles.get(name)
            runs = "f32" if site is None else str(self.native(site))
            if site is not None and t.type not in (*LOSSLESS, "F32", "F16", "BF16"):
                runs += f" (decoded: no format holds {t.type})"
            yield StoredTensor(name, t.type, t.shape, t.nbytes, runs)

    def provenance(self) -> dict[str, Any]:
        keys = ("name", "license", "quantized_by", "source.url", "base_model.0.name")
        found = {f"general.{key}": self.file.metadata.get(f"general.{key}") for key in keys}
        return {key: value for key, value in found.items() if isinstance(value, str)}
