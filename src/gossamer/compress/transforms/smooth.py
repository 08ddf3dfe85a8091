"""Scales moved from inputs to weights: SmoothQuant, and the smoothing of outliers alone.

The identity is x W^T = (x / s)(W s)^T with a positive s for each input channel: 1/s goes into what makes the channel
(a norm's gain, value or up rows), s into the columns of everything that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gossamer.compress.edits import Edited
from gossamer.compress.statistics import Statistics
from gossamer.compress.transforms.base import PLACES, Migrate, as_seen, chosen_feeds
from gossamer.compress.transforms.ranges import by_producer, column_absmax, read
from gossamer.errors import UsageError
from gossamer.models.topology import Site

__all__ = ["Quantize", "output_loss", "smooth", "smooth_outliers", "smooth_searched"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Quantize = Callable[[Site, F32], F32]  # a site and weights for it -> what a format keeps of them

_LEAST = 1e-5  # below this a range counts as this


def smooth(
    edited: Edited,
    statistics: Mapping[str, Statistics],
    alpha: float = 0.5,
    beta: float | None = None,
    *,
    places: Sequence[str] = PLACES,
) -> list[Migrate]:
    """s = max|x|^alpha / max|w|^beta for every channel, beta = 1 - alpha unless given.

    The maximum of the weights is over all sites that read the channel, both are at least 1e-5, and a channel that is
    always zero keeps s = 1. ``statistics`` are of the inputs of ``edited`` as it is now, by ``Site.shares``; feeds
    without any are left out. Xiao et al. 2023, eq. 4; with beta given, Lin et al. 2024 (QServe), section 4.3.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value is not None and not 0 <= value <= 1:
            raise UsageError(f"{name} {value:g} of smoothing is out of range: it must be between 0 and 1.")
    found = []
    for producer, consumers in chosen_feeds(edited.topology, statistics, places):
        a, w = _ranges(edited, producer, consumers, statistics[consumers[0].shares])
        s = _strength(a, w, alpha, 1 - alpha if beta is None else beta)
        found.append(Migrate(producer, 1 / s, f"smooth({alpha:g})"))
    return found


def smooth_searched(
    edited: Edited,
    statistics: Mapping[str, Statistics],
    quantize: Quantize,
    quantize_input: Callable[[F32], F32] | None = None,
    *,
    alphas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    places: Sequence[str] = PLACES,
) -> list[Migrate]:
    """As ``smooth``, with the alpha of each feed that gives the least error of its consumers' outputs.

    The error is ``output_loss`` on the samples; no smoothing is among the candidates, and is kept where none is
    better. ``quantize_input`` rounds inputs [tokens, cols] as they will be at run time.
    """
    found = []
    for producer, consumers in chosen_feeds(edited.topology, statistics, places):
        known = statistics[consumers[0].shares]
        a, w = _ranges(edited, producer, consumers, known)
        scales = [np.ones(len(a)), *(_strength(a, w, alpha, 1 - alpha) for alpha in alphas)]
        best = int(np.argmin(output_loss(edited, producer, consumers, known, scales, quantize, quantize_input)))
        if best:
            found.append(Migrate(producer, 1 / scales[best], f"smooth({alphas[best - 1]:g}, searched)"))
    return found


def smooth_outliers(
    edited: Edited, statistics: Mapping[str, Statistics], fraction: float = 0.005, *, places: Sequence[str] = PLACES
) -> list[Migrate]:
    """Only the largest channels are scaled down, to the size of the n-th largest, n = floor(fraction cols + 1.5).

    Percentile clipping smoothing (DGQ, Zhang et al. 2024). Feeds whose n-th largest channel is below 1e-4 are left as
    they are.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"a fraction of {fraction:g} of the channels was asked for; it must be from 0 to below 1.")
    found = []
    for producer, consumers in chosen_feeds(edited.topology, statistics, places):
        a = by_producer(edited.topology, producer, statistics[consumers[0].shares].absmax)
        n = min(len(a), int(fraction * len(a) + 1.5))
        base = np.sort(a)[-n]
        if base >= 1e-4 and (a > base).any():
            found.append(Migrate(producer, np.minimum(1.0, base / np.maximum(a, base)), "smooth outliers"))
    return found


def _ranges(edited: Edited, producer: str, consumers: list[Site], statistics: Statistics) -> tuple[F64, F64]:
    """max|x| and max|w| for each channel of the producer."""
    check_width(statistics, consumers[0])
    topology = edited.topology
    a = by_producer(topology, producer, statistics.absmax)
    return a, by_producer(topology, producer, column_absmax(edited, consumers))


def _strength(a: F64, w: F64, alpha: float, beta: float) -> F64:
    s = np.maximum(a, _LEAST) ** alpha / np.maximum(w, _LEAST) ** beta
    return np.where((a > 0) & (w > 0), s, 1.0)


def check_width(statistics: Statistics, site: Site) -> None:
    if statistics.cols != site.cols:
        raise UsageError(
            f"the statistics for '{site.shares}' are of {statistics.cols} channels and '{site.name}' reads "
            f"{site.cols}; calibrate this model anew."
        )


def output_loss(
    edited: Edited,
    producer: str,
    consumers: list[Site],
    statistics: Statistics,
    scales: Sequence[F64],
    quantize: Quantize,
    quantize_input: Callable[[F32], F32] | None = None,
) -> F64:
    """For each s: the squared error of the consumers' outputs on the samples, each over its output's square, summed.

    The outputs compared are x W^T and in(x / s) Q(W s)^T; s has one entry for each channel of the producer.
    """
    check_width(statistics, consumers[0])
    x = statistics.samples
    loss = np.zeros(len(scales))
    seen = [as_seen(edited.topology, producer, s).astype(np.float32) for s in scales]
    for site in consumers:
        w = read(edited, site)
        wanted = x @ w.T
        total = float(np.square(wanted, dtype=np.float64).sum())
        for i, s in enumerate(seen):
            given = x / s if quantize_input is None else quantize_input(x / s)
            error = given @ quantize(site, w * s).T - wanted
            loss[i] += float(np.square(error, dtype=np.float64).sum()) / total if total > 0 else 0.0
    if not np.isfinite(loss).any():
        raise UsageError(f"no scale for '{producer}' gave a finite error; check the calibration data.")
    return np.where(np.isfinite(loss), loss, math.inf)
