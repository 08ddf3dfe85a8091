"""GGUF files of a known shape with random Q4_0 weights, so that llama.cpp runs what ``shape_model`` runs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import ResourceError, UsageError
from gossamer.models.config import Config
from gossamer.models.topology import describe

__all__ = ["random_gguf", "write_random_gguf"]

U8 = npt.NDArray[np.uint8]

# Bytes and elements of a block, and the offset of its float16 scale; all other bytes may be anything.
_BLOCKS = {"Q4_0": (18, 32, 0), "Q6_K": (210, 256, 208), "Q8_0": (34, 32, 0)}
_SCALE = np.frombuffer(np.float16(0.004).tobytes(), np.uint8)
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@contextmanager
def random_gguf(config: Config, name: str) -> Iterator[Path]:
    """The path of such a file in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
        path = Path(folder) / f"{name}-random-Q4_0.gguf"
        write_random_gguf(config, path)
        yield path


def write_random_gguf(config: Config, path: Path, vocabulary: Callable[[Any], None] | None = None) -> None:
    """Writes a model of this shape as llama.cpp's own Q4_0: every matrix Q4_0, the head Q6_K, norms float32.

    A head whose rows are no whole blocks of Q6_K is Q8_0, as llama.cpp makes it. ``vocabulary`` is given the
    GGUFWriter to describe a tokenizer; without it the file has none, only its size. RoPE is plain, which costs the
    same. Raises UsageError for a family other than llama and mistral or for widths that the blocks do not divide, and
    ResourceError when the disk is full.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    if config.family not in ("llama", "mistral"):
        raise UsageError(
            f"no GGUF file of random weights can be made for the family '{config.family}', only for llama and "
            "mistral; give one with --peer-model."
        )
    topology = describe(config)
    head = "model.embed_tokens" if config.tied else "lm_head"
    best = "Q8_0" if config.hidden % _BLOCKS["Q6_K"][1] else "Q6_K"
    matrices = [(_gguf_name(s.name), best if s.name == head else "Q4_0", s.rows, s.cols) for s in topology.sites]
    for _, kind, _, cols in matrices:
        if cols % _BLOCKS[kind][1]:
            raise UsageError(
                f"rows of {cols} weights are not whole blocks of {kind}; give a GGUF file with --peer-model."
            )
    need = sum(rows * _row_bytes(kind, cols) for _, kind, rows, cols in matrices) + topology.vector_bytes + (1 << 20)
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise ResourceError(
            f"a file of {need / 1e9:.1f} GB is needed in {path.parent} and {free / 1e9:.1f} GB are free; "
            "set TMPDIR to a place with more."
        )
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.ropes[0].theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        vocabulary(writer)
    for name, kind, rows, cols in matrices:
        shape = (rows, _row_bytes(kind, cols))
        writer.add_tensor_info(
            name, shape, np.dtype(np.uint8), rows * shape[1], raw_dtype=getattr(GGMLQuantizationType, kind)
        )
    vectors = [(_gguf_name(v.name), np.ones(v.size, np.float32)) for v in topology.vectors]
    for name, values in vectors:
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    blocks = {kind: _random_blocks(random, kind) for kind in _BLOCKS}
    for _, kind, rows, cols in matrices:
        writer.write_tensor_data(np.resize(blocks[kind], rows * _row_bytes(kind, cols)))
    for _, values in vectors:
        writer.write_tensor_data(values)
    writer.close()


def _gguf_name(name: str) -> str:
    known = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    if name in known:
        return known[name] + ".weight"
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[rest]}.weight"


def _row_bytes(kind: str, cols: int) -> int:
    nbytes, elements, _ = _BLOCKS[kind]
    return cols // elements * nbytes


def _random_blocks(random: np.random.Generator, kind: str) -> U8:
    """A megabyte or so of whole blocks with small scales; a matrix repeats them."""
    nbytes, _, at = _BLOCKS[kind]
    blocks = random.integers(0, 256, ((1 << 20) // nbytes, nbytes), np.uint8)
    blocks[:, at : at + 2] = _SCALE
    return blocks.reshape(-1)
