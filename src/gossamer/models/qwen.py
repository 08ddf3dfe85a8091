"""Qwen2 and Qwen2.5 (biases on q, k, v; optional sliding window) and Qwen3 (norms on q and k instead)."""

from __future__ import annotations

from typing import Any

from gossamer.errors import CheckpointError, UnsupportedError
from gossamer.models.config import Config, Fields, shown
from gossamer.models.family import Family, rope_gguf, rope_hf, sizes_gguf, sizes_hf

__all__ = ["QWEN2", "QWEN3"]


_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def _windows(f: Fields, layers: int) -> tuple[int, ...]:
    """The window of each layer; without ``layer_types``, all from ``max_window_layers`` on have one."""
    used = f.flag("use_sliding_window", False)
    kinds = f.get("layer_types", list, None)
    if kinds is None:
        first = f.integer("max_window_layers", 28) if used else layers
        kinds = [_GLOBAL if i < first else _LOCAL for i in range(layers)]
    if len(kinds) != layers:
        raise CheckpointError(f"{f.where} lists {len(kinds)} layer types for {layers} layers.")
    for kind in kinds:
        if kind not in (_LOCAL, _GLOBAL):
            raise UnsupportedError(f"{f.where} has a layer of type {shown(kind)}, which is not supported.")
    if _LOCAL in kinds and not used:
        raise CheckpointError(f"{f.where} has layers of type '{_LOCAL}' without 'use_sliding_window' = true.")
    return tuple(f.count("sliding_window", 4096) if kind == _LOCAL else 0 for kind in kinds)


def _from_hf(f: Fields, name: str) -> Config:
    f.only("hidden_act", "silu")
    sizes = sizes_hf(f, head_dim=128 if name == "qwen3" else None, kv_heads=32)
    if name == "qwen3":
        biased = frozenset("qkvo") if f.flag("attention_bias", False) else frozenset()
    else:
        biased = frozenset("qkv")
    return Config(
        family=name,
        **sizes,
        ropes=(rope_hf(f),) * sizes["layers"],
        windows=_windows(f, sizes["layers"]),
        tied=f.flag("tie_word_embeddings", False),
        qk_norm=name == "qwen3",
        biased=biased,
    )


def _from_gguf(f: Fields, arch: str) -> Config:
    sizes = sizes_gguf(f, arch)
    f.only(f"{arch}.attention.sliding_window", 0)
    return Config(
        family=arch,
        **sizes,
        ropes=(rope_gguf(f, arch),) * sizes["layers"],
        windows=(0,) * sizes["layers"],
        qk_norm=arch == "qwen3",
        biased=frozenset("qkv") if arch == "qwen2" else frozenset(),
    )


def _extra(c: Config) -> dict[str, Any]:
    window = max(c.windows)
    data: dict[str, Any] = {
        "hidden_act": "silu",
        "use_sliding_window": bool(window),
        "sliding_window": window or None,
        "layer_types": [_LOCAL if w else _GLOBAL for w in c.windows],
    }
    if c.family == "qwen3":
        data["attention_bias"] = "q" in c.biased
    return data


QWEN2 = Family("qwen2", {"Qwen2ForCausalLM": "qwen2"}, ("qwen2",), _from_hf, _from_gguf, _extra)
QWEN3 = Family("qwen3", {"Qwen3ForCausalLM": "qwen3"}, ("qwen3",), _from_hf, _from_gguf, _extra)
