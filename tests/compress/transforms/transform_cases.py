"""What the tests of edits and transforms share: logits, statistics, and the models they run on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from gossamer import LLM
from gossamer.checkpoints.hf_writer import PlainTensor, write_plain
from gossamer.compress.statistics import Statistics
from gossamer.formats import RowSource, SiteFormat
from gossamer.models.checkpoint import Checkpoint, StoredTensor
from gossamer.models.config import Fields
from gossamer.models.family import by_hf
from gossamer.models.topology import Site, Topology, Vector, describe

_SIZES: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", **_SIZES}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama, biases": {**_LLAMA, "attention_bias": True, "mlp_bias": True},
    "Llama, tied table": {**_LLAMA, "tie_word_embeddings": True},
    "Llama 3.1, one head for all queries": {
        **_LLAMA,
        "rope_scaling": _LLAMA3,
        "num_key_value_heads": 1,
        "head_dim": 32,
    },
    "Mistral, window of 31": {**_LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 31},
    "Qwen2": {**_LLAMA, "architectures": ["Qwen2ForCausalLM"]},
    "Qwen3, as many heads": {
        **_LLAMA,
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 28,
        "num_key_value_heads": 6,
    },
    "Gemma 3, window of 24": {
        **_SIZES,
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 20,
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 20,
        "sliding_window": 24,
        "tie_word_embeddings": True,
    },
}
TOKENS = [(7 * i * i + 3 * i) % 331 for i in range(60)]
TOLERANCE = 1e-3  # of two logits, in float32


def write_tiny(out: Path, data: dict[str, Any]) -> Path:
    """A Hugging Face folder with random weights: queries and keys large enough that attention is sharp."""
    family = by_hf(data, "config.json")
    config = family.from_hf(Fields(data, "config.json"), family.name)
    topology, random = describe(config), np.random.default_rng(len(data))
    tensors = []

    def add(name: str, values: np.ndarray) -> None:
        values = values.astype(np.float32)
        tensors.append(PlainTensor(name, "F32", values.shape, lambda r0, r1: values[r0:r1]))

    for site in topology.sites:
        gain = 2.0 if site.role in ("q", "k", "head") or (site.role == "embed" and config.tied) else 1.0
        add(f"{site.name}.weight", gain * random.standard_normal((site.rows, site.cols)) / np.sqrt(site.cols))
        if site.bias:
            add(f"{site.name}.bias", 0.3 * random.standard_normal(site.rows))
    for vector in topology.vectors:
        add(f"{vector.name}.weight", 0.3 * random.standard_normal(vector.size) + (not config.norm_plus_one))
    pieces = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=pieces, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    write_plain(out, {"config.json": json.dumps(data), "tokenizer.json": tokenizer.to_str()}, tensors)
    return out


class Short(Checkpoint):
    """The first layers of a real model with the first rows of its table: real weights, small enough for many tests."""

    def __init__(self, base: Checkpoint, layers: int = 2, vocab: int = 512) -> None:
        self.base, c = base, base.config
        self.kind, self.path, self.family = base.kind, base.path, base.family
        self.data_bytes, self.total_bytes = base.data_bytes, base.total_bytes
        self.config = replace(c, layers=layers, vocab=vocab, ropes=c.ropes[:layers], windows=c.windows[:layers])

    def native(self, site: Site) -> SiteFormat:
        return self.base.native(self.base.topology.site(site.name))

    def source(self, site: Site) -> RowSource:
        return _Rows(self.base.source(self.base.topology.site(site.name)), (site.rows, site.cols))

    def vector(self, vector: Vector) -> np.ndarray:
        return self.base.vector(vector)

    def bias(self, site: Site) -> np.ndarray | None:
        return self.base.bias(site)

    def _read_tokenizer(self) -> Any:
        return self.base.tokenizer()

    def tensors(self) -> Iterator[StoredTensor]:
        return self.base.tensors()


@dataclass(frozen=True)
class _Rows:
    below: RowSource
    shape: tuple[int, int]

    def read(self, r0: int, r1: int) -> np.ndarray:
        return self.below.read(r0, r1)


def logits(checkpoint: Checkpoint, tokens: list[int] = TOKENS) -> np.ndarray:
    return LLM(checkpoint, format="f32 @ f32", context=128, kv="f32").logits(tokens).copy()


@lru_cache(maxsize=16)
def original(checkpoint: Checkpoint) -> np.ndarray:
    return logits(checkpoint)


def distance(checkpoint: Checkpoint, edited: Checkpoint) -> float:
    """The largest difference of two logits."""
    return float(np.abs(logits(edited) - original(checkpoint)).max())


def statistics_of(x: np.ndarray) -> Statistics:
    h = (x.T @ x / len(x)).astype(np.float32)
    size = np.abs(x)
    return Statistics(len(x), h, size.max(0), size.mean(0), x.mean(0), np.diag(h).copy(), x[:512])


def inputs(cols: int, seed: int, tokens: int = 256) -> np.ndarray:
    """Inputs as trained models have them: correlated, off centre, a few channels much larger than the others."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, cols)) + 0.5 * random.standard_normal((tokens, 1))
    size = np.exp(random.standard_normal(cols))
    size[random.choice(cols, 3, replace=False)] *= 20
    return (x * size + 0.1 * random.standard_normal(cols)).astype(np.float32)


def made_up(topology: Topology) -> dict[str, Statistics]:
    """Statistics for every input of the blocks."""
    shares = {s.shares: s.cols for s in topology.sites if s.layer is not None}
    return {name: statistics_of(inputs(cols, i)) for i, (name, cols) in enumerate(shares.items())}
