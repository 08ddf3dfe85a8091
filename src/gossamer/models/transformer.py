"""The decoder, written once over ``ops``: every family is this code with another ``Config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.formats.dispatch import Runner, linear
from gossamer.models.config import Config, Rope

__all__ = ["MAX_TOKENS", "KVLayer", "KVView", "Transformer"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

MAX_TOKENS = 512  # tokens of one call; a longer prompt runs in chunks, with bitwise the same result


@dataclass(frozen=True)
class KVLayer:
    """One layer's pool, in the layout of kernels/attention.h: keys, values, and the scales of pools of codes."""

    k: npt.NDArray[Any]
    v: npt.NDArray[Any]
    k_scale: npt.NDArray[Any] | None
    v_scale: npt.NDArray[Any] | None


class KVView(Protocol):
    """Where a sequence's keys and values lie: the pool of each layer and the sequence's block list."""

    def layer(self, index: int) -> KVLayer: ...

    @property
    def block_table(self) -> I32: ...


class _Buffers:
    """Activations of a call, allocated once for the largest call seen."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        self.widths, self.rows = widths, 0
        self.arrays: dict[str, F32] = {}

    def take(self, tokens: int) -> dict[str, F32]:
        if tokens > self.rows:
            self.arrays = {name: np.empty((tokens, width), np.float32) for name, width in self.widths.items()}
            self.rows = tokens
        return {name: array[:tokens] for name, array in self.arrays.items()}


class Transformer:
    """A loaded model. ``runners`` maps site names to linear sites, ``vectors`` norm names to their gains."""

    def __init__(self, config: Config, runners: Mapping[str, Runner], vectors: Mapping[str, F32]) -> None:
        self.config, self.runners, self.vectors = config, runners, vectors
        c = config
        self.embedding = runners["model.embed_tokens"]
        self.head = self.embedding if c.tied else runners["lm_head"]
        self._frequencies: dict[Rope, F32] = {r: r.inverse_frequencies(c.head_dim) for r in set(c.ropes)}
        self._buffers = _Buffers(
            {
                "x": c.hidden,
                "r": c.hidden,
                "q": c.heads * c.head_dim,
                "k": c.kv_heads * c.head_dim,
                "v": c.kv_heads * c.head_dim,
                "a": c.heads * c.head_dim,
                "gate": c.ffn,
                "up": c.ffn,
            }
        )
        self._layers = [self._layer(i) for i in range(c.layers)]

    def _layer(self, i: int) -> dict[str, Any]:
        base = f"model.layers.{i}"
        attention, mlp = f"{base}.self_attn", f"{base}.mlp"
        c, r, v = self.config, self.runners, self.vectors
        after, before = f"{base}.post_attention_layernorm", f"{base}.pre_feedforward_layernorm"
        return {
            "qkv": [r[f"{attention}.{p}_proj"] for p in "qkv"],
            "o": [r[f"{attention}.o_proj"]],
            "gate_up": [r[f"{mlp}.gate_proj"], r[f"{mlp}.up_proj"]],
            "down": [r[f"{mlp}.down_proj"]],
            "attn_norm": v[f"{base}.input_layernorm"],
            "mlp_norm": v[before if c.post_norms else after],
            "attn_post": v[after] if c.post_norms else None,
            "mlp_post": v[f"{base}.post_feedforward_layernorm"] if c.post_norms else None,
            "q_norm": v[f"{attention}.q_norm"] if c.qk_norm else None,
            "k_norm": v[f"{attention}.k_norm"] if c.qk_norm else None,
        }

    def hidden(self, tokens: I32, positions: I32, kv: KVView) -> F32:
        """The normalised hidden states of 1 to 512 tokens: float32 [tokens, hidden].

        ``tokens`` and ``positions`` are int32 [n]; keys and values are written to ``kv`` at those positions, and
        each token attends to all positions up to its own that ``kv`` holds.
        """
        c, n = self.config, len(tokens)
        b = self._buffers.take(n)
        h = self.embedding.look_up(tokens.astype(np.int64))
        if c.embed_scale != 1.0:
            ops.scale(h, c.embed_scale)
        angles = {rope: _rotations(positions, f) for rope, f in self._frequencies.items()}
        q = b["q"].reshape(n, c.heads, c.head_dim)
        k = b["k"].reshape(n, c.kv_heads, c.head_dim)
        v = b["v"].reshape(n, c.kv_heads, c.head_dim)
        tables, sequence = kv.block_table[None], np.zeros(n, np.int32)
        for i, layer in enumerate(self._layers):
            ops.rmsnorm(h, layer["attn_norm"], c.norm_eps, b["x"])
            linear(layer["qkv"], b["x"], [b["q"], b["k"], b["v"]])
            if layer["q_norm"] is not None:
                _norm_heads(b["q"], layer["q_norm"], c.norm_eps)
                _norm_heads(b["k"], layer["k_norm"], c.norm_eps)
            cos, sin = angles[c.ropes[i]]
            ops.rope(q, cos, sin)
            ops.rope(k, cos, sin)
            pool = kv.layer(i)
            ops.kv_write(k, v, positions, sequence, tables, pool.k, pool.v, pool.k_scale, pool.v_scale)
            ops.attention(
                q,
                positions,
                sequence,
                tables,
                pool.k,
                pool.v,
                pool.k_scale,
                pool.v_scale,
                b["a"].reshape(q.shape),
                None,
                c.scale,
                c.windows[i],
                0.0,
            )
            linear(layer["o"], b["a"], [b["r"]])
            if layer["attn_post"] is not None:
                ops.rmsnorm(b["r"], layer["attn_post"], c.norm_eps, b["r"])
            ops.add(h, b["r"])
            ops.rmsnorm(h, layer["mlp_norm"], c.norm_eps, b["x"])
            linear(layer["gate_up"], b["x"], [b["gate"], b["up"]])
            ops.gated(c.activation, b["gate"], b["up"], b["gate"])
            linear(layer["down"], b["gate"], [b["r"]])
            if layer["mlp_post"] is not None:
                ops.rmsnorm(b["r"], layer["mlp_post"], c.norm_eps, b["r"])
            ops.add(h, b["r"])
        ops.rmsnorm(h, self.vectors["model.norm"], c.norm_eps, h)
        return h

    def logits(self, hidden: F32) -> F32:
        """float32 [n, vocab] of hidden states [n, hidden]."""
        out = np.empty((len(hidden), self.config.vocab), np.float32)
        linear([self.head], hidden, [out])
        return out


def _norm_heads(x: F32, gain: F32, eps: float) -> None:
    heads = x.reshape(-1, len(gain))
    ops.rmsnorm(heads, gain, eps, heads)


def _rotations(positions: I32, frequencies: F32) -> tuple[F32, F32]:
    """cos and sin, float32 [n, head_dim / 2]; the angle is a float32 product, as in the reference models."""
    angles = positions.astype(np.float32)[:, None] * frequencies[None, :]
    return np.cos(angles), np.sin(angles)
