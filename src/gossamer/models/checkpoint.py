"""A checkpoint of any kind as one face: its configuration, and each site's weights in any format.

Four kinds, each in a file of its own: a GGUF file, a Hugging Face folder, one that another program quantized, and a
folder that Gossamer wrote. Weights
stay memory-mapped and are converted one site at a time, a few hundred rows at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoints.folder import Folder
from gossamer.checkpoints.gguf import GGUFFile
from gossamer.errors import CheckpointError, UnsupportedError
from gossamer.formats import Packed, RowSource, SiteFormat, encode
from gossamer.models.config import Config
from gossamer.models.family import Family
from gossamer.models.topology import Site, Topology, Vector, describe

if TYPE_CHECKING:
    from gossamer.checkpoints.tokenizer import Tokenizer

__all__ = ["Checkpoint", "StoredTensor", "expect_shape", "finite", "open_checkpoint", "refuse_unknown"]

F32 = npt.NDArray[np.float32]


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

    def release(self, site: Site) -> None:  # noqa: B027 (most kinds keep nothing)
        """What ``pack`` gave for the site has been copied: pages mapped for it may leave this process."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a ``.gguf`` file or a folder. Raises CheckpointError (or UnsupportedError) in one sentence."""
    from gossamer.models.gguf_checkpoint import GgufCheckpoint
    from gossamer.models.hf_checkpoint import HuggingFaceFolder
    from gossamer.models.packed_checkpoint import PackedFolder
    from gossamer.models.quantized_folder import QuantizedFolder

    path = Path(path)
    if path.is_dir():
        folder = Folder(path)
        if folder.gossamer is not None:
            return PackedFolder(folder)
        quantized = folder.config.get("quantization_config") is not None
        return QuantizedFolder(folder) if quantized else HuggingFaceFolder(folder)
    return GgufCheckpoint(GGUFFile(path))


def expect_shape(where: str, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(found) != wanted:
        raise CheckpointError(
            f"{where}: tensor '{name}' has the shape {list(found)}, but the configuration asks for {list(wanted)}."
        )


def refuse_unknown(where: str, names: set[str]) -> None:
    if names:
        some = ", ".join(sorted(names)[:3])
        raise UnsupportedError(
            f"{where} holds {len(names)} tensor(s) that its architecture does not use ({some}); "
            "it is not a plain model of this family."
        )


def finite(x: F32, where: str, name: str) -> F32:
    if not np.isfinite(x).all():
        raise CheckpointError(f"{where}: tensor '{name}' holds a NaN or an infinity; check the file.")
    return np.ascontiguousarray(x, np.float32)
