"""What a model family tells: how its two kinds of configuration read, and its tensor names.

A family is one short file: a ``Family`` value. Everything else about the model follows from its ``Config``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gossamer.errors import UnsupportedError
from gossamer.models.config import Config, Fields, Rope, check_sizes, rope_from, rope_to, shown

__all__ = ["Family", "by_gguf", "by_hf", "gguf_name"]


@dataclass(frozen=True)
class Family:
    """``hf`` maps architecture class names to ``model_type``; ``gguf`` lists ``general.architecture`` values."""

    name: str
    hf: Mapping[str, str]
    gguf: tuple[str, ...]
    from_hf: Callable[[Fields, str], Config]
    from_gguf: Callable[[Fields, str], Config]
    extra_hf: Callable[[Config], dict[str, Any]]  # what the family adds to a written config.json
    interleaved_gguf: bool = False  # GGUF stores q and k rows with rotary pairs side by side


_GGUF_ROLES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, config: Config) -> str:
    """The GGUF name (without .weight) of a Hugging Face one."""
    if name in _GGUF_ROLES:
        return _GGUF_ROLES[name]
    _, _, layer, rest = name.split(".", 3)
    if rest == "post_attention_layernorm":  # after attention, or before the MLP when there is nothing after
        role = "post_attention_norm" if config.post_norms else "ffn_norm"
    else:
        role = _GGUF_ROLES[rest]
    return f"blk.{layer}.{role}"


def sizes_hf(f: Fields, *, head_dim: int | None = None, kv_heads: int | None = None) -> dict[str, Any]:
    """The entries that every Hugging Face decoder configuration has, checked.

    ``head_dim`` and ``kv_heads`` are what the family means when the file does not mention them; None stands for
    hidden / heads and for as many as there are heads.
    """
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if kv_heads is None or "num_key_value_heads" in f.data:  # a null there means as many as there are heads
        kv_heads = heads
    sizes = {
        "vocab": f.integer("vocab_size"),
        "hidden": hidden,
        "layers": f.integer("num_hidden_layers"),
        "heads": heads,
        "kv_heads": f.integer("num_key_value_heads", kv_heads),
        "head_dim": f.integer("head_dim", head_dim or hidden // max(1, heads)),
        "ffn": f.integer("intermediate_size"),
        "context": f.integer("max_position_embeddings"),
        "norm_eps": f.number("rms_norm_eps", 1e-6),
    }
    check_sizes(sizes, f.where)
    return sizes


def sizes_gguf(f: Fields, arch: str) -> dict[str, Any]:
    """The entries that every GGUF decoder has, checked; the vocabulary's size is that of its token list."""
    hidden, heads = f.integer(f"{arch}.embedding_length"), f.integer(f"{arch}.attention.head_count")
    tokens = f.get("tokenizer.ggml.tokens", list, None)
    head_dim = f.integer(f"{arch}.attention.key_length", hidden // max(1, heads))
    if f.integer(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{f.where} has value heads of another size than its key heads.")
    if f.integer(f"{arch}.rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedError(f"{f.where} rotates only a part of each head, which is not supported.")
    sizes = {
        "vocab": len(tokens) if tokens is not None else f.integer(f"{arch}.vocab_size"),
        "hidden": hidden,
        "layers": f.integer(f"{arch}.block_count"),
        "heads": heads,
        "kv_heads": f.integer(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "ffn": f.integer(f"{arch}.feed_forward_length"),
        "context": f.integer(f"{arch}.context_length"),
        "norm_eps": f.number(f"{arch}.attention.layer_norm_rms_epsilon"),
    }
    check_sizes(sizes, f.where)
    return sizes


def rope_hf(f: Fields, default_theta: float = 10000.0) -> Rope:
    """One RoPE for all layers: ``rope_parameters`` (new) or ``rope_theta`` with ``rope_scaling`` (old)."""
    context = f.integer("max_position_embeddings")
    theta = f.number("rope_theta", default_theta)
    f.only("partial_rotary_factor", 1.0)
    entry = f.get("rope_scaling", dict, None) or f.get("rope_parameters", dict, None) or {}
    if any(isinstance(value, dict) for value in entry.values()):
        raise UnsupportedError(f"{f.where} gives a RoPE to each type of layer, which this family does not have.")
    return rope_from(entry, theta, context, f.where)


def rope_gguf(f: Fields, arch: str, default_theta: float = 10000.0) -> Rope:
    """The RoPE of a GGUF file. A factor without a type is linear scaling, and a factor of 0 is none."""
    theta = f.positive(f"{arch}.rope.freq_base", default_theta)
    f.only(f"{arch}.rope.scale_linear", 1.0)  # the name of the factor in the first files
    factor = f.number(f"{arch}.rope.scaling.factor", 0.0)
    kind = f.get(f"{arch}.rope.scaling.type", str, "linear")
    if kind not in ("none", "linear"):
        raise UnsupportedError(f"{f.where} asks for RoPE scaling '{kind}'; none and linear are supported.")
    if kind == "none" or factor in (0.0, 1.0):
        return Rope(theta)
    return Rope(theta, "linear", f.positive(f"{arch}.rope.scaling.factor"))


def to_hf(config: Config) -> dict[str, Any]:
    """A config.json that ``from_hf`` of the same family reads back to an equal value.

    Raises UnsupportedError for a value that the family's config.json has no words for.
    """
    family = BY_NAME()[config.family]
    architecture, model_type = next(iter(family.hf.items()))
    data: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_parameters": rope_to(config.ropes[0]),
    }
    data.update(family.extra_hf(config))
    if family.from_hf(Fields(data, "config.json"), family.name) != config:
        raise UnsupportedError(
            f"this model cannot be written as a folder: a config.json of the family '{family.name}' has no words "
            "for its windows, biases or positions."
        )
    return data


def BY_NAME() -> dict[str, Family]:  # noqa: N802
    from gossamer.models import gemma, llama, qwen

    return {f.name: f for f in (llama.LLAMA, llama.MISTRAL, qwen.QWEN2, qwen.QWEN3, gemma.GEMMA3)}


def by_hf(data: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json: by its architecture's class, or by its model type when it names no class."""
    known = {a: f for f in BY_NAME().values() for a in f.hf}
    types = {t: f for f in BY_NAME().values() for t in f.hf.values()}
    named = data.get("architectures") or []
    names = named if isinstance(named, list) else [named]
    for name in names:
        if isinstance(name, str) and name in known:
            return known[name]
    kind = data.get("model_type")
    if not names and isinstance(kind, str) and kind in types:
        return types[kind]
    raise UnsupportedError(
        f"{where} is a {shown(names[0] if names else kind)}, which is not supported; "
        f"supported are {', '.join(sorted(known))}."
    )


def by_gguf(architecture: Any, where: str) -> Family:
    """The family of a GGUF ``general.architecture``."""
    known = {a: f for f in BY_NAME().values() for a in f.gguf}
    if isinstance(architecture, str) and architecture in known:
        return known[architecture]
    raise UnsupportedError(
        f"{where} has the architecture {shown(architecture)}, which is not supported; "
        f"supported are {', '.join(sorted(known))}."
    )
