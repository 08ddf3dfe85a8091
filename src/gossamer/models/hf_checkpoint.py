"""A folder in the Hugging Face layout as a checkpoint, and what folders of every kind share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoints.folder import Folder
from gossamer.checkpoints.safetensors import TensorInfo
from gossamer.errors import CheckpointError, UnsupportedError
from gossamer.formats import RowSource, SiteFormat, parse
from gossamer.models.checkpoint import Checkpoint, StoredTensor, expect_shape, finite, refuse_unknown
from gossamer.models.config import Fields
from gossamer.models.family import by_hf
from gossamer.models.topology import Site, Vector

if TYPE_CHECKING:
    from gossamer.checkpoints.tokenizer import Tokenizer

__all__ = ["HuggingFaceFolder", "InFolder", "PlainRows", "plain_format"]

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PlainRows:
    """A tensor of a folder as float32 rows."""

    folder: Folder
    name: str
    shape: tuple[int, int]

    def read(self, r0: int, r1: int) -> F32:
        return self.folder.read(self.name, r0, r1)


class InFolder(Checkpoint):
    """What all kinds of folder share: config.json, vectors, biases, tokenizer files."""

    quantized = False  # whether config.json may say that another program quantized the weights

    def __init__(self, folder: Folder) -> None:
        self.folder, self.path = folder, folder.path
        where = f"{folder.path.name}/config.json"
        if folder.config.get("quantization_config") is not None and not self.quantized:
            raise CheckpointError(
                f"{where} says that the weights are quantized, but the folder is one of ours; take it from one program."
            )
        self.family = by_hf(folder.config, where)
        self.config = self.family.from_hf(Fields(folder.config, where), self.family.name)
        self.data_bytes, self.total_bytes = folder.data_bytes, folder.total_bytes

    def _info(self, name: str) -> TensorInfo:
        info = self.folder.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path.name} lacks the tensor '{name}', which its architecture needs.")
        return info

    def _check(self, name: str, shape: tuple[int, ...]) -> str:
        info = self._info(name)
        expect_shape(self.path.name, name, info.shape, shape)
        return info.dtype

    def vector(self, vector: Vector) -> F32:
        name = f"{vector.name}.weight"
        self._check(name, (vector.size,))
        gain = finite(self.folder.read(name).ravel(), self.path.name, name)
        return gain + np.float32(1) if self.config.norm_plus_one else gain

    def bias(self, site: Site) -> F32 | None:
        if not site.bias:
            return None
        name = f"{site.name}.bias"
        self._check(name, (site.rows,))
        return finite(self.folder.read(name).ravel(), self.path.name, name)

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


def plain_format(dtype: str, what: str) -> SiteFormat:
    """The format in which a matrix of plain numbers runs. UnsupportedError names ``what`` is of another type."""
    natives = {"F32": "f32 @ f32", "F16": "f16 @ f32", "BF16": "bf16"}
    if dtype not in natives:
        raise UnsupportedError(f"{what} is {dtype}; weights are read from F32, F16 and BF16.")
    return parse(natives[dtype])


class HuggingFaceFolder(InFolder):
    kind = "folder"

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        ignored = {n for n in folder.tensors if n.endswith("rotary_emb.inv_freq")}
        if self.config.tied:  # some files repeat the tied table
            ignored.add("lm_head.weight")
        for site in self.topology.sites:
            self.native(site)
        known = self._check_vectors() | {f"{s.name}.weight" for s in self.topology.sites}
        refuse_unknown(self.path.name, set(folder.tensors) - known - ignored)

    def native(self, site: Site) -> SiteFormat:
        dtype = self._check(f"{site.name}.weight", (site.rows, site.cols))
        return plain_format(dtype, f"{self.path.name}: tensor '{site.name}.weight'")

    def source(self, site: Site) -> RowSource:
        self.native(site)
        return PlainRows(self.folder, f"{site.name}.weight", (site.rows, site.cols))

    def tensors(self) -> Iterator[StoredTensor]:
        sites = {f"{s.name}.weight": s for s in self.topology.sites}
        for name, info in self.folder.tensors.items():
            runs = str(self.native(sites[name])) if name in sites else "f32"
            yield StoredTensor(name, info.dtype, info.shape, info.nbytes, runs)
