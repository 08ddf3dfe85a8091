"""One decoder layer, written once over ``ops``: attention and a gated MLP, and the memory they work in.

A step of the whole model, a layer run alone while a model is compressed, and a family of any kind are this code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.formats.dispatch import Norm, Runner, linear
from gossamer.models.config import Config, Rope

__all__ = ["Buffers", "KVLayer", "KVStore", "KVView", "Layer", "Tap"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

# Told the input of a group of sites: its name (Site.shares), float32 [tokens, cols]. True: nothing after it is wanted.
Tap = Callable[[str, F32], bool | None]


@dataclass(frozen=True)
class KVLayer:
    """One layer's pool, in the layout of kernels/attention.h: keys, values, and the scales of pools of codes."""

    k: npt.NDArray[Any]
    v: npt.NDArray[Any]
    k_scale: npt.NDArray[Any] | None
    v_scale: npt.NDArray[Any] | None


class KVStore(Protocol):
    """Keys and values of several sequences, in arrays that stay where they are.

    ``tables`` is int32 [sequences, most blocks]: row i lists the blocks of sequence i.
    """

    @property
    def tables(self) -> I32: ...

    def layer(self, index: int) -> KVLayer: ...


class KVView(Protocol):
    """Where one sequence's keys and values lie: the store, and the sequence's row of its tables."""

    @property
    def pool(self) -> KVStore: ...

    @property
    def row(self) -> int: ...


class Buffers:
    """The inputs of a step of ``rows`` tokens, int32 [rows], and its activations, float32 [rows, width].

    The system gives memory to what is written only, so a step of one token costs a page or two for each array.
    """

    def __init__(self, config: Config, rows: int) -> None:
        c = config
        self.tokens, self.positions, self.sequence = (np.zeros(rows, np.int32) for _ in range(3))
        self.h, self.x = (np.empty((rows, c.hidden), np.float32) for _ in range(2))
        heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim
        attention, mlp = (heads, kv_heads, kv_heads, heads), (c.ffn, c.ffn)
        # What attention leaves is read before the MLP begins, so both take the same memory.
        shared = np.empty(rows * max(sum(attention), sum(mlp)), np.float32)
        self.q, self.k, self.v, self.a = _parts(shared, rows, attention)
        self.gate, self.up = _parts(shared, rows, mlp)
        half = c.head_dim // 2
        self.cos, self.sin = ({r: np.empty((rows, half), np.float32) for r in set(c.ropes)} for _ in range(2))

    def first(self, rows: int) -> Buffers:
        """The same memory, for the first ``rows`` rows."""
        part = copy(self)
        for name, value in vars(self).items():
            setattr(part, name, {r: a[:rows] for r, a in value.items()} if isinstance(value, dict) else value[:rows])
        return part

    def set_angles(self, frequencies: Mapping[Rope, F32]) -> None:
        """The cosines and sines of the positions: runs, or is recorded."""
        for rope, inverse in frequencies.items():
            ops.angles(self.positions, inverse, self.cos[rope], self.sin[rope])


def _parts(memory: F32, rows: int, widths: tuple[int, ...]) -> Iterator[F32]:
    ends = np.cumsum(widths) * rows
    return (memory[end - rows * width : end].reshape(rows, width) for width, end in zip(widths, ends))


@dataclass(frozen=True)
class Layer:
    """The sites and norms of layer ``index``; its window and its RoPE are the configuration's."""

    config: Config
    index: int
    qkv: list[Runner]
    o: Runner
    gate_up: list[Runner]
    down: Runner
    attn_norm: Norm
    mlp_norm: Norm
    attn_post: Norm | None
    mlp_post: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None

    @classmethod
    def of(cls, config: Config, index: int, runners: Mapping[str, Runner], vectors: Mapping[str, F32]) -> Layer:
        """``runners`` and ``vectors`` by their names in the checkpoint; those of other layers are not looked at."""
        base = f"model.layers.{index}"
        attention, mlp = f"{base}.self_attn", f"{base}.mlp"

        def norm(name: str, present: bool = True) -> Norm | None:
            return Norm(vectors[name], config.norm_eps) if present else None

        after, before = f"{base}.post_attention_layernorm", f"{base}.pre_feedforward_layernorm"
        return cls(
            config,
            index,
            qkv=[runners[f"{attention}.{p}_proj"] for p in "qkv"],
            o=runners[f"{attention}.o_proj"],
            gate_up=[runners[f"{mlp}.gate_proj"], runners[f"{mlp}.up_proj"]],
            down=runners[f"{mlp}.down_proj"],
            attn_norm=Norm(vectors[f"{base}.input_layernorm"], config.norm_eps),
            mlp_norm=Norm(vectors[before if config.post_norms else after], config.norm_eps),
            attn_post=norm(after, config.post_norms),
            mlp_post=norm(f"{base}.post_feedforward_layernorm", config.post_norms),
            q_norm=norm(f"{attention}.q_norm", config.qk_norm),
            k_norm=norm(f"{attention}.k_norm", config.qk_norm),
        )

    def run(self, b: Buffers, store: KVStore, tap: Tap | None = None) -> None:
        """b.h becomes the layer's output for all rows of ``b``, whose positions and angles are set: runs, or is
        recorded. ``tap`` is told what each group of sites reads, in memory that the next step overwrites; with one, the
        layer cannot be recorded. Where it answers True the layer ends there, and b.h means nothing."""
        base, activation = f"model.layers.{self.index}", self.config.activation

        def normed(name: str, norm: Norm) -> bool | None:
            if not tap:
                return None
            ops.rmsnorm(b.h, norm.gain, norm.eps, b.x)
            return tap(name, b.x)

        if normed(f"{base}.self_attn.input", self.attn_norm):
            return
        linear(self.qkv, b.h, [b.q, b.k, b.v], self.attn_norm)
        self._attend(b, store)
        if tap and tap(f"{base}.self_attn.context", b.a):
            return
        _linear_add(b.a, self.o, self.attn_post, b.h, b.x)
        if normed(f"{base}.mlp.input", self.mlp_norm):
            return
        _gated_linear(b.h, self.mlp_norm, self.gate_up, activation, b.gate, b.up)
        if tap and tap(f"{base}.mlp.hidden", b.gate):
            return
        _linear_add(b.gate, self.down, self.mlp_post, b.h, b.x)

    def _attend(self, b: Buffers, store: KVStore) -> None:
        """b.a = attention of b.q to the store and the new b.k, b.v."""
        c, pool = self.config, store.layer(self.index)
        rope, window = c.ropes[self.index], c.windows[self.index]
        if self.q_norm and self.k_norm:
            _norm_heads(b.q, self.q_norm)
            _norm_heads(b.k, self.k_norm)
        q, a = (x.reshape(-1, c.heads, c.head_dim) for x in (b.q, b.a))
        k, v = (x.reshape(-1, c.kv_heads, c.head_dim) for x in (b.k, b.v))
        ops.rope(q, k, b.cos[rope], b.sin[rope])
        where = (b.positions, b.sequence, store.tables, pool.k, pool.v, pool.k_scale, pool.v_scale)
        ops.kv_write(k, v, *where)
        ops.attention(q, *where, a, None, c.scale, window, 0.0)


# ---------------------------------------------------------------- what a layer is made of


def _gated_linear(h: F32, norm: Norm, sites: list[Runner], activation: str, gate: F32, up: F32) -> None:
    """gate = act(gate site of norm(h)) * (up site of norm(h))."""
    if all(site.whole for site in sites):
        linear(sites, h, [gate], norm, activation)
    else:
        linear(sites, h, [gate, up], norm)
        ops.gated(activation, gate, up, gate)


def _linear_add(y: F32, site: Runner, post: Norm | None, h: F32, x: F32) -> None:
    """h += y W^T + b, normalised first where the family does that; x is memory to work in."""
    if post:
        linear([site], y, [x])
        ops.rmsnorm(x, post.gain, post.eps, x)
        ops.add(h, x)
    else:
        linear([site], y, [h], epilogue="add")


def _norm_heads(x: F32, norm: Norm) -> None:
    heads = x.reshape(-1, len(norm.gain))
    ops.rmsnorm(heads, norm.gain, norm.eps, heads)
