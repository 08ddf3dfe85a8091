"""Calibration: the model's own forward pass over a text, layer by layer, and what the inputs of its sites look like.

Memory holds the hidden states of the whole text, one layer's weights in float32 and the sums of its four inputs
(``calibration_bytes``); nothing depends on how deep the model is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.compress.statistics import ROWS, SAMPLES, STEP, Collector, Statistics
from gossamer.errors import UsageError
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.config import Config
from gossamer.models.layerwise import LayerRun, embed
from gossamer.models.load import Progress
from gossamer.models.topology import Topology, describe

__all__ = ["HEAD", "advance", "calibrate", "calibration_bytes", "collect", "fingerprint", "groups", "head_statistics"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

HEAD = "head.input"  # what the head reads: the last hidden states after the last norm


def groups(topology: Topology, index: int) -> dict[str, int]:
    """The inputs of layer ``index`` by name (``Site.shares``), in execution order, and their columns."""
    return {site.shares: site.cols for site in topology.sites if site.layer == index}


def collect(
    layer: LayerRun,
    states: Sequence[F32],
    *,
    hessian: bool = True,
    samples: int = SAMPLES,
    only: Collection[str] | None = None,
    move: bool = False,
) -> dict[str, Statistics]:
    """Statistics of a layer's inputs (``groups``; ``only`` some of them) over all sequences.

    ``states`` are the hidden states before the layer, float32 [n, hidden] of each sequence. With ``move`` they become,
    in place, those after it: one pass for a layer whose successor reads what this one gives.

    Raises UsageError when the model computes a NaN or an infinity, with the name of the input.
    """
    tokens = sum(len(h) for h in states)
    collectors = {
        name: Collector(cols, hessian=hessian, samples=samples, expected_tokens=tokens)
        for name, cols in groups(describe(layer.config), layer.index).items()
        if only is None or name in only
    }

    wanted = list(collectors)

    def tap(name: str, x: F32) -> bool:
        if name in collectors:
            collectors[name].add(x)
        return not move and name == wanted[-1]  # what comes after it is computed for nobody

    for h in states:
        after = layer.run(h, tap)
        if move:
            h[:] = after
    return {name: _result(name, collectors.pop(name)) for name in list(collectors)}


def _result(name: str, collector: Collector) -> Statistics:
    try:
        return collector.result()
    except UsageError as error:
        raise UsageError(f"calibrating on the input '{name}': {error}") from None


def advance(layer: LayerRun, states: Sequence[F32]) -> None:
    """The hidden states before the layer become, in place, those after it."""
    for h in states:
        h[:] = layer.run(h)


def head_statistics(
    checkpoint: Checkpoint, states: Sequence[F32], *, hessian: bool = True, samples: int = SAMPLES
) -> dict[str, Statistics]:
    """Statistics of what the head reads, under the name HEAD: ``states`` are those after the last layer.

    A tied head reads it as well, though its table is a site with another name.
    """
    config = checkpoint.config
    gain = checkpoint.vector(next(v for v in checkpoint.topology.vectors if v.role == "final_norm"))
    tokens = sum(len(h) for h in states)
    collector = Collector(config.hidden, hessian=hessian, samples=samples, expected_tokens=tokens)
    for h in states:
        x = np.empty(h.shape, np.float32)
        ops.rmsnorm(np.ascontiguousarray(h), gain, config.norm_eps, x)
        collector.add(x)
    return {HEAD: _result(HEAD, collector)}


def calibrate(
    checkpoint: Checkpoint,
    sequences: Sequence[I32],
    *,
    hessian: bool = True,
    samples: int = SAMPLES,
    progress: Progress | None = None,
) -> Iterator[dict[str, Statistics]]:
    """The statistics of each layer's inputs by ``Site.shares``, layer by layer, then those of the head's.

    ``sequences`` are token ids, int32 [n] each, and run from an empty context in float32, whatever the checkpoint
    stores; no layer is quantized on the way. ``progress`` is told the layers done and in all.

    Raises UsageError for tokens that the model does not have, ResourceError for second moments that do not fit.
    """
    layers = checkpoint.config.layers
    states = embed(checkpoint, sequences)
    for index in range(layers):
        yield collect(LayerRun.of(checkpoint, index), states, hessian=hessian, samples=samples, move=True)
        if progress:
            progress(index + 1, layers)
    yield head_statistics(checkpoint, states, hessian=hessian, samples=samples)


def calibration_bytes(config: Config, tokens: int, *, hessian: bool = True, samples: int = SAMPLES) -> int:
    """The most memory that ``calibrate`` takes for ``tokens`` tokens beside what the caller keeps, estimated."""
    sites = [site for site in describe(config).sites if site.layer == 0]
    largest = max(site.rows * site.cols for site in sites)
    weights = 4 * (sum(site.rows * site.cols for site in sites) + largest)
    inputs = groups(describe(config), 0).values()
    sums = sum(4 * (min(samples, tokens) + STEP) * cols + (12 * cols * cols if hessian else 0) for cols in inputs)
    # A step's activations, its squares in float64, and the block of the product that is being added.
    widest = max(inputs)
    work = 4 * STEP * (2 * config.hidden + 2 * widest) + (12 * STEP + 4 * min(ROWS, widest)) * widest
    return 4 * tokens * config.hidden + weights + sums + work


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of the model's shape, norms and some rows of every matrix: other weights give another, and reading whole
    checkpoints is spared."""
    digest = hashlib.sha256(repr(checkpoint.config).encode())

    def add(value: Any) -> None:
        digest.update(np.ascontiguousarray(value, "<f4").tobytes())

    for vector in checkpoint.topology.vectors:
        add(checkpoint.vector(vector))
    for site in checkpoint.topology.sites:
        middle = site.rows // 2
        add(checkpoint.source(site).read(middle, min(site.rows, middle + 16)))
        checkpoint.release(site)
    return digest.hexdigest()
