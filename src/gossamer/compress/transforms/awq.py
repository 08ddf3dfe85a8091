"""Scales that protect the weights of the channels with large inputs (AWQ, Lin et al. 2024, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gossamer.compress.edits import Edited
from gossamer.compress.statistics import Statistics
from gossamer.compress.transforms.base import PLACES, Migrate, chosen_feeds
from gossamer.compress.transforms.ranges import by_producer
from gossamer.compress.transforms.smooth import Quantize, output_loss
from gossamer.errors import UsageError

__all__ = ["awq_scales"]

F64 = npt.NDArray[np.float64]


def awq_scales(
    edited: Edited,
    statistics: Mapping[str, Statistics],
    quantize: Quantize,
    *,
    points: int = 20,
    places: Sequence[str] = PLACES,
) -> list[Migrate]:
    """The best s = E|x|^r of each feed, r = 0, 1/points, ... below 1, by the output error under the real quantizer.

    s is divided by the root of its largest times its smallest entry, and is at least 1e-4 before that. All sites that
    read the channels share one s; their errors, each over its output's square, are added (``output_loss``). Under
    grouped queries a channel of the values has one s for all columns that read it, found from their mean. r = 0 is no
    scaling, and is kept where nothing is better, so that on the samples the error is never above it.
    """
    if points < 1:
        raise UsageError(f"a search of {points} points was asked for; it needs at least 1.")
    found = []
    for producer, consumers in chosen_feeds(edited.topology, statistics, places):
        known = statistics[consumers[0].shares]
        a = by_producer(edited.topology, producer, known.mean_abs, "mean")
        ratios = np.arange(points) / points
        scales = [_scale(a, r) for r in ratios]
        best = int(np.argmin(output_loss(edited, producer, consumers, known, scales, quantize)))
        if best:
            found.append(Migrate(producer, 1 / scales[best], f"awq({ratios[best]:g})"))
    return found


def _scale(a: F64, r: float) -> F64:
    s = np.maximum(a**r, 1e-4)
    scaled: F64 = s / np.sqrt(s.max() * s.min())
    return scaled
