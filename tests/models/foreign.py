"""Small folders in the layouts of other programs, packed here bit by bit and from known codes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import byte_tokenizer

HIDDEN, FFN, VOCAB, HEADS, KV_HEADS = 64, 96, 48, 4, 2
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}
LINEAR = {f"model.layers.0.{name}": shape for name, shape in SHAPES.items()}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None,
    "eos_token_id": None,
}
NAMES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "I8": "i1", "F8_E4M3": "u1"}


def plain(seed: int = 0) -> dict[str, tuple[str, np.ndarray]]:
    """What is not quantized: tables and norms."""
    rng = np.random.default_rng(seed)
    found = {
        "model.embed_tokens.weight": ("F32", rng.standard_normal((VOCAB, HIDDEN))),
        "lm_head.weight": ("F32", rng.standard_normal((VOCAB, HIDDEN)) / 8),
    }
    for name in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        found[f"{name}.weight"] = ("F32", 1 + 0.1 * rng.standard_normal(HIDDEN))
    return found


def write(folder: Path, tensors: dict[str, tuple[str, np.ndarray]], quantization: Any, **changes: Any) -> Path:
    """A folder with these tensors: (type, array), BF16 and float8 as their bits."""
    folder.mkdir(exist_ok=True)
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).astype(NAMES[dtype], copy=False).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(np.shape(array)),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    config = {**CONFIG, **changes, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def line(values: list[int], bits: int) -> list[int]:
    """Numbers one after the other in a long binary number, cut into signed words of 32 bits."""
    digits = "".join(f"{int(v):0{bits}b}" for v in reversed(values))
    count = -(-len(values) * bits // 32)
    long = int(digits, 2).to_bytes(4 * count, "little")
    return list(struct.unpack(f"<{count}i", long))


def lines(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each row of codes as words, int32 [rows, words]."""
    return np.array([line(row.tolist(), bits) for row in codes], np.int32)


def gptq(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, *, offset: int, g_idx: np.ndarray | None = None
) -> dict[str, tuple[str, np.ndarray]]:
    """The tensors of a GPTQ layer. codes [out, in]; zeros, scales [out, groups]; g_idx [in]."""
    found = {
        "qweight": ("I32", lines(codes, bits).T),
        "qzeros": ("I32", lines(zeros.T - offset, bits)),
        "scales": ("F16", scales.T),
    }
    if g_idx is not None:
        found["g_idx"] = ("I32", g_idx)
    return found


def awq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
    """The tensors of an AWQ layer, as above."""

    def interleaved(rows: np.ndarray) -> np.ndarray:
        words = []
        for row in rows:
            eights = [row[i : i + 8] for i in range(0, len(row), 8)]
            words.append([line([e[j] for j in (0, 2, 4, 6, 1, 3, 5, 7)], 4)[0] for e in eights])
        return np.array(words, np.int32)

    return {
        "qweight": ("I32", interleaved(codes.T)),
        "qzeros": ("I32", interleaved(zeros.T)),
        "scales": ("F16", scales.T),
    }


def model(layer: Any, seed: int = 0) -> dict[str, tuple[str, np.ndarray]]:
    """All tensors, those of each linear site being layer(rows, cols, rng)."""
    rng = np.random.default_rng(seed)
    tensors = plain(seed)
    for name, (rows, cols) in LINEAR.items():
        tensors |= {f"{name}.{part}": value for part, value in layer(rows, cols, rng).items()}
    return tensors
