"""A small sound GGUF file, and ways to damage it: the real model is too large to copy for every test.

About 130 kB: a llama of two layers with random weights on the grids of Q8_0 and Q4_1, a byte-level vocabulary
with a few merges, and a chat template in the manner of ChatML.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, CONTEXT = 96, 2, 6, 2, 160, 1024
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = ("t h", "th e", "Ġ the", "i n", "e r")
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write(
    path: Path,
    *,
    arch: str = "llama",
    template: str | None = TEMPLATE,
    seed: int = 0,
    q_bias: bool = False,
    merges: Sequence[str] = MERGES,
    heap: bool = False,
) -> Path:
    """Writes the file.

    ``arch`` is its general.architecture and ``seed`` that of the weights; ``q_bias`` gives queries alone a bias, which
    no config.json of a llama can say; other ``merges`` make another tokenizer; ``heap`` makes every 16th row large.
    """
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    vocabulary = _add_vocabulary(writer, merges)
    if template is not None:
        writer.add_chat_template(template)

    def matrix(name: str, rows: int, cols: int, kind: Any = gguf.GGMLQuantizationType.Q4_1) -> None:
        values = (random.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
        if heap:
            values[::16] *= 8
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def gain(name: str) -> None:
        writer.add_tensor(f"{name}.weight", (1 + 0.1 * random.standard_normal(HIDDEN)).astype(np.float32))

    kv = HIDDEN // HEADS * KV_HEADS
    matrix("token_embd", vocabulary, HIDDEN, gguf.GGMLQuantizationType.Q8_0)
    gain("output_norm")
    for layer in range(LAYERS):
        gain(f"blk.{layer}.attn_norm")
        matrix(f"blk.{layer}.attn_q", HIDDEN, HIDDEN)
        if q_bias:
            writer.add_tensor(f"blk.{layer}.attn_q.bias", np.ones(HIDDEN, np.float32))
        matrix(f"blk.{layer}.attn_k", kv, HIDDEN)
        matrix(f"blk.{layer}.attn_v", kv, HIDDEN)
        matrix(f"blk.{layer}.attn_output", HIDDEN, HIDDEN)
        gain(f"blk.{layer}.ffn_norm")
        matrix(f"blk.{layer}.ffn_gate", FFN, HIDDEN)
        matrix(f"blk.{layer}.ffn_up", FFN, HIDDEN)
        matrix(f"blk.{layer}.ffn_down", HIDDEN, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: Any, merges: Sequence[str]) -> int:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges), *_SPECIAL]
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([control if piece in _SPECIAL else normal for piece in pieces])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(pieces.index("<|im_start|>"))
    writer.add_eos_token_id(pieces.index("<|im_end|>"))
    return len(pieces)


class Entry:
    """Where a tensor's fields lie in the bytes of a GGUF file."""

    def __init__(self, data: bytes, name: str) -> None:
        key = struct.pack("<Q", len(name)) + name.encode()
        start = data.index(key)
        assert data.count(key) == 1
        after = start + len(key)
        (count,) = struct.unpack_from("<I", data, after)
        self.name, self.dims = start + 8, after + 4
        self.type = self.dims + 8 * count
        self.offset = self.type + 4


def patch(data: bytes, at: int, form: str, value: int) -> bytes:
    """The bytes with one field replaced; ``form`` is that of struct."""
    field = struct.pack(f"<{form}", value)
    return data[:at] + field + data[at + len(field) :]
