"""A Hugging Face folder that another program quantized: compressed-tensors, GPTQ or AWQ.

Codes, scales and zero points move into our arrays as they are; no value is computed, so none can change. Columns that
were ordered by activations become ``permute(...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoints.ct_tensors import CompressedTensors
from gossamer.checkpoints.folder import Folder
from gossamer.checkpoints.gptq_tensors import AwqTensors, GptqTensors
from gossamer.checkpoints.stored import QuantizedTensors, StoredSite
from gossamer.errors import CheckpointError, UnsupportedError
from gossamer.formats import Packed, Permute, RowSource, SiteFormat, allocate
from gossamer.formats.composite import padded
from gossamer.formats.node import ROWS_PER_STEP, PackedSource
from gossamer.models.checkpoint import StoredTensor, refuse_unknown
from gossamer.models.config import shown
from gossamer.models.hf_checkpoint import InFolder, PlainRows, plain_format
from gossamer.models.topology import Site

__all__ = ["QuantizedFolder"]

F32 = npt.NDArray[np.float32]

_METHODS: Mapping[str, Callable[[Folder, Mapping[str, Any], str], QuantizedTensors]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": GptqTensors,
    "awq": AwqTensors,
}


class QuantizedFolder(InFolder):
    quantized = True

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        where = f"{folder.path.name}/config.json"
        config = folder.config["quantization_config"]
        if not isinstance(config, dict):
            raise CheckpointError(f"{where} has a 'quantization_config' {shown(config)}, which should be an object.")
        method = config.get("quant_method")
        if not isinstance(method, str) or method not in _METHODS:
            raise UnsupportedError(
                f"{where} says that the weights are quantized by {shown(method)}, which is not read; "
                f"read are {', '.join(_METHODS)}."
            )
        self.kind = method
        self._tensors = _METHODS[method](folder, config, where)
        self._stored: dict[str, StoredSite | None] = {}
        known = self._check_vectors()
        ignored = {n for n in folder.tensors if n.endswith("rotary_emb.inv_freq")}
        self._owner: dict[str, Site] = {}
        for site in self.topology.sites:
            stored = self._tensors.site(site.name, _class(site), site.rows, site.cols)
            self._stored[site.name] = stored
            names = (f"{site.name}.weight",) if stored is None else stored.tensors
            self._owner |= dict.fromkeys(names, site)
            if not site.bias:
                ignored |= set(self._tensors.surplus(site.name))
            if stored is None:
                self.native(site)
        if self.config.tied:  # some files repeat the tied table
            ignored.add("lm_head.weight")
        refuse_unknown(self.path.name, set(folder.tensors) - known - ignored - set(self._owner))

    def native(self, site: Site) -> SiteFormat:
        stored = self._stored[site.name]
        if stored is None:
            dtype = self._check(f"{site.name}.weight", (site.rows, site.cols))
            return plain_format(dtype, f"{self.path.name}: tensor '{site.name}.weight'")
        weight = stored.weight if stored.order is None else Permute(stored.weight)
        return SiteFormat(weight, stored.input)

    def pack(self, site: Site, fmt: SiteFormat | None = None) -> Packed:
        stored = self._stored[site.name]
        native = self.native(site).weight
        if stored is None or (fmt is not None and fmt.weight != native):
            return super().pack(site, fmt)
        arrays = allocate(stored.weight, site.rows, site.cols)
        for r0 in range(0, site.rows, ROWS_PER_STEP):
            parts = stored.parts(r0, min(site.rows, r0 + ROWS_PER_STEP))
            stored.weight.pack_parts(parts, arrays, r0)
        if stored.order is not None:
            arrays = {"index": padded(stored.order), **{f"0.{name}": a for name, a in arrays.items()}}
        return Packed(native, (site.rows, site.cols), arrays)

    def source(self, site: Site) -> RowSource:
        if self._stored[site.name] is None:
            self.native(site)
            return PlainRows(self.folder, f"{site.name}.weight", (site.rows, site.cols))
        return PackedSource(self.pack(site))

    def release(self, site: Site) -> None:
        stored = self._stored[site.name]
        for name in stored.tensors if stored else ():
            self.folder.release(name)

    def tensors(self) -> Iterator[StoredTensor]:
        for name, info in self.folder.tensors.items():
            site = self._owner.get(name)
            runs = "f32" if site is None else str(self.native(site))
            yield StoredTensor(name, info.dtype, info.shape, info.nbytes, runs)


def _class(site: Site) -> str:
    """The class of the module, as targets name it."""
    return "Embedding" if site.role == "embed" else "Linear"
