"""Llama (SmolLM2, Llama 2 and 3.x) and Mistral: RMSNorm, rotary positions, grouped queries, SwiGLU."""

from __future__ import annotations

from typing import Any

from gossamer.models.config import Config, Fields
from gossamer.models.family import Family, rope_gguf, rope_hf, sizes_gguf, sizes_hf

__all__ = ["LLAMA", "MISTRAL"]

_ATTENTION, _MLP = frozenset("qkvo"), frozenset({"gate", "up", "down"})


def _from_hf(f: Fields, name: str) -> Config:
    f.only("hidden_act", "silu")
    biased = (_ATTENTION if f.flag("attention_bias", False) else frozenset()) | (
        _MLP if f.flag("mlp_bias", False) else frozenset()
    )
    mistral = name == "mistral"
    sizes = sizes_hf(f, kv_heads=8 if mistral else None)
    layers = sizes["layers"]
    return Config(
        family=name,
        **sizes,
        ropes=(rope_hf(f),) * layers,
        windows=(_window(f) if mistral else 0,) * layers,
        tied=f.flag("tie_word_embeddings", False),
        biased=biased,
    )


def _window(f: Fields) -> int:
    """Mistral's window: 4096 when the file does not mention it, none when it says null."""
    absent = "sliding_window" not in f.data
    return f.count("sliding_window", 4096) if absent or f.data["sliding_window"] is not None else 0


def _from_gguf(f: Fields, arch: str) -> Config:
    sizes = sizes_gguf(f, arch)
    layers = sizes["layers"]
    f.only(f"{arch}.expert_count", 0)
    window = f.integer(f"{arch}.attention.sliding_window", 0)
    if window:
        window = f.count(f"{arch}.attention.sliding_window")
    # GGUF calls both families "llama"; only Mistral's config.json can state a window.
    return Config(
        family="mistral" if window else "llama",
        **sizes,
        ropes=(rope_gguf(f, arch),) * layers,
        windows=(window,) * layers,
    )


def _extra(c: Config) -> dict[str, Any]:
    data: dict[str, Any] = {"hidden_act": "silu"}
    if c.family == "mistral":
        data["sliding_window"] = c.windows[0] or None
    else:
        data["attention_bias"] = bool(c.biased & _ATTENTION)
        data["mlp_bias"] = bool(c.biased & _MLP)
    return data


LLAMA = Family("llama", {"LlamaForCausalLM": "llama"}, ("llama",), _from_hf, _from_gguf, _extra, interleaved_gguf=True)
MISTRAL = Family("mistral", {"MistralForCausalLM": "mistral"}, (), _from_hf, _from_gguf, _extra)
