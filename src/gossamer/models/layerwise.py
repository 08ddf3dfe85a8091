"""A model one layer at a time: the hidden states of many texts go through a layer before the next one is read.

Memory holds the weights of one layer and the hidden states, whatever the depth of the model. What a layer computes is
the code of ``layer.py``, so the states are bitwise those of a ``Transformer`` with the same runners and float32 keys
and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.errors import UsageError
from gossamer.formats import ArraySource, SiteFormat, encode, parse
from gossamer.formats.dispatch import Runner, make_runner
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.config import Config
from gossamer.models.layer import Buffers, KVLayer, Layer, Tap
from gossamer.models.topology import Site
from gossamer.models.transformer import MAX_TOKENS

__all__ = ["LayerRun", "check_tokens", "embed", "layer_runners", "layer_vectors", "unpack_layer"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

_BLOCK = 32  # positions in a block of keys and values
_TABLE_ROWS = 4096  # of the embedding table, decoded at once


class LayerRun:
    """Layer ``index`` over whole sequences. ``runners`` and ``vectors`` are those of its sites and norms, by name.

    Not for several threads at once: they would share its buffers.
    """

    def __init__(self, config: Config, index: int, runners: Mapping[str, Runner], vectors: Mapping[str, F32]) -> None:
        self.config, self.index = config, index
        self._layer = Layer.of(config, index, runners, vectors)
        rope = config.ropes[index]
        self._frequencies = {rope: rope.inverse_frequencies(config.head_dim)}
        self._buffers = Buffers(config, MAX_TOKENS)
        self._store = _OneLayer(config)

    @classmethod
    def of(cls, checkpoint: Checkpoint, index: int, weights: Mapping[str, F32] | None = None) -> LayerRun:
        """The layer with float32 inputs and weights: the checkpoint's, or those given (see ``unpack_layer``)."""
        runners = layer_runners(checkpoint, index, weights)
        return cls(checkpoint.config, index, runners, layer_vectors(checkpoint, index))

    def run(self, h: F32, tap: Tap | None = None) -> F32:
        """The hidden states after the layer, float32 [n, hidden], of one sequence's ``h`` before it, position 0 first.

        ``tap(shares, x)`` is told what each group of sites reads (``Site.shares``): float32 [tokens, cols], after the
        norm or the gate, in order and at most 512 tokens at a time; x is a view that lives during the call. Where it
        answers True, what comes after that input is not computed, and what is returned means nothing.
        """
        if h.ndim != 2 or not len(h) or h.shape[1] != self.config.hidden:
            raise UsageError(
                f"hidden states of shape {list(h.shape)} were given; a layer of this model takes "
                f"[tokens, {self.config.hidden}], at least one token."
            )
        self._store.reserve(len(h))
        out = np.empty(h.shape, np.float32)
        for start in range(0, len(h), MAX_TOKENS):
            n = min(MAX_TOKENS, len(h) - start)
            b = self._buffers.first(n)
            b.positions[:] = np.arange(start, start + n)
            b.h[:] = h[start : start + n]
            b.set_angles(self._frequencies)
            self._layer.run(b, self._store, tap)
            out[start : start + n] = b.h
        return out


class _OneLayer:
    """Keys and values of one sequence in one layer, float32, in the layout that ``ops.kv_write`` gives."""

    def __init__(self, config: Config) -> None:
        self._heads, self._dim = config.kv_heads, config.head_dim
        self.tables: I32 = np.zeros((1, 0), np.int32)

    def reserve(self, tokens: int) -> None:
        """Makes room for a sequence; the last one is gone."""
        blocks = -(-tokens // _BLOCK)
        if blocks > self.tables.shape[1]:
            self.tables = np.arange(blocks, dtype=np.int32)[None]
            k = np.zeros((blocks, self._heads, self._dim, _BLOCK), np.float32)
            v = np.zeros((blocks, self._heads, _BLOCK, self._dim), np.float32)
            self._layer = KVLayer(k, v, None, None)

    def layer(self, index: int) -> KVLayer:
        return self._layer


def check_tokens(sequences: Sequence[I32], config: Config) -> None:
    """Raises UsageError for sequences that the model cannot read: none, empty ones, too long ones, other tokens."""
    if not sequences:
        raise UsageError("there is no text to run; give at least one sequence of tokens.")
    for tokens in sequences:
        if tokens.ndim != 1 or not 1 <= len(tokens) <= config.context:
            raise UsageError(
                f"a sequence of {tokens.size} tokens was given; this model was made for 1 to {config.context} tokens."
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= config.vocab:
            raise UsageError(
                f"token {low if low < 0 else high} is outside the model's {config.vocab} tokens; "
                "was the text encoded with another tokenizer?"
            )


def embed(checkpoint: Checkpoint, sequences: Sequence[I32]) -> list[F32]:
    """The hidden states before the first layer, float32 [n, hidden] for each sequence of token ids [n].

    The table is decoded some rows at a time, and once; the states lie in one array. Raises UsageError as
    ``check_tokens`` does.
    """
    check_tokens(sequences, checkpoint.config)
    tokens = np.concatenate(sequences)
    site = checkpoint.topology.site("model.embed_tokens")
    source = checkpoint.source(site)
    out = np.empty((len(tokens), site.cols), np.float32)
    for start in range(0, site.rows, _TABLE_ROWS):
        end = min(site.rows, start + _TABLE_ROWS)
        here = np.flatnonzero((tokens >= start) & (tokens < end))
        if len(here):
            out[here] = source.read(start, end)[tokens[here] - start]
    checkpoint.release(site)
    if checkpoint.config.embed_scale != 1.0:
        ops.scale(out, checkpoint.config.embed_scale)
    return np.split(out, np.cumsum([len(s) for s in sequences])[:-1])


def _sites(checkpoint: Checkpoint, index: int) -> list[Site]:
    return [site for site in checkpoint.topology.sites if site.layer == index]


def unpack_layer(checkpoint: Checkpoint, index: int) -> dict[str, F32]:
    """The weights of the layer's sites by name, float32 [rows, cols]."""
    weights = {}
    for site in _sites(checkpoint, index):
        weights[site.name] = np.ascontiguousarray(checkpoint.source(site).read(0, site.rows), np.float32)
        checkpoint.release(site)
    return weights


def layer_vectors(checkpoint: Checkpoint, index: int) -> dict[str, F32]:
    """The gains of the layer's norms by name."""
    return {v.name: checkpoint.vector(v) for v in checkpoint.topology.vectors if v.layer == index}


def layer_runners(
    checkpoint: Checkpoint, index: int, weights: Mapping[str, F32] | None = None, fmt: SiteFormat | None = None
) -> dict[str, Runner]:
    """Runners of the layer's sites by name, with the checkpoint's biases.

    ``weights`` are float32 [rows, cols] by name; None reads the checkpoint's, one site at a time. They are stored and
    multiplied as float32 unless ``fmt`` says otherwise.
    """
    fmt = fmt or parse("f32 @ f32")
    runners = {}
    for site in _sites(checkpoint, index):
        source = checkpoint.source(site) if weights is None else ArraySource(weights[site.name])
        packed = encode(fmt.weight, source, f"{checkpoint.path.name}: {site.name}")
        checkpoint.release(site)
        runners[site.name] = make_runner(packed, fmt, checkpoint.bias(site))
    return runners
