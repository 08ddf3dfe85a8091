"""Writes a model as a folder of ours: Hugging Face files, packed arrays, and ``gossamer.json``.

The folder appears under its name only when it is complete. Arrays are written site by site, so memory stays at
one site's weights beside its packed form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gossamer
from gossamer.checkpoints.folder import publish
from gossamer.checkpoints.safetensors_writer import SafetensorsWriter
from gossamer.errors import ResourceError
from gossamer.formats.node import ALIGN
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.family import to_hf
from gossamer.models.load import Choose, Plan, Progress, plan
from gossamer.models.packed_checkpoint import LAYOUT
from gossamer.models.topology import Topology

__all__ = ["Written", "compress"]


@dataclass(frozen=True)
class Written:
    """A published folder: the bytes of its arrays (the data section of the file) and of the whole folder.

    ``bits_per_weight`` is 8 x ``data_bytes`` / parameters.
    """

    path: Path
    data_bytes: int
    folder_bytes: int
    bits_per_weight: float


def compress(
    checkpoint: Checkpoint,
    out: str | Path,
    choose: Choose,
    *,
    recipe: dict[str, Any],
    before_write: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
) -> Written:
    """Stores every site in the format that ``choose`` gives and publishes the folder ``out``.

    ``before_write`` is told the sizes once the place is known to take them (estimated where they depend on the
    weights), ``progress`` the sites done and in all.

    Raises UsageError when ``out`` exists, ResourceError when it cannot be written, FormatError or CheckpointError
    for weights that cannot be stored; in each case nothing is left behind.
    """
    planned = plan(checkpoint, choose)
    documents, ledger = _documents(checkpoint), _ledger(checkpoint, planned, recipe)
    topology, config = checkpoint.topology, checkpoint.config
    with publish(out) as folder:
        weights = folder / "model.safetensors"
        try:
            specs, open = _specs(topology, planned)
            with SafetensorsWriter(weights, specs, {"format": "gossamer"}, ALIGN, open) as writer:
                if before_write:
                    before_write(planned)
                for done, site in enumerate(topology.sites):
                    packed = checkpoint.pack(site, planned.formats[site.name])
                    for name in packed.format.fields(site.rows, site.cols):
                        writer.write(f"{site.name}.{name}", packed.arrays[name])
                    if progress:
                        progress(done + 1, len(topology.sites))
                for site in topology.sites:
                    bias = checkpoint.bias(site)
                    if bias is not None:
                        writer.write(f"{site.name}.bias", bias)
                for vector in topology.vectors:
                    gain = checkpoint.vector(vector)
                    writer.write(f"{vector.name}.weight", gain - np.float32(1) if config.norm_plus_one else gain)
        except ResourceError as error:
            # The hidden folder means nothing to a person, who asked for another.
            raise ResourceError(str(error).replace(str(weights), str(out))) from None
        bits = 8 * writer.data_bytes / topology.parameters
        ledger["cost"] = {"data_bytes": writer.data_bytes, "bits_per_weight": bits}
        for file, content in {**documents, "gossamer.json": _json(ledger)}.items():
            (folder / file).write_text(content, encoding="utf-8")
        total = sum(f.stat().st_size for f in folder.iterdir())
    return Written(Path(out), writer.data_bytes, total, bits)


def _specs(topology: Topology, planned: Plan) -> tuple[list[tuple[str, str, tuple[int, ...]]], set[str]]:
    """Name, type and shape of every array, in file order, and the names of those whose length is only estimated."""
    specs: list[tuple[str, str, tuple[int, ...]]] = []
    open: set[str] = set()
    for site in topology.sites:
        weight = planned.formats[site.name].weight
        for name, field in weight.fields(site.rows, site.cols).items():
            specs.append((f"{site.name}.{name}", field.dtype, (field.length,)))
            if not field.exact:
                open.add(f"{site.name}.{name}")
    # Vectors come last: their lengths may be odd, and every packed array must start on 64 bytes.
    for site in topology.sites:
        if site.bias:
            specs.append((f"{site.name}.bias", "F32", (site.rows,)))
    for vector in topology.vectors:
        specs.append((f"{vector.name}.weight", "F32", (vector.size,)))
    return specs, open


def _ledger(checkpoint: Checkpoint, planned: Plan, recipe: dict[str, Any]) -> dict[str, Any]:
    """What ``gossamer.json`` says."""
    return {
        "layout": LAYOUT,
        "version": gossamer.__version__,
        "recipe": recipe,
        "formats": {name: str(fmt) for name, fmt in planned.formats.items()},
        **({"biases": sorted(own)} if (own := checkpoint.config.own_biases) else {}),
        "cost": {},  # when all is written
        "source": {
            "file": checkpoint.path.name,
            "kind": checkpoint.kind,
            "bytes": checkpoint.total_bytes,
            "header_sha256": _fingerprint(checkpoint),
            **checkpoint.provenance(),
        },
    }


def _documents(checkpoint: Checkpoint) -> dict[str, str]:
    """The files beside the weights, made before any weight is: what cannot be said is refused at once."""
    tokenizer = checkpoint.tokenizer()
    generation = dict(checkpoint.generation())
    if tokenizer.eos_ids:
        generation["eos_token_id"] = list(tokenizer.eos_ids)
    return {
        "config.json": _json(to_hf(checkpoint.config.plain)),
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": _json(tokenizer.config()),
        "generation_config.json": _json(generation),
    }


def _fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of what the source holds (names, types, shapes), cheap beside hashing gigabytes."""
    digest = hashlib.sha256()
    for t in checkpoint.tensors():
        digest.update(f"{t.name} {t.type} {t.shape} {t.nbytes}\n".encode())
    return digest.hexdigest()


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
