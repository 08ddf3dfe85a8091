"""The decoder, written once over ``ops``: every family is this code with another ``Config``.

A step runs up to 512 tokens of any sequences of one store of keys and values: chunks of prompts, single tokens of
sequences that are being continued, or both. What a step does is recorded when a store is first used, and replayed
natively from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.errors import UsageError
from gossamer.formats.dispatch import Norm, Runner, linear
from gossamer.models.config import Config, Rope

__all__ = ["HEAD_ROWS", "MAX_TOKENS", "Buffers", "KVLayer", "KVStore", "KVView", "Transformer"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

MAX_TOKENS = 512  # tokens of one step; a longer prompt runs in chunks, with bitwise the same result
HEAD_ROWS = 64  # rows of logits in memory at once: 64 MiB for a vocabulary of 262,144


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


def _parts(memory: F32, rows: int, widths: tuple[int, ...]) -> Iterator[F32]:
    ends = np.cumsum(widths) * rows
    return (memory[end - rows * width : end].reshape(rows, width) for width, end in zip(widths, ends))


@dataclass(frozen=True)
class _Layer:
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


class Transformer:
    """A loaded model. ``runners`` maps site names to linear sites, ``vectors`` norm names to their gains.

    Not for several threads at once: they would share its buffers.
    """

    def __init__(self, config: Config, runners: Mapping[str, Runner], vectors: Mapping[str, F32]) -> None:
        self.config, self.runners, self.vectors = config, runners, vectors
        c = config
        self.embedding = runners["model.embed_tokens"]
        self.head = self.embedding if c.tied else runners["lm_head"]
        self._frequencies: dict[Rope, F32] = {r: r.inverse_frequencies(c.head_dim) for r in set(c.ropes)}
        self._layers = [self._layer(i) for i in range(c.layers)]
        self._final = Norm(vectors["model.norm"], c.norm_eps)
        self._buffers: Buffers | None = None
        self._steps: WeakKeyDictionary[KVStore, ops.Program] = WeakKeyDictionary()
        self._head: _Head | None = None

    def _layer(self, i: int) -> _Layer:
        base = f"model.layers.{i}"
        attention, mlp = f"{base}.self_attn", f"{base}.mlp"
        c, r = self.config, self.runners

        def norm(name: str, present: bool = True) -> Norm | None:
            return Norm(self.vectors[name], c.norm_eps) if present else None

        after, before = f"{base}.post_attention_layernorm", f"{base}.pre_feedforward_layernorm"
        return _Layer(
            qkv=[r[f"{attention}.{p}_proj"] for p in "qkv"],
            o=r[f"{attention}.o_proj"],
            gate_up=[r[f"{mlp}.gate_proj"], r[f"{mlp}.up_proj"]],
            down=r[f"{mlp}.down_proj"],
            attn_norm=Norm(self.vectors[f"{base}.input_layernorm"], c.norm_eps),
            mlp_norm=Norm(self.vectors[before if c.post_norms else after], c.norm_eps),
            attn_post=norm(after, c.post_norms),
            mlp_post=norm(f"{base}.post_feedforward_layernorm", c.post_norms),
            q_norm=norm(f"{attention}.q_norm", c.qk_norm),
            k_norm=norm(f"{attention}.k_norm", c.qk_norm),
        )

    # ------------------------------------------------------------ the model

    def trace(self, b: Buffers, store: KVStore) -> None:
        """A step over all rows of ``b``, from its inputs to the hidden states ``b.h``: runs, or is recorded."""
        c = self.config
        ops.embed(self.embedding.weight, b.tokens, b.h)
        if c.embed_scale != 1.0:
            ops.scale(b.h, c.embed_scale)
        for rope, frequencies in self._frequencies.items():
            ops.angles(b.positions, frequencies, b.cos[rope], b.sin[rope])
        for i, layer in enumerate(self._layers):
            linear(layer.qkv, b.h, [b.q, b.k, b.v], layer.attn_norm)
            self._attend(i, layer, b, store)
            _linear_add(b.a, layer.o, layer.attn_post, b.h, b.x)
            _gated_linear(b.h, layer.mlp_norm, layer.gate_up, c.activation, b.gate, b.up)
            _linear_add(b.gate, layer.down, layer.mlp_post, b.h, b.x)

    def _attend(self, i: int, layer: _Layer, b: Buffers, store: KVStore) -> None:
        """b.a = attention of b.q to the store and the new b.k, b.v."""
        c, pool, rope = self.config, store.layer(i), self.config.ropes[i]
        if layer.q_norm and layer.k_norm:
            _norm_heads(b.q, layer.q_norm)
            _norm_heads(b.k, layer.k_norm)
        q, a = (x.reshape(-1, c.heads, c.head_dim) for x in (b.q, b.a))
        k, v = (x.reshape(-1, c.kv_heads, c.head_dim) for x in (b.k, b.v))
        ops.rope(q, k, b.cos[rope], b.sin[rope])
        where = (b.positions, b.sequence, store.tables, pool.k, pool.v, pool.k_scale, pool.v_scale)
        ops.kv_write(k, v, *where)
        ops.attention(q, *where, a, None, c.scale, c.windows[i], 0.0)

    # ------------------------------------------------------------ steps

    def step(self, tokens: I32, positions: I32, sequence: I32 | int, store: KVStore) -> F32:
        """Hidden states before the last norm, float32 [n, hidden], of 1 to 512 tokens: a view until the next step.

        ``tokens`` and ``positions`` are int32 [n]; ``sequence`` is the row of ``store.tables`` of each token, or the
        one of all. Tokens of one sequence follow each other in ascending positions. Their keys and values are written
        to the store, and each token attends to all positions up to its own that its sequence has there.

        Raises UsageError for other numbers of tokens, and ValueError for a token, position or row that does not exist.
        """
        n = len(tokens)
        if not 1 <= n <= MAX_TOKENS:
            raise UsageError(f"a step of {n} tokens was asked for; it takes 1 to {MAX_TOKENS}.")
        if self._buffers is None:
            self._buffers = Buffers(self.config, MAX_TOKENS)
        b = self._buffers
        program = self._steps.get(store)
        if program is None:
            with ops.record(MAX_TOKENS) as program:
                self.trace(b, store)
            self._steps[store] = program
        b.tokens[:n], b.positions[:n], b.sequence[:n] = tokens, positions, sequence
        program.run(n)
        return b.h[:n]

    def hidden(self, tokens: I32, positions: I32, kv: KVView) -> F32:
        """As ``step``, for tokens of one sequence."""
        return self.step(tokens, positions, kv.row, kv.pool)

    def logits(self, hidden: F32, copy: bool = True) -> F32:
        """Next-token logits, float32 [n, vocab], of hidden states [n, hidden].

        Without ``copy``, up to 64 rows are a view that the next call overwrites.
        """
        if self._head is None:
            self._head = _Head(self)
        n = len(hidden)
        if not copy and n <= HEAD_ROWS:
            return self._head.run(hidden)
        out = np.empty((n, self.config.vocab), np.float32)
        for start in range(0, n, HEAD_ROWS):
            out[start : start + HEAD_ROWS] = self._head.run(hidden[start : start + HEAD_ROWS])
        return out


class _Head:
    """The last norm and the map to the vocabulary, recorded for up to 64 rows."""

    def __init__(self, model: Transformer) -> None:
        c = model.config
        self.hidden = np.empty((HEAD_ROWS, c.hidden), np.float32)
        self.logits = np.empty((HEAD_ROWS, c.vocab), np.float32)
        with ops.record(HEAD_ROWS) as self.program:
            linear([model.head], self.hidden, [self.logits], model._final)

    def run(self, hidden: F32) -> F32:
        n = len(hidden)
        self.hidden[:n] = hidden
        self.program.run(n)
        return self.logits[:n]


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
