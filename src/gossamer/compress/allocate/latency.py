"""Seconds that a site takes on this machine, measured cold, and what they say about tokens per second."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from functools import cache

import numpy as np

from gossamer import ops
from gossamer.errors import UsageError
from gossamer.evaluate.machine import last_cache_bytes
from gossamer.evaluate.random_weights import RandomMatrices
from gossamer.formats import Packed, SiteFormat
from gossamer.formats.dispatch import linear, make_runner

__all__ = ["site_latency", "tokens_per_second"]

COLD = 3  # times the last cache that is read between two uses of the same bytes
UNKNOWN_CACHE = 32 << 20  # bytes taken for a last cache that the system does not tell of
MOST = 2048  # copies of a small site
REPETITIONS = 7

_matrices = RandomMatrices()


def site_latency(fmt: SiteFormat, rows: int, cols: int, tokens: int = 1) -> float:
    """Seconds that a site of this format and shape takes for ``tokens`` tokens, with the threads that ops uses now.

    Copies of a random matrix, together three times the last cache, are multiplied one after the other in a recorded
    program, as a model's step does it: the least of 7 rounds after one more, over the copies, since what else runs on
    the machine only adds. Measured once for each format, shape, number of tokens and of threads. The weights of a model
    that fits into the cache would be faster.

    Raises UsageError for fewer than one token and FormatError for a shape that the format cannot hold.
    """
    if tokens < 1:
        raise UsageError(f"a site cannot be timed for {tokens} tokens; time at least 1.")
    return _measured(fmt, rows, cols, tokens, ops.threads(), ops.isa())


@cache
def _measured(fmt: SiteFormat, rows: int, cols: int, tokens: int, threads: int, isa: str) -> float:
    packed = _matrices.make(fmt.weight, rows, cols)
    cold = COLD * (last_cache_bytes() or UNKNOWN_CACHE)
    copies = min(MOST, max(2, math.ceil(cold / packed.nbytes)))
    runners = [make_runner(_copy(packed), fmt) for _ in range(copies)]
    x = np.random.default_rng(0).standard_normal((tokens, cols), np.float32)
    out = np.empty((tokens, rows), np.float32)
    with ops.record(tokens) as program:
        for runner in runners:
            linear([runner], x, [out])
    program.run(tokens)
    return min(_timed(program, tokens) for _ in range(REPETITIONS)) / copies


def _copy(packed: Packed) -> Packed:
    return Packed(packed.format, packed.shape, {name: array.copy() for name, array in packed.arrays.items()})


def _timed(program: ops.Program, tokens: int) -> float:
    start = time.perf_counter()
    program.run(tokens)
    return time.perf_counter() - start


def tokens_per_second(sites: Iterable[float], rest: float = 0.0) -> float:
    """Tokens per second of a step whose sites take these seconds, and all else (attention, norms, sampling) ``rest``.

    ``rest`` is best the measured time of a token in some format less the sum of that format's site latencies.
    """
    total = math.fsum(sites) + rest
    if not total > 0:
        raise UsageError(f"a step of {total:g} seconds has no speed; give the seconds of its sites.")
    return 1 / total
