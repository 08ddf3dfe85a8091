"""The decoder, written once over ``ops``: every family is this code with another ``Config``.

A step runs up to 512 tokens of any sequences of one store of keys and values: chunks of prompts, single tokens of
sequences that are being continued, or both. What a step does is recorded when a store is first used, and replayed
natively from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.errors import UsageError
from gossamer.formats.dispatch import Norm, Runner, linear
from gossamer.models.config import Config, Rope
from gossamer.models.layer import Buffers, KVLayer, KVStore, KVView, Layer

__all__ = ["HEAD_ROWS", "MAX_TOKENS", "Buffers", "KVLayer", "KVStore", "KVView", "Transformer"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

MAX_TOKENS = 512  # tokens of one step; a longer prompt runs in chunks, with bitwise the same result
HEAD_ROWS = 64  # rows of logits in memory at once: 64 MiB for a vocabulary of 262,144


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
        self._layers = [Layer.of(c, i, runners, vectors) for i in range(c.layers)]
        self._final = Norm(vectors["model.norm"], c.norm_eps)
        self._buffers: Buffers | None = None
        self._steps: WeakKeyDictionary[KVStore, ops.Program] = WeakKeyDictionary()
        self._head: _Head | None = None

    # ------------------------------------------------------------ the model

    def trace(self, b: Buffers, store: KVStore) -> None:
        """A step over all rows of ``b``, from its inputs to the hidden states ``b.h``: runs, or is recorded."""
        c = self.config
        ops.embed(self.embedding.weight, b.tokens, b.h)
        if c.embed_scale != 1.0:
            ops.scale(b.h, c.embed_scale)
        b.set_angles(self._frequencies)
        for layer in self._layers:
            layer.run(b, store)

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
