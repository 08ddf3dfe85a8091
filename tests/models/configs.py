"""Small configurations of every family, in both kinds of file, to change one entry of."""

from __future__ import annotations

from typing import Any

import pytest

from gossamer.errors import GossamerError
from gossamer.models.config import Config, Fields
from gossamer.models.family import by_gguf, by_hf

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
HF = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
FAMILIES = sorted(HF)


def read(family: str, **changes: Any) -> Config:
    """The configuration of a config.json; a change to ``...`` leaves the entry out."""
    data = {k: v for k, v in {**HF[family], **SIZES, **changes}.items() if v is not ...}
    found = by_hf(data, "config.json")
    return found.from_hf(Fields(data, "config.json"), found.name)


def gguf(arch: str, **changes: Any) -> Config:
    """The configuration of GGUF metadata; keys lack the architecture, with "__" for a dot."""
    data = {
        "context_length": 4096,
        "embedding_length": 64,
        "block_count": 4,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": 100,
    }
    if arch == "gemma3":
        data["attention.sliding_window"] = 512
    data |= {k.replace("__", "."): v for k, v in changes.items()}
    keys = {f"{arch}.{k}": v for k, v in data.items() if v is not ...}
    return by_gguf(arch, "m.gguf").from_gguf(Fields(keys, "m.gguf"), arch)


def refused(error: type[GossamerError], read: Any, *args: Any, **changes: Any) -> str:
    with pytest.raises(error) as caught:
        read(*args, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert message.endswith(".")
    return message
