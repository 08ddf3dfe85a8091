"""Timing in turn, A B A B: two sides never run at once, and each ratio is of neighbours in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gossamer.evaluate.roofline import Peaks, Work

__all__ = ["Cell", "Job", "Rate", "Turn", "cell", "rate", "take_turns"]

SETTLE = 0.02  # seconds between two sides, in which the threads of the first stop spinning

Timed = Callable[[], float]  # runs once and returns the seconds that count


@dataclass(frozen=True)
class Job:
    """Something that one side, or both, do: each call is one repetition and returns its seconds."""

    ours: Timed
    peer: Timed | None = None


@dataclass(frozen=True)
class Turn:
    """Seconds of one repetition, and the machine's peaks just before and just after ours."""

    ours: float
    peer: float | None
    before: Peaks
    after: Peaks

    @property
    def peaks(self) -> Peaks:
        return self.before.between(self.after)


def take_turns(
    jobs: Sequence[Job],
    repetitions: int,
    probe: Callable[[], Peaks],
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Turn]]:
    """The turns of each job. In every repetition each job runs once: a probe, ours, a probe, the peer's."""
    turns: list[list[Turn]] = [[] for _ in jobs]
    for done in range(repetitions):
        for job, into in zip(jobs, turns):
            before = probe()
            ours = job.ours()
            after = probe()
            peer = None
            if job.peer is not None:
                time.sleep(SETTLE)
                peer = job.peer()
                time.sleep(SETTLE)
            into.append(Turn(ours, peer, before, after))
        if progress:
            progress(done + 1, repetitions)
    return turns


@dataclass(frozen=True)
class Rate:
    """The median of the repetitions, the least and the greatest: tokens a second, or a ratio."""

    median: float
    low: float
    high: float


def rate(values: Sequence[float]) -> Rate:
    return Rate(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Cell:
    """One piece of work in one format. ``work`` is "prefill" or "decode"; rates are tokens a second of all sequences.

    ``ratio`` is ours by the peer's, of neighbouring turns. ``bound_tps`` is the roofline at the median of the probes
    and ``bound_by`` what sets it: "bandwidth", "int8", "bf16" or "f32". ``share`` is the median over the steady
    repetitions of ours by the roofline of that moment, None when each was dropped: ``dropped`` counts those whose
    two probes of the figure that sets the roofline differ by more than 10 %. The four figures are the probes'
    medians in 1e9 bytes and 1e9 operations a second. ``bytes`` and ``macs`` are of one step, or of the whole prompt.
    """

    work: str
    batch: int
    tokens: int
    ours: Rate
    peer: Rate | None
    ratio: Rate | None
    bound_tps: float
    bound_by: str
    share: float | None
    dropped: int
    bandwidth_gbps: float
    int8_gops: float
    bf16_gops: float
    f32_gops: float
    bytes: int
    macs: dict[str, int]


def cell(work: str, batch: int, tokens: int, steps: int, least: Work, turns: Sequence[Turn]) -> Cell:
    """Sums up the turns of a job of ``steps`` times the work ``least``, in which ``tokens`` tokens were made."""
    bounds = [least.bound(t.peaks) for t in turns]
    steady = [t.before.agree(t.after, name) for t, (_, name) in zip(turns, bounds)]
    shares = [steps * seconds / t.ours for t, (seconds, _), good in zip(turns, bounds, steady) if good]
    counted = [t for t, good in zip(turns, steady) if good] or list(turns)
    peaks = Peaks(*(statistics.median(t.peaks.of(n) for t in counted) for n in Peaks.__dataclass_fields__))
    seconds, name = least.bound(peaks)
    pairs = [(t.ours, t.peer) for t in turns if t.peer is not None]
    return Cell(
        work=work,
        batch=batch,
        tokens=tokens,
        ours=rate([tokens / t.ours for t in turns]),
        peer=rate([tokens / b for _, b in pairs]) if pairs else None,
        ratio=rate([b / a for a, b in pairs]) if pairs else None,
        bound_tps=tokens / (steps * seconds),
        bound_by=name,
        share=statistics.median(shares) if shares else None,
        dropped=len(turns) - sum(steady),
        bandwidth_gbps=peaks.bandwidth,
        int8_gops=peaks.int8,
        bf16_gops=peaks.bf16,
        f32_gops=peaks.f32,
        bytes=least.bytes,
        macs=dict(least.macs),
    )
