"""Gemma 3 (text): norms before and after each block, norms on q and k, GeGLU, five local layers to one global."""

from __future__ import annotations

import math
from typing import Any

from gossamer.errors import CheckpointError, UnsupportedError
from gossamer.models.config import Config, Fields, Rope, rope_from, rope_to
from gossamer.models.family import Family, rope_gguf, sizes_gguf, sizes_hf

__all__ = ["GEMMA3"]

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def _kinds(f: Fields, layers: int) -> list[str]:
    kinds = f.get("layer_types", list, None)
    if kinds is None:
        every = f.integer("sliding_window_pattern", 6)
        if every < 1:
            raise CheckpointError(f"{f.where} has 'sliding_window_pattern' = {every}, which must be at least 1.")
        kinds = [_GLOBAL if (i + 1) % every == 0 else _LOCAL for i in range(layers)]
    if len(kinds) != layers or any(k not in (_LOCAL, _GLOBAL) for k in kinds):
        raise CheckpointError(f"{f.where} has 'layer_types' that do not name {layers} local and global layers.")
    return list(kinds)


def _ropes_hf(f: Fields, context: int) -> dict[str, Rope]:
    """A RoPE for each type of layer: nested ``rope_parameters`` (new), or two bases and the global scaling (old)."""
    nested = Fields(f.get("rope_parameters", dict, {}), f.where)
    if set(nested.data) - {_LOCAL, _GLOBAL}:
        raise CheckpointError(f"{f.where} has 'rope_parameters' that are not one entry for each type of layer.")
    everywhere = {**nested.get(_GLOBAL, dict, {}), **f.get("rope_scaling", dict, {})}
    return {
        _LOCAL: rope_from(nested.get(_LOCAL, dict, {}), f.number("rope_local_base_freq", 10000.0), context, f.where),
        _GLOBAL: rope_from(everywhere, f.number("rope_theta", 1e6), context, f.where),
    }


def _from_hf(f: Fields, name: str) -> Config:
    f.only("hidden_activation", "gelu_pytorch_tanh")
    f.only("use_bidirectional_attention", False)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if f.data.get(cap) is not None:
            raise UnsupportedError(f"{f.where} sets '{cap}', which Gemma 3 does not have.")
    sizes = sizes_hf(f, head_dim=256, kv_heads=4)
    kinds, ropes = _kinds(f, sizes["layers"]), _ropes_hf(f, sizes["context"])
    return Config(
        family=name,
        **sizes,
        ropes=tuple(ropes[k] for k in kinds),
        windows=tuple(f.count("sliding_window", 4096) if k == _LOCAL else 0 for k in kinds),
        activation="gelu_tanh",
        tied=f.flag("tie_word_embeddings", True),
        qk_norm=True,
        post_norms=True,
        norm_plus_one=True,
        embed_scale=math.sqrt(sizes["hidden"]),
        attn_scale=1 / math.sqrt(f.count("query_pre_attn_scalar", 256)),
        biased=frozenset("qkvo") if f.flag("attention_bias", False) else frozenset(),
    )


def _from_gguf(f: Fields, arch: str) -> Config:
    sizes = sizes_gguf(f, arch)
    kinds = [_GLOBAL if (i + 1) % 6 == 0 else _LOCAL for i in range(sizes["layers"])]
    ropes = {
        _LOCAL: Rope(f.positive(f"{arch}.rope.freq_base_swa", 10000.0)),
        _GLOBAL: rope_gguf(f, arch, 1e6),
    }
    # The 27B model alone scales its scores by hidden/heads instead of the head size; GGUF does not record it.
    scalar = sizes["hidden"] // sizes["heads"] if sizes["layers"] == 62 else sizes["head_dim"]
    return Config(
        family="gemma3",
        **sizes,
        ropes=tuple(ropes[k] for k in kinds),
        windows=tuple(f.count(f"{arch}.attention.sliding_window") if k == _LOCAL else 0 for k in kinds),
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        norm_plus_one=True,
        embed_scale=math.sqrt(sizes["hidden"]),
        attn_scale=1 / math.sqrt(scalar),
    )


def _extra(c: Config) -> dict[str, Any]:
    local = next((r for r, w in zip(c.ropes, c.windows) if w), Rope(10000.0))
    everywhere = next((r for r, w in zip(c.ropes, c.windows) if not w), Rope(1e6))
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(1 / c.scale**2),
        "sliding_window": max(c.windows) or 4096,
        "layer_types": [_LOCAL if w else _GLOBAL for w in c.windows],
        "rope_parameters": {_LOCAL: rope_to(local), _GLOBAL: rope_to(everywhere)},
        "attention_bias": "q" in c.biased,
    }


GEMMA3 = Family("gemma3", {"Gemma3ForCausalLM": "gemma3_text"}, ("gemma3",), _from_hf, _from_gguf, _extra)
