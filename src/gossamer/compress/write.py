"""A model as a folder of ours: Hugging Face documents, ``gossamer.json``, packed arrays put together from parts.

Parts are copied array by array, so memory stays small whatever their size; the file is in execution order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gossamer
from gossamer.checkpoints.safetensors import SafetensorsFile
from gossamer.checkpoints.safetensors_writer import SafetensorsWriter
from gossamer.compress.calibrate import fingerprint
from gossamer.formats import Packed, SiteFormat
from gossamer.formats.node import ALIGN
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.family import to_hf
from gossamer.models.packed_checkpoint import LAYOUT
from gossamer.models.topology import Site

__all__ = ["WEIGHTS", "Stored", "documents", "ledger", "put_together"]

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """A finished site: the part that holds its arrays, under ``SITE.FIELD``, and its format."""

    part: SafetensorsFile
    site: Site
    format: SiteFormat

    @property
    def names(self) -> list[str]:
        """The names of its arrays in file order."""
        return [f"{self.site.name}.{f}" for f in self.format.weight.fields(self.site.rows, self.site.cols)]

    def packed(self) -> Packed:
        """The matrix, its arrays memory-mapped."""
        fields = self.format.weight.fields(self.site.rows, self.site.cols)
        arrays = {field: self.part.raw(f"{self.site.name}.{field}") for field in fields}
        return Packed(self.format.weight, (self.site.rows, self.site.cols), arrays)


def put_together(folder: Path, checkpoint: Checkpoint, stored: Mapping[str, Stored]) -> int:
    """Writes ``model.safetensors`` from the parts and the checkpoint's biases and norms; returns its data's bytes.

    Vectors come last: their lengths may be odd, and every packed array must start on 64 bytes.
    """
    topology, plus_one = checkpoint.topology, checkpoint.config.norm_plus_one
    specs: list[tuple[str, str, tuple[int, ...]]] = []
    for site in topology.sites:
        found = stored[site.name]
        specs += [(name, info.dtype, info.shape) for name in found.names for info in [found.part.tensors[name]]]
    specs += [(f"{site.name}.bias", "F32", (site.rows,)) for site in topology.sites if site.bias]
    specs += [(f"{vector.name}.weight", "F32", (vector.size,)) for vector in topology.vectors]
    with SafetensorsWriter(folder / WEIGHTS, specs, {"format": "gossamer"}, ALIGN) as writer:
        for site in topology.sites:
            found = stored[site.name]
            for name in found.names:
                writer.write(name, found.part.raw(name))
                found.part.release(name)
        for site in topology.sites:
            bias = checkpoint.bias(site)
            if bias is not None:
                writer.write(f"{site.name}.bias", bias)
        for vector in topology.vectors:
            gain = checkpoint.vector(vector)
            writer.write(f"{vector.name}.weight", gain - np.float32(1) if plus_one else gain)
    return writer.data_bytes


def ledger(
    checkpoint: Checkpoint, source: Checkpoint, formats: Mapping[str, SiteFormat], data_bytes: int, **chapters: Any
) -> dict[str, Any]:
    """What ``gossamer.json`` says of ``checkpoint``, made from ``source``: layout, ``chapters``, formats, sizes."""
    bits = 8 * data_bytes / checkpoint.topology.parameters
    return {
        "layout": LAYOUT,
        "version": gossamer.__version__,
        **chapters,
        "formats": {name: str(fmt) for name, fmt in formats.items()},
        **({"biases": sorted(own)} if (own := checkpoint.config.own_biases) else {}),
        "cost": {"data_bytes": data_bytes, "bits_per_weight": bits},
        "source": {
            "file": source.path.name,
            "kind": source.kind,
            "bytes": source.total_bytes,
            "fingerprint": fingerprint(source),
            **source.provenance(),
        },
    }


def documents(checkpoint: Checkpoint) -> dict[str, str]:
    """The files beside the weights, made before any weight is: what cannot be said is refused at once."""
    tokenizer = checkpoint.tokenizer()
    generation = dict(checkpoint.generation())
    if tokenizer.eos_ids:
        generation["eos_token_id"] = list(tokenizer.eos_ids)
    return {
        "config.json": as_json(to_hf(checkpoint.config.plain)),
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": as_json(tokenizer.config()),
        "generation_config.json": as_json(generation),
    }


def as_json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
