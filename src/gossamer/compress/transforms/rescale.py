"""A base that lies on no quantization grid: random factors moved between producers and consumers.

Models published in 4 bits flatter whatever stores them in 4 bits again. Factors at random between every norm and the
columns it feeds, up rows and down columns, value rows and output columns leave the function as it was (up to float32
rounding) and take every block linear off its grid. A tied embedding has nothing to trade with and stays on its own.
"""

from __future__ import annotations

import math

import numpy as np

from gossamer.compress.transforms.base import Migrate
from gossamer.errors import UsageError
from gossamer.models.topology import Topology

__all__ = ["rescale"]


def rescale(topology: Topology, seed: int = 1, low: float = 0.75, high: float = 1.33) -> list[Migrate]:
    """A ``Migrate`` for each producer of the topology, its factors log-uniform in [low, high].

    Equal seeds give equal factors. Raises UsageError unless 0 < low <= high.
    """
    if not 0 < low <= high < math.inf:
        raise UsageError(f"factors from {low:g} to {high:g} were asked for; the range must be positive and ascending.")
    random = np.random.default_rng(seed)
    sizes = {v.name: v.size for v in topology.vectors} | {s.name: s.rows for s in topology.sites}
    return [
        Migrate(producer, np.exp(random.uniform(math.log(low), math.log(high), sizes[producer])), "rescale")
        for producer, _ in topology.feeds
    ]
