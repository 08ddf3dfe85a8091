"""A checkpoint of any kind as one face: its configuration, and each site's weights in any format.

Three kinds: a GGUF file, a Hugging Face folder, and a folder that Gossamer wrote. Weights stay memory-mapped and
are converted one site at a time, a few thousand rows at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoints.folder import Folder
from gossamer.checkpoints.gguf import LOSSLESS, GGUFFile, blocks
from gossamer.errors import CheckpointError, FormatError, UnsupportedError
from gossamer.formats import Coded, Packed, RowSource, SiteFormat, allocate, parse, parse_weight
from gossamer.formats.node import PANEL, ROWS_PER_STEP, encode
from gossamer.models.config import Config, Fields, shown
from gossamer.models.family import Family, by_gguf, by_hf, gguf_name
from gossamer.models.topology import Site, Topology, Vector, describe

if TYPE_CHECKING:
    from gossamer.checkpoints.tokenizer import Tokenizer

__all__ = ["Checkpoint", "StoredTensor", "open_checkpoint"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file holds it: its type there, shape and bytes, and what it runs as."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    runs_as: str


class Checkpoint(ABC):
    """An opened model: nothing is converted until it is asked for."""

    kind: str
    path: Path
    family: Family
    config: Config
    data_bytes: int  # all tensors in the file or files
    total_bytes: int  # the files themselves

    @property
    def topology(self) -> Topology:
        return describe(self.config)

    @abstractmethod
    def native(self, site: Site) -> SiteFormat:
        """The format in which the site runs when none is asked for."""

    @abstractmethod
    def source(self, site: Site) -> RowSource:
        """The site's weights as float32 rows, in the Hugging Face order."""

    @abstractmethod
    def vector(self, vector: Vector) -> F32:
        """A norm's gain, float32 [size], ready to multiply with."""

    @abstractmethod
    def bias(self, site: Site) -> F32 | None:
        """The site's bias, float32 [rows], or None."""

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._read_tokenizer()

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, made once."""
        return self._tokenizer

    @abstractmethod
    def _read_tokenizer(self) -> Tokenizer: ...

    @abstractmethod
    def tensors(self) -> Iterator[StoredTensor]:
        """What the file holds, in file order."""

    def provenance(self) -> dict[str, Any]:
        """Where the weights come from, as far as the file tells."""
        return {}

    def generation(self) -> dict[str, Any]:
        """Sampling defaults that the checkpoint suggests (Hugging Face ``generation_config.json``)."""
        return {}

    def pack(self, site: Site, fmt: SiteFormat | None = None) -> Packed:
        """The site's weights as ``fmt`` stores them; None keeps the native format, losslessly where there is one."""
        wanted = fmt or self.native(site)
        return encode(wanted.weight, self.source(site), f"{self.path.name}: {site.name}")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a ``.gguf`` file or a folder. Raises CheckpointError (or UnsupportedError) in one sentence."""
    path = Path(path)
    if path.is_dir():
        folder = Folder(path)
        return _PackedFolder(folder) if folder.gossamer is not None else _HuggingFace(folder)
    return _Gguf(GGUFFile(path))


def _expect_shape(where: str, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(found) != wanted:
        raise CheckpointError(
            f"{where}: tensor '{name}' has the shape {list(found)}, but the configuration asks for {list(wanted)}."
        )


def _refuse_unknown(where: str, names: set[str]) -> None:
    if names:
        some = ", ".join(sorted(names)[:3])
        raise UnsupportedError(
            f"{where} holds {len(names)} tensor(s) that its architecture does not use ({some}); "
            "it is not a plain model of this family."
        )


# ---------------------------------------------------------------- GGUF


@dataclass(frozen=True)
class _GgufRows:
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


class _Gguf(Checkpoint):
    kind = "gguf"

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.path = file, file.path
        where = file.path.name
        if Fields(file.metadata, where).integer("split.count", 0) > 1:
            raise UnsupportedError(f"{where} is one part of a split GGUF; merge the parts into one file first.")
        arch = file.metadata.get("general.architecture")
        self.family = by_gguf(arch, where)
        config = self.family.from_gguf(Fields(file.metadata, where), str(arch))
        biased = frozenset(
            role
            for role, name in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output"))
            if f"blk.0.{name}.bias" in file.tensors
        )
        self.config = replace(config, tied="output.weight" not in file.tensors, biased=config.biased | biased)
        self.data_bytes, self.total_bytes = file.data_bytes, file.path.stat().st_size
        self._roles = {self._name(s.name): s for s in self.topology.sites}
        known = set(self._roles) | {self._name(v.name) for v in self.topology.vectors}
        known |= {self._name(s.name, "bias") for s in self.topology.sites if s.bias}
        self._apply_rope_factors()
        _refuse_unknown(where, set(file.tensors) - known - {"rope_freqs.weight"})
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
        _expect_shape(self.path.name, "rope_freqs.weight", factors.shape, (half,))
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
        _expect_shape(self.path.name, name, tensor.shape, shape)
        return tensor.type

    def _rows(self, site: Site) -> _GgufRows:
        name = self._name(site.name)
        self._tensor(name, (site.rows, site.cols))
        order = self._order(site.rows) if self.family.interleaved_gguf and site.role in ("q", "k") else None
        return _GgufRows(self.file, name, (site.rows, site.cols), order)

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

    def _move(self, site: Site, rows: _GgufRows, kind: str, weight: Coded) -> Packed:
        """Codes and scales of the file's own blocks in our layout: no value is computed, so none can change."""
        arrays = allocate(weight, site.rows, site.cols)
        for r0 in range(0, site.rows, ROWS_PER_STEP):
            part = blocks(kind, rows.raw(r0, min(site.rows, r0 + ROWS_PER_STEP)))
            if not (np.isfinite(part.scales).all() and (part.mins is None or np.isfinite(part.mins).all())):
                raise FormatError(
                    f"{self.path.name}: {rows.name} holds a NaN or an infinity among its scales; check the file."
                )
            weight.pack_rows(part.codes, part.scales, part.mins, arrays, r0)
        return Packed(weight, (site.rows, site.cols), arrays)

    def vector(self, vector: Vector) -> F32:
        name = self._name(vector.name)
        self._tensor(name, (vector.size,))
        return _finite(self.file.read(name).ravel(), self.path.name, name)

    def bias(self, site: Site) -> F32 | None:
        if not site.bias:
            return None
        name = self._name(site.name, "bias")
        self._tensor(name, (site.rows,))
        bias = _finite(self.file.read(name).ravel(), self.path.name, name)
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
                runs += f" (decoded: {t.type} does not run as it is yet)"
            yield StoredTensor(name, t.type, t.shape, t.nbytes, runs)

    def provenance(self) -> dict[str, Any]:
        keys = ("name", "license", "quantized_by", "source.url", "base_model.0.name")
        found = {f"general.{key}": self.file.metadata.get(f"general.{key}") for key in keys}
        return {key: value for key, value in found.items() if isinstance(value, str)}


# ---------------------------------------------------------------- Hugging Face folder


@dataclass(frozen=True)
class _FolderRows:
    folder: Folder
    name: str
    shape: tuple[int, int]

    def read(self, r0: int, r1: int) -> F32:
        return self.folder.read(self.name, r0, r1)


def _finite(x: F32, where: str, name: str) -> F32:
    if not np.isfinite(x).all():
        raise CheckpointError(f"{where}: tensor '{name}' holds a NaN or an infinity; check the file.")
    return np.ascontiguousarray(x, np.float32)


class _InFolder(Checkpoint):
    """What the two kinds of folder share: config.json, vectors, biases, tokenizer files."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.path = folder, folder.path
        where = f"{folder.path.name}/config.json"
        method = folder.config.get("quantization_config")
        if method is not None:
            method = method.get("quant_method") if isinstance(method, dict) else method
            raise UnsupportedError(
                f"{where} says that the weights are quantized by {shown(method)}, which is not read yet."
            )
        self.family = by_hf(folder.config, where)
        self.config = self.family.from_hf(Fields(folder.config, where), self.family.name)
        self.data_bytes, self.total_bytes = folder.data_bytes, folder.total_bytes

    def _check(self, name: str, shape: tuple[int, ...]) -> str:
        info = self.folder.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path.name} lacks the tensor '{name}', which its architecture needs.")
        _expect_shape(self.path.name, name, info.shape, shape)
        return info.dtype

    def vector(self, vector: Vector) -> F32:
        name = f"{vector.name}.weight"
        self._check(name, (vector.size,))
        gain = _finite(self.folder.read(name).ravel(), self.path.name, name)
        return gain + np.float32(1) if self.config.norm_plus_one else gain

    def bias(self, site: Site) -> F32 | None:
        if not site.bias:
            return None
        name = f"{site.name}.bias"
        self._check(name, (site.rows,))
        return _finite(self.folder.read(name).ravel(), self.path.name, name)

    def _read_tokenizer(self) -> Tokenizer:
        from gossamer.checkpoints.tokenizer import Tokenizer

        return Tokenizer.from_folder(self.path)

    def generation(self) -> dict[str, Any]:
        return self.folder.generation_config or {}

    def _check_vectors(self) -> set[str]:
        """The names of norms and biases, all of which are there: a gap is found before any conversion."""
        shapes = {f"{v.name}.weight": (v.size,) for v in self.topology.vectors}
        shapes |= {f"{s.name}.bias": (s.rows,) for s in self.topology.sites if s.bias}
        for name, shape in shapes.items():
            self._check(name, shape)
        return set(shapes)


class _HuggingFace(_InFolder):
    kind = "folder"

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        ignored = {n for n in folder.tensors if n.endswith("rotary_emb.inv_freq")}
        if self.config.tied:  # some files repeat the tied table
            ignored.add("lm_head.weight")
        for site in self.topology.sites:
            self.native(site)
        known = self._check_vectors() | {f"{s.name}.weight" for s in self.topology.sites}
        _refuse_unknown(self.path.name, set(folder.tensors) - known - ignored)

    def native(self, site: Site) -> SiteFormat:
        dtype = self._check(f"{site.name}.weight", (site.rows, site.cols))
        natives = {"F32": "f32 @ f32", "F16": "f16 @ f32", "BF16": "bf16"}
        if dtype not in natives:
            raise UnsupportedError(
                f"{self.path.name}: tensor '{site.name}.weight' is {dtype}; weights are read from F32, F16 and BF16."
            )
        return parse(natives[dtype])

    def source(self, site: Site) -> RowSource:
        self.native(site)
        return _FolderRows(self.folder, f"{site.name}.weight", (site.rows, site.cols))

    def tensors(self) -> Iterator[StoredTensor]:
        sites = {f"{s.name}.weight": s for s in self.topology.sites}
        for name, info in self.folder.tensors.items():
            runs = str(self.native(sites[name])) if name in sites else "f32"
            yield StoredTensor(name, info.dtype, info.shape, info.nbytes, runs)


# ---------------------------------------------------------------- a folder of ours


@dataclass(frozen=True)
class _PackedRows:
    packed: Packed

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    def read(self, r0: int, r1: int) -> F32:
        return self.packed.decode(r0, r1)


class _PackedFolder(_InFolder):
    kind = "gossamer"

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        where = f"{folder.path.name}/gossamer.json"
        assert folder.gossamer is not None  # what open_checkpoint looked at
        self.ledger = folder.gossamer
        version = self.ledger.get("layout")
        if version != LAYOUT:
            raise UnsupportedError(f"{where} has layout version {shown(version)}; this release reads version {LAYOUT}.")
        formats = self.ledger.get("formats")
        if not isinstance(formats, dict) or not all(isinstance(v, str) for v in formats.values()):
            raise CheckpointError(f"{where} has no 'formats' that map each site to an expression.")
        if surplus := sorted(set(formats) - {s.name for s in self.topology.sites}):
            raise CheckpointError(f"{where} gives a format for {shown(surplus[0])}, which is no site of this model.")
        self._formats: dict[str, SiteFormat] = {}
        known = self._check_vectors()
        for site in self.topology.sites:
            if site.name not in formats:
                raise CheckpointError(f"{where} gives no format for the site '{site.name}'.")
            try:
                fmt = self._formats[site.name] = parse(formats[site.name])
            except FormatError as error:
                raise CheckpointError(f"{where}, site '{site.name}': {error}") from None
            for field, facts in fmt.weight.fields(site.rows, site.cols).items():
                self._check(f"{site.name}.{field}", (facts.length,))
                known.add(f"{site.name}.{field}")
        _refuse_unknown(self.path.name, set(folder.tensors) - known)

    def native(self, site: Site) -> SiteFormat:
        return self._formats[site.name]

    def stored(self, site: Site) -> Packed:
        """The packed arrays as they lie in the file, memory-mapped."""
        weight = self._formats[site.name].weight
        arrays = {field: self.folder.raw(f"{site.name}.{field}") for field in weight.fields(site.rows, site.cols)}
        packed = Packed(weight, (site.rows, site.cols), arrays)
        try:
            packed.validate(f"{self.path.name}: {site.name}")
        except FormatError as error:
            raise CheckpointError(str(error)) from None
        return packed

    def source(self, site: Site) -> RowSource:
        return _PackedRows(self.stored(site))

    def pack(self, site: Site, fmt: SiteFormat | None = None) -> Packed:
        if fmt is None or fmt.weight == self._formats[site.name].weight:
            return self.stored(site)
        return super().pack(site, fmt)

    def tensors(self) -> Iterator[StoredTensor]:
        sites = {s.name: s for s in self.topology.sites}
        for name, info in self.folder.tensors.items():
            site = sites.get(name.rpartition(".")[0])
            runs = "f32" if site is None or name.endswith(".bias") else str(self._formats[site.name])
            yield StoredTensor(name, info.dtype, info.shape, info.nbytes, runs)

    def provenance(self) -> dict[str, Any]:
        return {k: v for k, v in self.ledger.items() if k != "formats"}


LAYOUT = 1  # version of the packed byte layout; see docs/formats.md
assert ROWS_PER_STEP % PANEL == 0
