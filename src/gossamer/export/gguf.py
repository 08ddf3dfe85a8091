"""``export --to gguf``: a model as a GGUF file that llama.cpp loads.

Sites whose values one of ggml's types holds keep them exactly, and bit for bit where the format is that type's own; the
others are refused, or stored anew in a type that was asked for, which reports its error. What a site rounds its input
to is not said in GGUF: llama.cpp rounds as it does.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import gossamer
from gossamer.checkpoints.ggml_pack import as_type, blocks, type_of
from gossamer.checkpoints.ggml_types import LOSSLESS, TYPES, row_bytes
from gossamer.checkpoints.gguf_tokens import tokenizer_keys
from gossamer.checkpoints.one_file import check_space, publish_file
from gossamer.errors import CheckpointError, FormatError, UsageError
from gossamer.export.gguf_keys import config_keys, rope_factors
from gossamer.export.reencode import Errors, Exported, Target, choose
from gossamer.formats import Coded, Dense, Format, Packed, encode, halves, parse_weight
from gossamer.formats.layout import panels
from gossamer.formats.node import PANEL, ROWS_PER_STEP
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.family import by_gguf, gguf_name
from gossamer.models.gguf_checkpoint import GgufCheckpoint
from gossamer.models.load import Progress
from gossamer.models.topology import Site

__all__ = ["WRITABLE", "export_gguf"]

U8 = npt.NDArray[np.uint8]

WRITABLE = ("F32", "F16", "BF16", *LOSSLESS)
_ALIGNMENT = 32
# general.file_type of a file made mostly of a type, where the two names differ.
_FILE_TYPES = {
    "F32": "ALL_F32",
    "Q3_K": "MOSTLY_Q3_K_M",
    "Q4_K": "MOSTLY_Q4_K_M",
    "Q5_K": "MOSTLY_Q5_K_M",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}
# Keys of a source file that describe how that file was made.
_OWN_KEYS = ("general.alignment", "general.architecture", "general.file_type", "general.quantization_version")


def export_gguf(
    checkpoint: Checkpoint, out: str | Path, lossy: Sequence[str] = (), progress: Progress | None = None
) -> Exported:
    """Writes the model to the file ``out``.

    ``lossy``: ggml types, of which the first that a site's width allows takes what no type holds as it is.
    UsageError: ``out`` exists, or an unknown type; UnsupportedError: a site without a type, named, or a model or
    tokenizer that GGUF has no words for; ResourceError: a place that cannot be written. Nothing is left behind then.
    """
    for name in lossy:
        if name not in WRITABLE:
            raise UsageError(f"--lossy {name} is no type that is written; there are {', '.join(WRITABLE)}.")
    where = checkpoint.path.name
    targets = choose(
        checkpoint,
        lambda site: _kept(checkpoint, site),
        lossy,
        _misfit,
        "ggml",
        "add --lossy TYPE (or TYPE,TYPE) to store such sites anew, for example --lossy Q8_0",
    )
    arch, keys = _keys(checkpoint, targets, where)
    topology, errors = checkpoint.topology, Errors()
    paired = by_gguf(arch, where).interleaved_gguf
    with publish_file(out) as partial:
        writer = _writer(partial, arch, keys)
        planned = _announce(checkpoint, targets, writer)
        data_bytes = sum(planned.values())
        check_space(partial, data_bytes + sum(len(str(v)) for v in keys.values()) + _ALIGNMENT * len(planned))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, site in enumerate(topology.sites):
                target = targets[site.name]
                packed = _packed(checkpoint, site, target, errors if lossy else None)
                head = checkpoint.config.head_dim if paired and site.role in ("q", "k") else 0
                writer.write_tensor_data(_file_order(_rows(packed, target.kind, site), head))
                checkpoint.release(site)
                bias = checkpoint.bias(site)
                if bias is not None:
                    writer.write_tensor_data(_file_order(np.ascontiguousarray(bias, np.float32), head))
                if progress:
                    progress(done + 1, len(topology.sites))
            for vector in topology.vectors:
                writer.write_tensor_data(checkpoint.vector(vector))
            factors = _factors(checkpoint, arch)
            if factors is not None:
                writer.write_tensor_data(factors)
        finally:
            writer.close()
        total = partial.stat().st_size
    kinds = {name: target.kind for name, target in targets.items()}
    return Exported(Path(out), data_bytes, total, kinds, errors.sites, errors.overall)


# ------------------------------------------------------------ sites


def _format(kind: str) -> Format:
    return parse_weight(LOSSLESS.get(kind, kind.lower()))


def _kept(checkpoint: Checkpoint, site: Site) -> str | None:
    if isinstance(checkpoint, GgufCheckpoint) and not checkpoint.is_exact(site):
        return None  # its native format is what was decoded
    return type_of(checkpoint.native(site).weight)


def _misfit(site: Site, kind: str) -> str | None:
    """Why a site cannot be of this type; None when it can."""
    _, elems, _ = TYPES[kind]
    if site.cols % elems:
        return f"but rows of {site.cols} elements are no whole blocks of {kind}, which have {elems}"
    return None


def _rows(packed: Packed, kind: str, site: Site) -> npt.NDArray[Any]:
    """The site as its type stores it: uint8 [rows, row_bytes]."""
    out = np.empty((site.rows, row_bytes(kind, site.cols)), np.uint8)
    for r0 in range(0, site.rows, ROWS_PER_STEP):
        r1 = min(site.rows, r0 + ROWS_PER_STEP)
        if isinstance(packed.format, Dense):
            stored = halves.from_float(packed.decode(r0, r1), packed.format.number)
            out[r0:r1] = np.ascontiguousarray(stored).view(np.uint8).reshape(r1 - r0, -1)
            continue
        assert isinstance(packed.format, Coded)
        parts = packed.format.unpack_parts(packed.arrays, site.rows, site.cols, r0 // PANEL, panels(r1))
        try:
            out[r0:r1] = blocks(kind, as_type(packed.format, kind, parts))[: r1 - r0]
        except FormatError as error:
            raise FormatError(
                f"the site '{site.name}' cannot be {kind}: {error}; store it anew with --lossy."
            ) from None
    return out


def _packed(checkpoint: Checkpoint, site: Site, target: Target[str], errors: Errors | None) -> Packed:
    if target.lossy:
        packed = encode(_format(target.kind), checkpoint.source(site), f"{checkpoint.path.name}: {site.name}")
    else:
        packed = checkpoint.pack(site)
    if errors is not None:
        errors.add(site, checkpoint.source(site), packed if target.lossy else None)
    return packed


def _file_order(rows: npt.NDArray[Any], head: int) -> npt.NDArray[Any]:
    """Rows as the file has them: rotary pairs of heads of ``head`` rows lie side by side there; 0 changes nothing."""
    if not head:
        return rows
    by_half = rows.reshape(len(rows) // head, 2, head // 2, -1)
    return np.ascontiguousarray(by_half.swapaxes(1, 2)).reshape(rows.shape)


def _factors(checkpoint: Checkpoint, arch: str) -> npt.NDArray[np.float32] | None:
    return rope_factors(checkpoint.config) if arch == "llama" else None


# ------------------------------------------------------------ header


def _keys(
    checkpoint: Checkpoint, targets: Mapping[str, Target[str]], where: str
) -> tuple[str, dict[str, tuple[Any, Any, Any]]]:
    """The architecture and every other key: (value, type, type of elements)."""
    from gguf import GGUFValueType, LlamaFileType

    if isinstance(checkpoint, GgufCheckpoint):
        arch = str(checkpoint.file.metadata["general.architecture"])
        keys = {k: v for k, v in checkpoint.file.typed_metadata().items() if k not in _OWN_KEYS}
        keys = {k: (v, GGUFValueType(t), None if s is None else GGUFValueType(s)) for k, (v, t, s) in keys.items()}
    else:
        arch, sizes = config_keys(checkpoint.config, where)
        found = {"general.type": "model", **_about(checkpoint), **sizes}
        found |= tokenizer_keys(checkpoint.tokenizer(), checkpoint.config.vocab, where)
        keys = {k: _typed(v) for k, v in found.items()}
    counts = Counter(dict.fromkeys(WRITABLE, 0))
    for site in checkpoint.topology.sites:
        if site.role not in ("embed", "head"):
            counts[targets[site.name].kind] += site.rows * site.cols
    most = max(WRITABLE, key=lambda kind: counts[kind])
    file_type = LlamaFileType[_FILE_TYPES.get(most, f"MOSTLY_{most}")]
    keys["general.file_type"] = (int(file_type), GGUFValueType.UINT32, None)
    keys["general.quantization_version"] = (2, GGUFValueType.UINT32, None)
    keys["general.quantized_by"] = (f"gossamer {gossamer.__version__}", GGUFValueType.STRING, None)
    return arch, keys


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is known about where the model comes from."""
    source = checkpoint.provenance().get("source")
    known = source if isinstance(source, dict) else {}
    names = ("general.name", "general.license", "general.source.url")
    found = {name: known[name] for name in names if isinstance(known.get(name), str) and known[name]}
    return {"general.name": checkpoint.path.resolve().name, **found}


def _typed(value: Any) -> tuple[Any, Any, Any]:
    from gguf import GGUFValueType as Type

    if isinstance(value, np.ndarray):
        return value.tolist(), Type.ARRAY, Type.FLOAT32 if value.dtype.kind == "f" else Type.INT32
    if isinstance(value, list):
        return value, Type.ARRAY, Type.STRING
    kinds = {bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32, str: Type.STRING}
    return value, kinds[type(value)], None


def _writer(path: Path, arch: str, keys: Mapping[str, tuple[Any, Any, Any]]) -> Any:
    from gguf import GGUFWriter

    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = GGUFWriter(path, arch)
    for key, (value, kind, inner) in keys.items():
        if not (inner is not None and len(value) == 0):  # the format's library refuses empty arrays
            writer.add_key_value(key, value, kind, inner)
    return writer


def _announce(checkpoint: Checkpoint, targets: Mapping[str, Target[str]], writer: Any) -> dict[str, int]:
    """Tells the writer of every tensor, in the order in which they will come; their bytes by name."""
    from gguf import GGMLQuantizationType

    config, sizes = checkpoint.config, {}

    def add(name: str, shape: tuple[int, ...], kind: str) -> None:
        nbytes = row_bytes(kind, shape[-1]) * (shape[0] if len(shape) == 2 else 1)
        sizes[name] = nbytes
        # Given in elements: the writer would take the shape of bytes for one of quantized blocks.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, GGMLQuantizationType[kind])

    for site in checkpoint.topology.sites:
        name = gguf_name(site.name, config)
        add(f"{name}.weight", (site.rows, site.cols), targets[site.name].kind)
        if site.bias:
            add(f"{name}.bias", (site.rows,), "F32")
    for vector in checkpoint.topology.vectors:
        add(f"{gguf_name(vector.name, config)}.weight", (vector.size,), "F32")
    if (factors := _factors(checkpoint, writer.arch)) is not None:
        if len(factors) != config.head_dim // 2:
            raise CheckpointError(f"{checkpoint.path.name} has positions that do not fit its head size.")
        add("rope_freqs.weight", factors.shape, "F32")
    return sizes
