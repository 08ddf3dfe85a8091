"""``export --to compressed-tensors``: a model as a Hugging Face folder that Transformers and vLLM load.

Codes, scales and zero points keep their values; plain matrices stay plain. What the configuration cannot say is
refused, or stored anew as a type that was asked for, which reports its error. The names of the tensors and their shapes
stand in checkpoints/ct_tensors.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoints.ct_scheme import arguments, input_arguments
from gossamer.checkpoints.folder import publish
from gossamer.checkpoints.safetensors_writer import SafetensorsWriter
from gossamer.checkpoints.words import pack_words, words
from gossamer.errors import FormatError, ResourceError, UnsupportedError, UsageError
from gossamer.export.reencode import Errors, Exported, Target, choose
from gossamer.formats import Coded, Dense, Packed, SiteFormat, encode, halves, parse
from gossamer.formats.layout import panels
from gossamer.formats.node import PANEL, ROWS_PER_STEP
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.family import to_hf
from gossamer.models.gguf_checkpoint import GgufCheckpoint
from gossamer.models.load import Progress
from gossamer.models.topology import Site

__all__ = ["export_compressed_tensors"]

_DENSE = ("F32", "F16", "BF16")
_Specs = list[tuple[str, str, tuple[int, ...]]]


def export_compressed_tensors(
    checkpoint: Checkpoint, out: str | Path, lossy: Sequence[str] = (), progress: Progress | None = None
) -> Exported:
    """Writes the model to the folder ``out``.

    ``lossy``: F32, F16, BF16 or expressions (int4/g64, int8/row @ int8/token), of which the first that fits takes what
    cannot be said. UsageError: ``out`` exists; FormatError: an expression that cannot be said; UnsupportedError: such a
    site, or a model that config.json has no words for; ResourceError: a place that cannot be written.
    """
    others = [_asked(text) for text in lossy]
    targets = choose(
        checkpoint,
        lambda site: _kept(checkpoint, site),
        others,
        _misfit,
        "compressed-tensors",
        "add --lossy TYPE (or TYPE,TYPE) to store such sites anew: F32 keeps every value, BF16 is smaller",
    )
    documents, errors, topology = _documents(checkpoint, targets), Errors(), checkpoint.topology
    with publish(out) as folder:
        weights = folder / "model.safetensors"
        try:
            with SafetensorsWriter(weights, _specs(checkpoint, targets), {"format": "pt"}) as writer:
                for done, site in enumerate(topology.sites):
                    packed = _packed(checkpoint, site, targets[site.name], errors if lossy else None)
                    _write(writer, site, packed, targets[site.name].kind)
                    checkpoint.release(site)
                    if progress:
                        progress(done + 1, len(topology.sites))
                for name, vector in _vectors(checkpoint):
                    writer.write(name, vector)
        except ResourceError as error:
            raise ResourceError(str(error).replace(str(weights), str(out))) from None
        for name, text in documents.items():
            (folder / name).write_text(text, encoding="utf-8")
        total = sum(f.stat().st_size for f in folder.iterdir())
    kinds = {name: str(target.kind) for name, target in targets.items()}
    return Exported(Path(out), writer.data_bytes, total, kinds, errors.sites, errors.overall)


# ------------------------------------------------------------ sites


def _asked(text: str) -> SiteFormat:
    if text in _DENSE:
        return SiteFormat(Dense(text.lower()))
    fmt = parse(text)
    if _scheme(fmt) is None:
        raise FormatError(
            f"--lossy {text} cannot be said in compressed-tensors; write {', '.join(_DENSE)} or, for example, "
            "int4/g64, uint4/g128, int8/row @ int8/token or e4m3/row @ e4m3/token."
        )
    return fmt


def _kept(checkpoint: Checkpoint, site: Site) -> SiteFormat | None:
    if isinstance(checkpoint, GgufCheckpoint) and not checkpoint.is_exact(site):
        return None  # its native format is what was decoded
    fmt = checkpoint.native(site)
    if isinstance(fmt.weight, Dense):
        return fmt
    return fmt if _scheme(fmt) is not None else None


def _misfit(site: Site, fmt: SiteFormat) -> str | None:
    """Why a site cannot be stored so; None when it can."""
    if isinstance(fmt.weight, Dense):
        return None
    assert isinstance(fmt.weight, Coded)
    group = fmt.weight.group.cols
    if site.role == "embed":
        return "but compressed-tensors quantizes linear layers, and this is an embedding"
    if fmt.weight.group.rows == 1 and group is not None and site.cols % group:
        return f"but rows of {site.cols} elements are no whole groups of {group}"
    return None


def _scheme(fmt: SiteFormat) -> dict[str, Any] | None:
    """A group of the configuration, without its targets; None where it has no words for the format."""
    said = arguments(fmt.weight) if isinstance(fmt.weight, Coded) else None
    inputs = input_arguments(fmt.input)
    if said is None or inputs is None:
        return None
    stored, weights = said
    if inputs and stored == "pack-quantized" and weights["num_bits"] == 8 and weights["strategy"] != "group":
        stored = "int-quantized"
    return {"format": stored, "weights": weights, "input_activations": inputs or None, "output_activations": None}


def _packed(checkpoint: Checkpoint, site: Site, target: Target[SiteFormat], errors: Errors | None) -> Packed:
    if target.lossy:
        packed = encode(target.kind.weight, checkpoint.source(site), f"{checkpoint.path.name}: {site.name}")
    else:
        packed = checkpoint.pack(site)
    if errors is not None:
        errors.add(site, checkpoint.source(site), packed if target.lossy else None)
    return packed


def _specs(checkpoint: Checkpoint, targets: Mapping[str, Target[SiteFormat]]) -> _Specs:
    """Name, type and shape of every tensor, in file order."""
    specs: _Specs = []
    for site in checkpoint.topology.sites:
        specs += _site_specs(site, targets[site.name].kind)
    return specs + [(name, "F32", vector.shape) for name, vector in _vectors(checkpoint)]


def _site_specs(site: Site, fmt: SiteFormat) -> _Specs:
    weight, scheme = fmt.weight, _scheme(fmt)
    if isinstance(weight, Dense):
        return [(f"{site.name}.weight", weight.number.upper(), (site.rows, site.cols))]
    assert isinstance(weight, Coded)
    assert scheme is not None  # what choose saw to
    scale = weight.matrix(site.rows, site.cols)
    bits, packed = weight.number.bits, scheme["format"] == "pack-quantized"
    kind = "I32" if packed else "F8_E4M3" if weight.number.table is not None else "I8"
    shape = (site.rows, words(site.cols, bits) if packed else site.cols)
    specs: _Specs = [(f"{site.name}.weight_packed" if packed else f"{site.name}.weight", kind, shape)]
    if packed:
        specs.append((f"{site.name}.weight_shape", "I64", (2,)))
    of_tensor = weight.group.rows is None
    specs.append((f"{site.name}.weight_scale", str(weight.scale).upper(), (1,) if of_tensor else scale))
    if weight.zero:
        rows = words(site.rows, bits) if packed else site.rows
        specs.append((f"{site.name}.weight_zero_point", "I32" if packed else "I8", (rows, scale[1])))
    if isinstance(fmt.input.group, float):
        specs.append((f"{site.name}.input_scale", "F32", (1,)))
    return specs


def _write(writer: SafetensorsWriter, site: Site, packed: Packed, fmt: SiteFormat) -> None:
    specs = {name.removeprefix(f"{site.name}."): shape for name, _, shape in _site_specs(site, fmt)}
    codes = f"{site.name}.weight_packed" if "weight_packed" in specs else f"{site.name}.weight"
    width = specs[codes.removeprefix(f"{site.name}.")][1]
    weight = packed.format
    if "input_scale" in specs:
        writer.write(f"{site.name}.input_scale", np.array([fmt.input.group], np.float32))
    zeros = []
    for r0 in range(0, site.rows, ROWS_PER_STEP):
        r1 = min(site.rows, r0 + ROWS_PER_STEP)
        if isinstance(weight, Dense):
            writer.write_at(codes, r0 * width, halves.from_float(packed.decode(r0, r1), weight.number))
            continue
        assert isinstance(weight, Coded)
        parts = weight.unpack_parts(packed.arrays, site.rows, site.cols, r0 // PANEL, panels(r1))
        writer.write_at(codes, r0 * width, _stored(parts.codes[: r1 - r0], weight, "weight_packed" in specs))
        if not parts.shared:
            scales = np.asarray(parts.scales)[: r1 - r0]
            writer.write_at(f"{site.name}.weight_scale", r0 * scales.shape[1], scales)
        elif r0 == 0:
            writer.write_at(f"{site.name}.weight_scale", 0, np.asarray(parts.scales))
        if parts.zeros is not None:
            zeros.append(parts.zeros[: r1 - r0])
    if "weight_shape" in specs:
        writer.write(f"{site.name}.weight_shape", np.array([site.rows, site.cols], "<i8"))
    if zeros:
        assert isinstance(weight, Coded)
        whole = np.concatenate(zeros)
        if "weight_packed" in specs:  # in words along the rows
            stored: npt.NDArray[Any] = np.ascontiguousarray(
                pack_words(np.ascontiguousarray(whole.T), weight.number.bits).T
            )
        else:
            stored = (whole ^ np.uint8(0x80)).view(np.int8)
        writer.write(f"{site.name}.weight_zero_point", stored)


def _stored(codes: npt.NDArray[np.uint8], weight: Coded, packed: bool) -> npt.NDArray[Any]:
    if packed:
        return pack_words(codes, weight.number.bits)
    if weight.number.table is not None:
        return np.ascontiguousarray(codes)
    return (codes ^ np.uint8(0x80)).view(np.int8)


def _vectors(checkpoint: Checkpoint) -> list[tuple[str, npt.NDArray[np.float32]]]:
    """Biases and norms, as files hold them."""
    found = []
    for site in checkpoint.topology.sites:
        bias = checkpoint.bias(site)
        if bias is not None:
            found.append((f"{site.name}.bias", np.ascontiguousarray(bias, np.float32)))
    less = np.float32(1 if checkpoint.config.norm_plus_one else 0)
    found += [(f"{v.name}.weight", checkpoint.vector(v) - less) for v in checkpoint.topology.vectors]
    return found


# ------------------------------------------------------------ documents


def _documents(checkpoint: Checkpoint, targets: Mapping[str, Target[SiteFormat]]) -> dict[str, str]:
    """The files beside the weights."""
    where = checkpoint.path.name
    if any(rope.divisors for rope in checkpoint.config.ropes):
        raise UnsupportedError(
            f"{where}: the positions of this model are scaled frequency by frequency, as its GGUF file said, which "
            "Transformers has no words for; export the original Hugging Face folder."
        )
    config = to_hf(checkpoint.config)
    quantization = _quantization(checkpoint, targets)
    if quantization is None:
        raise UsageError(f"{where} would be plain numbers throughout; compress it first, for example to int4/g64.")
    config["dtype"] = _dtype(checkpoint, targets)
    config["quantization_config"] = quantization
    tokenizer = checkpoint.tokenizer()
    generation = dict(checkpoint.generation())
    if tokenizer.eos_ids:
        generation["eos_token_id"] = list(tokenizer.eos_ids)
    return {
        "config.json": _json(config),
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": _json(tokenizer.config()),
        "generation_config.json": _json(generation),
    }


def _quantization(checkpoint: Checkpoint, targets: Mapping[str, Target[SiteFormat]]) -> dict[str, Any] | None:
    groups: list[dict[str, Any]] = []
    members: list[list[str]] = []
    ignore = ["lm_head"] if checkpoint.topology.tied else []  # a module also where the table is shared
    for site in checkpoint.topology.sites:
        scheme = _scheme(targets[site.name].kind)
        if scheme is None:
            ignore += [site.name] if site.role != "embed" else []
            continue
        if scheme not in groups:
            groups.append(scheme)
            members.append([])
        members[groups.index(scheme)].append(site.name)
    if not groups:
        return None
    formats = {group["format"] for group in groups}
    named = [["Linear"]] if len(groups) == 1 else members
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": {"targets": t, **g} for i, (t, g) in enumerate(zip(named, groups))},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def _dtype(checkpoint: Checkpoint, targets: Mapping[str, Target[SiteFormat]]) -> str:
    """The smallest type that holds every scale, plain matrix, norm and bias as it is: programs compute in it."""
    stored = set()
    for target in targets.values():
        weight = target.kind.weight
        stored.add(weight.number if isinstance(weight, Dense) else str(getattr(weight, "scale", "f32")))
    for name, word in (("bf16", "bfloat16"), ("f16", "float16")):
        if stored <= {name} and all(
            np.array_equal(halves.to_float(halves.from_float(v, name), name), v) for _, v in _vectors(checkpoint)
        ):
            return word
    return "float32"


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
