"""Small random checkpoints of every family, written by other people's code: transformers folders and gguf files.

Every parameter is random, biases and gains included. Queries and keys are large enough that attention is sharp:
a window that is off by one or a wrong rotation moves the logits far beyond the tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from ggml_rows import sound_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 331  # not a multiple of 16
_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@dataclass(frozen=True)
class Tiny:
    """A random model: the transformers classes' prefix, what differs from the shared sizes, its GGUF name if any."""

    name: str
    cls: str
    changes: dict[str, Any] = field(default_factory=dict)
    gguf: str | None = None

    def config(self) -> Any:
        config_class = "Gemma3TextConfig" if self.cls == "Gemma3" else f"{self.cls}Config"
        return getattr(transformers, config_class)(**{**_SHARED, **self.changes})

    def model(self) -> Any:
        """The oracle: float32 on the CPU, eager attention, every parameter random."""
        config = self.config()
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{self.cls}ForCausalLM")(config).eval()
        randomise(model, seed=len(self.name))
        return model


TINY = (
    Tiny("Llama, biases", "Llama", {"attention_bias": True, "mlp_bias": True}),
    Tiny("Llama, tied table", "Llama", {"tie_word_embeddings": True}, "llama"),
    Tiny("Llama 3.1 RoPE scaling", "Llama", {"rope_parameters": _LLAMA3, "head_dim": 32}, "llama"),
    Tiny("Llama, linear RoPE scaling", "Llama", {"rope_parameters": _LINEAR, "head_dim": 20}, "llama"),
    Tiny("Mistral, window of 31", "Mistral", {"sliding_window": 31}),
    Tiny("Qwen2", "Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "qwen2"),
    Tiny(
        "Qwen2, window of 40 from layer 2 on",
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    Tiny("Qwen3", "Qwen3", {"head_dim": 28, "rms_norm_eps": 1e-6}, "qwen3"),
    Tiny("Qwen3, biases", "Qwen3", {"head_dim": 16, "attention_bias": True}),
    Tiny(
        "Gemma 3, window of 24, linear RoPE scaling",
        "Gemma3",
        {
            "num_hidden_layers": 7,
            "head_dim": 20,
            "query_pre_attn_scalar": 33,
            "sliding_window": 24,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
    Tiny(
        "Gemma 3, window of 24",
        "Gemma3",
        {
            "num_hidden_layers": 7,
            "head_dim": 20,
            "query_pre_attn_scalar": 20,
            "sliding_window": 24,
            "tie_word_embeddings": True,
        },
        "gemma3",
    ),
)


def randomise(model: Any, seed: int) -> None:
    """Random values for every parameter, scaled so that activations and logits have a size of about one to two."""
    generator = torch.Generator().manual_seed(seed)
    gemma = "gemma" in model.config.model_type
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("norm.weight"):
                p.copy_(0.3 * noise + (0.0 if gemma else 1.0))
            elif name.endswith(".bias"):
                p.copy_(0.3 * noise)
            else:
                gain = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight", "lm_head.weight")) else 1.0
                if name.endswith("embed_tokens.weight") and model.config.tie_word_embeddings:
                    gain = 2.0
                p.copy_(noise * gain / math.sqrt(p.shape[1]))


def write_folder(model: Any, folder: Path, **options: Any) -> Path:
    """The model as transformers saves it, with a tokenizer of single bytes."""
    model.save_pretrained(folder, **options)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def byte_tokenizer() -> Tokenizer:
    vocabulary = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_gguf(model: Any, arch: str, path: Path, kind: str = "F32") -> Path:
    """The model as a GGUF file with matrices of type ``kind``; keys, names and blocks are the ``gguf`` package's.

    What that package cannot quantize to becomes random blocks.
    """
    c = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if arch == "gemma3":
        writer.add_sliding_window(c.sliding_window)
        writer.add_rope_freq_base(c.rope_parameters["full_attention"]["rope_theta"])
    else:
        _add_rope(writer, c.rope_parameters, head_dim)
    _add_vocabulary(writer)
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(architecture, c.num_hidden_layers)
    for name, p in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array = p.detach().numpy()
        if arch == "gemma3" and name.endswith("norm.weight"):
            array = array + 1  # the converter stores what is multiplied with
        if arch == "llama" and ".q_proj." in name:
            array = _side_by_side(array, c.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            array = _side_by_side(array, c.num_key_value_heads)
        array = np.ascontiguousarray(array)
        stored = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        try:
            data = gguf.quants.quantize(array, stored)
        except NotImplementedError:
            data = sound_rows(kind, *array.shape, size=3e-4)
        # The writer takes the shape from the stored bytes.
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _side_by_side(w: np.ndarray, heads: int) -> np.ndarray:
    """Row j and row j + d/2 of each head become neighbours, as llama.cpp rotates them."""
    return np.concatenate([np.stack(np.split(head, 2), axis=1).reshape(head.shape) for head in np.split(w, heads)])


def _add_rope(writer: Any, rope: dict[str, Any], head_dim: int) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":  # one divisor for each frequency
        divisors = []
        for j in range(0, head_dim, 2):
            turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (j / head_dim))
            kept = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            kept = min(1.0, max(0.0, kept))
            divisors.append(1 / ((1 - kept) / rope["factor"] + kept))
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))


def _add_vocabulary(writer: Any) -> None:
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += ["ab", *(f"<extra{i}>" for i in range(VOCAB - len(pieces) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * VOCAB)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(VOCAB - 1)
