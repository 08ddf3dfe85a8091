"""A configuration in the words of GGUF: the inverse of each family's ``from_gguf``, which checks what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import UnsupportedError
from gossamer.models.config import Config, Fields, Rope
from gossamer.models.family import by_gguf

__all__ = ["config_keys", "rope_factors"]

F32 = npt.NDArray[np.float32]

_ARCHITECTURE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3"}

# The sites to which llama.cpp adds a bias.
_BIASED: dict[str, frozenset[str]] = {
    "llama": frozenset({"q", "k", "v", "o", "gate", "up", "down"}),
    "qwen2": frozenset("qkv"),
}


def config_keys(config: Config, where: str) -> tuple[str, dict[str, Any]]:
    """``general.architecture`` and the keys of the sizes, positions and windows: int (uint32) or float (float32).

    UnsupportedError: something about the model that llama.cpp would not heed.
    """
    arch = _ARCHITECTURE.get(config.family)
    if arch is None:
        raise UnsupportedError(f"{where}: GGUF files are not written for the family '{config.family}'.")
    if extra := sorted(config.biased - _BIASED.get(arch, frozenset())):
        raise UnsupportedError(
            f"{where}: the sites '{extra[0]}' have a bias, which llama.cpp's architecture '{arch}' does not add; "
            "export to compressed-tensors instead."
        )
    base = config.ropes[-1] if arch != "gemma3" else _of_type(config, local=False)
    keys: dict[str, Any] = {
        "context_length": config.context,
        "embedding_length": config.hidden,
        "block_count": config.layers,
        "feed_forward_length": config.ffn,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(base.theta),
    }
    if base.kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(base.factor)}
    if arch == "gemma3":
        keys["attention.sliding_window"] = max(config.windows) or 4096
        keys["rope.freq_base_swa"] = float(_of_type(config, local=True).theta)
    else:
        keys["vocab_size"] = config.vocab
    keys = {f"{arch}.{name}": value for name, value in keys.items()}
    _check(config, arch, keys, where)
    return arch, keys


def _of_type(config: Config, *, local: bool) -> Rope:
    found = (r for r, w in zip(config.ropes, config.windows) if bool(w) == local)
    return next(found, Rope(10000.0 if local else 1e6))


def rope_factors(config: Config) -> F32 | None:
    """``rope_freqs.weight``: what each frequency is divided by, float32 [head_dim / 2]; None where there is no need."""
    rope = config.ropes[0]
    if rope.divisors:
        return np.array(rope.divisors, np.float32)
    if rope.kind != "llama3":
        return None
    # Llama 3.1, as its reference code has it: long waves are divided, short ones kept, those between blended.
    inverse = 1 / rope.theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    turns = rope.original_context * inverse / (2 * np.pi)
    kept = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
    return (1 / ((1 - kept) / rope.factor + kept)).astype(np.float32)


def _check(config: Config, arch: str, keys: Mapping[str, Any], where: str) -> None:
    """Reads the keys back: whatever differs is something that GGUF has no words for."""
    data = {**keys, f"{arch}.vocab_size": config.vocab}
    back = by_gguf(arch, where).from_gguf(Fields(data, where), arch)
    plain = Rope(config.ropes[0].theta)
    scaled = config.ropes[0].kind == "llama3" or bool(config.ropes[0].divisors)
    if scaled and arch == "llama" and len(set(config.ropes)) == 1:  # a tensor says it
        wanted = replace(config, ropes=(plain,) * config.layers)
    else:
        wanted = config
    # A window that spans the whole context hides nothing.
    wanted = replace(wanted, windows=tuple(0 if w >= config.context else w for w in config.windows))
    back = replace(back, windows=tuple(0 if w >= config.context else w for w in back.windows))
    ignored = ("family", "tied", "biased")
    mine, theirs = (_rounded({k: v for k, v in asdict(c).items() if k not in ignored}) for c in (wanted, back))
    mine["attn_scale"], theirs["attn_scale"] = np.float32(config.scale), np.float32(back.scale)
    for name, value in mine.items():
        if value != theirs[name]:
            what = {"ropes": "positions", "windows": "windows", "attn_scale": "scale of its scores"}.get(name, name)
            raise UnsupportedError(
                f"{where}: this model cannot be written as GGUF, for llama.cpp's architecture '{arch}' has no words "
                f"for its {what}."
            )


def _rounded(value: Any) -> Any:
    """Floats as GGUF holds them."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_rounded(v) for v in value]
    return float(np.float32(value)) if isinstance(value, float) else value
