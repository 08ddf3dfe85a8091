"""How far one model's predictions lie from another's, token by token, and what that comes to.

Both run side by side, window by window; no more than 64 rows of logits of each are in memory, and none is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.engine.llm import LLM
from gossamer.errors import GossamerError
from gossamer.models.load import Progress
from gossamer.models.transformer import HEAD_ROWS

__all__ = ["CONFIDENCE", "Bucket", "Measured", "OurPredictions", "Predictor", "measure"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

CONFIDENCE = (0.0, 0.25, 0.5, 0.9, 1.0)  # bounds of the buckets of the base's highest probability


class Predictor(Protocol):
    """Something that predicts tokens."""

    @property
    def name(self) -> str: ...

    def predictions(self, ids: Sequence[int], first: int) -> Iterator[F32]:
        """Logits from which ids[first], ids[first + 1], ... are predicted: float32 [up to 64, vocabulary] each time.

        The context is empty at ids[0]. Every part but the last has 64 rows or ends at a multiple of 512 tokens.
        """


class OurPredictions:
    """A loaded model as a Predictor."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.name = llm, llm.checkpoint.path.name

    def predictions(self, ids: Sequence[int], first: int) -> Iterator[F32]:
        sequence = self.llm.new_sequence(len(ids))
        start = 0
        for hidden in self.llm.feed(ids, sequence):
            low = max(first - 1 - start, 0)
            high = min(len(ids) - 1 - start, len(hidden))
            for r in range(low, high, HEAD_ROWS):
                yield self.llm.transformer.logits(hidden[r : min(r + HEAD_ROWS, high)])
            start += len(hidden)


@dataclass(frozen=True)
class Bucket:
    """The tokens at which the base gave its likeliest token a probability in (``low``, ``high``].

    ``kl_mean`` is in nats per token with its standard error over windows (of a ratio of sums, for windows have
    different numbers of such tokens); both are None for a bucket without tokens, the error for a single window.
    """

    low: float
    high: float
    tokens: int
    kl_mean: float | None
    kl_mean_stderr: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class Measured:
    """Of the scored tokens of every window, float64 [tokens] each: what each token cost in nats (``nll``) and, beside
    a base, what it cost there, KL(base || this), whether both find the same token likeliest (bool), and the base's
    highest probability."""

    nll: list[F64]
    base_nll: list[F64]
    kl: list[F64]
    same: list[Bools]
    confidence: list[F64]

    def buckets(self) -> list[Bucket]:
        """Divergence by how sure the base was. Raises ValueError without a base."""
        kl, same, sure = np.concatenate(self.kl), np.concatenate(self.same), np.concatenate(self.confidence)
        buckets = []
        for low, high in pairwise(CONFIDENCE):
            inside = [(c > low) & (c <= high) for c in self.confidence]
            counts = np.array([mask.sum() for mask in inside])
            sums = np.array([k[mask].sum() for k, mask in zip(self.kl, inside)])
            total = int(counts.sum())
            mask = (sure > low) & (sure <= high)
            mean = float(kl[mask].mean()) if total else None
            stderr = None
            if mean is not None and len(counts) > 1:
                spread = ((sums - mean * counts) ** 2).sum()
                stderr = math.sqrt(spread * len(counts) / (len(counts) - 1)) / total
            buckets.append(Bucket(low, high, total, mean, stderr, float(same[mask].mean()) if total else None))
        return buckets

    def halves(self) -> tuple[float, float] | None:
        """Mean KL of the first and of the second half of the windows; None for a single window."""
        means = [float(k.mean()) for k in self.kl]
        at = len(means) // 2
        return (sum(means[:at]) / at, sum(means[at:]) / (len(means) - at)) if at else None


def measure(
    candidate: Predictor,
    against: Predictor | None,
    windows: Sequence[Sequence[int]],
    first: int,
    progress: Progress | None = None,
) -> Measured:
    """Scores window[first:] of each window, each token from what stands before it in the window.

    Raises GossamerError when a model gives predictions that are no numbers.
    """
    measured = Measured([], [], [], [], [])
    for done, ids in enumerate(windows):
        _score(candidate, against, ids, first, measured)
        if progress:
            progress(done + 1, len(windows))
    return measured


def _score(candidate: Predictor, against: Predictor | None, ids: Sequence[int], first: int, into: Measured) -> None:
    count = len(ids) - first
    nll, base_nll, kl, sure = (np.zeros(count) for _ in range(4))
    same = np.ones(count, np.uint8)
    models = [candidate] if against is None else [candidate, against]
    at = 0
    for parts in zip(*(m.predictions(ids, first) for m in models), strict=True):
        span = slice(at, at + len(parts[0]))
        at = span.stop
        targets = np.array(ids[first:][span], np.int32)
        ops.nll(parts[0], targets, nll[span])
        if against is not None:
            ops.nll(parts[1], targets, base_nll[span])
            ops.divergence(parts[1], parts[0], kl[span], same[span])
            ops.nll(parts[1], parts[1].argmax(axis=1).astype(np.int32), sure[span])
    for model, values in zip(models, (nll, base_nll)):
        if not np.isfinite(values).all():
            raise GossamerError(
                f"{model.name} predicts values that are not numbers (NaN or infinity); check the checkpoint, or use "
                "a format with a larger range."
            )
    into.nll.append(nll)
    if against is not None:
        into.base_nll.append(base_nll)
        into.kl.append(kl)
        into.same.append(same.astype(np.bool_))
        into.confidence.append(np.minimum(np.exp(-sure), 1.0))
