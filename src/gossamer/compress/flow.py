"""The hidden states of the calibration text on their way through the layers, as the compressed model computes them.

States are never stored: a run that goes on from an earlier one sends the text through the finished layers again, from
their packed parts, which gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.compress import calibrate
from gossamer.compress.statistics import Statistics
from gossamer.compress.write import Stored
from gossamer.formats.dispatch import Runner, make_runner
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.layerwise import LayerRun, check_tokens, embed, layer_runners, layer_vectors, unpack_layer
from gossamer.models.topology import Site

__all__ = ["Flow"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

SAMPLES = 512  # inputs that are kept as they are


class Flow:
    """``sequences`` of token ids through ``checkpoint``.

    ``compressed`` says whether the states are those of the compressed model (``stored`` fills up meanwhile) or of the
    checkpoint as it is; ``hessian`` whether second moments are collected.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sequences: Sequence[I32],
        stored: Mapping[str, Stored],
        *,
        compressed: bool,
        hessian: bool,
    ) -> None:
        check_tokens(sequences, checkpoint.config)
        self.checkpoint, self.sequences, self.stored = checkpoint, sequences, stored
        self.compressed, self.hessian = compressed, hessian
        self._states: list[F32] = []
        self._at = -1  # the layer that the states stand before

    def before(self, index: int, progress: Callable[[int, int], None] | None = None) -> list[F32]:
        """The states before a layer, float32 [n, hidden] of each sequence; every layer before it is finished."""
        if self._at < 0:
            self._states, self._at = self._embedded(), 0
        first = self._at
        while self._at < index:
            calibrate.advance(self._layer(self._at), self._states)
            self._at += 1
            if progress:
                progress(self._at - first, index - first)
        return self._states

    def statistics(self, index: int) -> dict[str, Statistics]:
        """Of all inputs of a layer whose weights are those of the checkpoint."""
        states = self.before(index)
        run = LayerRun.of(self.checkpoint, index)
        found = calibrate.collect(run, states, hessian=self.hessian, samples=SAMPLES, move=not self.compressed)
        if not self.compressed:
            self._at += 1
        return found

    def by_group(self, index: int) -> GroupByGroup:
        """The same one input after the other, while the layer is being compressed."""
        return GroupByGroup(self, index)

    def _embedded(self) -> list[F32]:
        if not self.compressed:
            return embed(self.checkpoint, self.sequences)
        table = self.stored["model.embed_tokens"]
        tokens = np.concatenate(self.sequences).astype(np.int32)
        h = np.empty((len(tokens), table.site.cols), np.float32)
        ops.embed(make_runner(table.packed(), table.format).weight, tokens, h)
        if self.checkpoint.config.embed_scale != 1.0:
            ops.scale(h, self.checkpoint.config.embed_scale)
        return np.split(h, np.cumsum([len(s) for s in self.sequences])[:-1])

    def _layer(self, index: int) -> LayerRun:
        if not self.compressed:
            return LayerRun.of(self.checkpoint, index)
        runners = {s.name: self.runner(s, self.stored[s.name]) for s in self.sites(index)}
        return LayerRun(self.checkpoint.config, index, runners, layer_vectors(self.checkpoint, index))

    def sites(self, index: int) -> list[Site]:
        return [site for site in self.checkpoint.topology.sites if site.layer == index]

    def runner(self, site: Site, stored: Stored) -> Runner:
        return make_runner(stored.packed(), stored.format, self.checkpoint.bias(site))


class GroupByGroup:
    """A layer that is compressed from front to back: each input is collected when what comes before is finished."""

    def __init__(self, flow: Flow, index: int) -> None:
        self.flow, self.index = flow, index
        self._states = flow.before(index)
        self._vectors = layer_vectors(flow.checkpoint, index)
        self._runners = layer_runners(flow.checkpoint, index, unpack_layer(flow.checkpoint, index))

    def statistics(self, shares: str) -> Statistics:
        """Of the input ``shares`` (``Site.shares``), through the sites as they are now."""
        run = LayerRun(self.flow.checkpoint.config, self.index, self._runners, self._vectors)
        found = calibrate.collect(run, self._states, hessian=self.flow.hessian, samples=SAMPLES, only=[shares])
        return found[shares]

    def replace(self, name: str, runner: Runner) -> None:
        """From now on a site runs so."""
        self._runners[name] = runner
