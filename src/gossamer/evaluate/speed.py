"""Speed and memory on this machine: prefill and decode, beside another engine and beside what the machine can do.

Decoding one token reads every weight once, so its bound is how fast memory is read; many tokens at once are bound by
multiply-adds. Probes measure both with the same threads just before and just after every timed piece, and the share
is taken within each.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.engine import kv
from gossamer.engine.llm import LLM
from gossamer.errors import UsageError
from gossamer.evaluate.machine import last_cache_bytes, peak_rss_mb
from gossamer.evaluate.roofline import Work, decode_work, kv_bytes_per_token, prefill_work, probe, weight_bytes
from gossamer.evaluate.score import formats_used
from gossamer.evaluate.turns import Cell, Job, cell, take_turns
from gossamer.models.load import Loaded, Progress
from gossamer.models.transformer import MAX_TOKENS

__all__ = ["PROMPT", "Side", "Speed", "bench"]

I32 = npt.NDArray[np.int32]

PROMPT = 16  # tokens before the first that is decoded
COLD = 4  # weights of fewer than COLD times the last cache are partly read from it


class Side(Protocol):
    """An engine that takes part in a comparison; both return the seconds of the timed part."""

    def prefill(self, tokens: int) -> float:
        """A prompt of ``tokens`` tokens in an empty context, up to the logits of its last."""

    def decode(self, batch: int, steps: int) -> float:
        """``steps`` steps of ``batch`` sequences, a token each, after 16 tokens; the logits of every token."""


@dataclass(frozen=True)
class Speed:
    """What a model reached in one format. Rates are medians over the repetitions, ``_range`` their least and greatest.

    ``cells`` holds the prefill and the decode of every batch. The fields below sum up the prefill and the decode of
    the first batch: ``prefill_tps`` and ``decode_tps`` are tokens per second; ``decode_gbps`` counts
    ``weight_bytes_per_token`` (the packed bytes of every matrix that a token multiplies with, a tied table once, one
    row of an untied embedding) once a step and ``kv_bytes_per_token`` (keys and values of the mean context) for each
    sequence, in 1e9 bytes per second. ``bandwidth_gbps`` is the probe's, ``bandwidth_fraction`` the median over
    repetitions of decode_gbps by the mean of the probes around it, None when each was dropped; ``dropped`` counts
    repetitions whose two probes differ by more than 10 %. ``peak_rss_mb`` is the most memory (1e6 bytes) that the
    process has had, loading included, the probe not. ``load_s`` is None for a model that was not loaded from a file.
    ``weight_bytes`` are those of all packed matrices, ``cache_bytes`` is the last cache's size where known; ``cold``
    tells whether the weights are at least four times that, so that every step reads them from memory.
    """

    model: str
    formats: dict[str, int]
    weights: int
    weight_bytes: int
    bits_per_weight: float
    kv: str
    threads: int
    isa: str
    load_average: float
    prefill_tokens: int
    decode_tokens: int
    repetitions: int
    prefill_tps: float
    prefill_tps_range: tuple[float, float]
    decode_tps: float
    decode_tps_range: tuple[float, float]
    weight_bytes_per_token: int
    kv_bytes_per_token: int
    decode_gbps: float
    bandwidth_gbps: float
    bandwidth_fraction: float | None
    dropped: int
    cells: list[Cell]
    load_s: float | None
    peak_rss_mb: float | None
    cache_bytes: int | None
    cold: bool | None
    unfused_sites: dict[str, str]
    protocol: str
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Everything as a dictionary that ``json.dumps`` takes."""
        return asdict(self)


def bench(
    model: LLM | Loaded,
    *,
    name: str | None = None,
    threads: int | None = None,
    prefill: int = 512,
    decode: int = 128,
    batches: Sequence[int] = (1,),
    repetitions: int = 5,
    peer: Side | None = None,
    progress: Progress | None = None,
) -> Speed:
    """Measures a loaded model, or the random one of ``shape_model``, with ``threads`` threads (None: as set).

    A repetition runs a prompt of ``prefill`` random tokens into an empty context up to the logits of its last; then,
    for each of ``batches``, that many prompts of 16 tokens into empty contexts and ``decode`` steps of a token each
    with the logits of all, which alone are timed. Each piece lies between two probes and is followed by the same
    piece of ``peer``, if there is one. Every piece runs once more before, untimed. Weights are cold in so far as they
    do not fit into the last cache; a note says so when they nearly do.

    Raises UsageError for lengths that the model does not have and ResourceError when the probe gets no memory.
    """
    loaded = model.loaded if isinstance(model, LLM) else model
    config = loaded.transformer.config
    if prefill < 1 or decode < 1 or repetitions < 1 or not batches or min(batches) < 1:
        raise UsageError(
            f"{prefill} tokens of prefill, {decode} of decode, batches of {list(batches)} and {repetitions} "
            "repetitions: each must be at least 1."
        )
    longest = max(prefill, PROMPT + decode)
    if longest > config.context:
        raise UsageError(f"a context of {longest} tokens is needed, but the model was made for {config.context}.")
    fmt = model.kv_format if isinstance(model, LLM) else "f16"
    load_average, before = os.getloadavg()[0], ops.threads()
    if threads is not None:
        ops.set_threads(threads)
    try:
        ours = Ours(model, fmt, prefill, max(batches), decode)
        jobs = [_job(ours, peer, "prefill", prefill)]
        jobs += [_job(ours, peer, "decode", batch, decode) for batch in batches]
        for side in (ours, peer):
            if side is not None:
                side.prefill(prefill)
                for batch in batches:
                    side.decode(batch, min(decode, 4))
        peak = peak_rss_mb()
        turns = take_turns(jobs, repetitions, probe, progress)
        used = ops.threads()
    finally:
        ops.probe_release()
        ops.set_threads(before)

    context = PROMPT + decode / 2
    least: list[Work] = [decode_work(loaded, batch, context, fmt) for batch in batches]
    cells = [cell("prefill", 1, prefill, 1, prefill_work(loaded, prefill, fmt), turns[0])]
    cells += [cell("decode", b, b * decode, decode, w, t) for b, w, t in zip(batches, least, turns[1:])]
    steady = [t for t in turns[1] if t.before.agree(t.after, "bandwidth")]
    gbps = [least[0].bytes * decode / t.ours / 1e9 for t in turns[1]]
    fractions = [least[0].bytes * decode / t.ours / 1e9 / t.peaks.bandwidth for t in steady]
    cache, first, second = last_cache_bytes(), cells[0].ours, cells[1].ours
    read = weight_bytes(loaded)
    return Speed(
        model=name or (model.checkpoint.path.name if isinstance(model, LLM) else config.family),
        formats=formats_used(loaded),
        weights=sum(p.shape[0] * p.shape[1] for p in loaded.packed.values()),
        weight_bytes=loaded.weight_bytes,
        bits_per_weight=loaded.bits_per_weight,
        kv=fmt,
        threads=used,
        isa=ops.isa(),
        load_average=load_average,
        prefill_tokens=prefill,
        decode_tokens=decode,
        repetitions=repetitions,
        prefill_tps=first.median,
        prefill_tps_range=(first.low, first.high),
        decode_tps=second.median,
        decode_tps_range=(second.low, second.high),
        weight_bytes_per_token=read,
        kv_bytes_per_token=kv_bytes_per_token(loaded, fmt, context),
        decode_gbps=statistics.median(gbps),
        bandwidth_gbps=statistics.median(t.peaks.bandwidth for t in steady or turns[1]),
        bandwidth_fraction=statistics.median(fractions) if fractions else None,
        dropped=repetitions - len(steady),
        cells=cells,
        load_s=model.load_s if isinstance(model, LLM) else None,
        peak_rss_mb=peak,
        cache_bytes=cache,
        cold=None if cache is None else read >= COLD * cache,
        unfused_sites=dict(loaded.unfused),
        protocol=(
            f"prefill of {prefill} tokens from an empty context to the logits of the last; decode of {decode} steps "
            f"after a prompt of {PROMPT}, with the logits of every token; medians of {repetitions} repetitions after "
            f"one more{'' if peer is None else ', both sides in turn'}."
        ),
        notes=_notes(read, cache, cells, repetitions, load_average, used),
    )


def _job(ours: Side, peer: Side | None, call: str, *arguments: int) -> Job:
    return Job(
        partial(getattr(ours, call), *arguments),
        None if peer is None else partial(getattr(peer, call), *arguments),
    )


def _notes(
    read: int, cache: int | None, cells: Sequence[Cell], repetitions: int, load: float, threads: int
) -> list[str]:
    notes = []
    if cache is not None and read < COLD * cache:
        notes.append(
            f"The weights ({read / 1e6:.0f} MB) are less than {COLD} times the last cache "
            f"({cache / 1e6:.0f} MB), so a part of them is read from it and not from memory."
        )
    for c in cells:
        what = "prefill" if c.work == "prefill" else f"decode at batch {c.batch}"
        figure = "Memory bandwidth" if c.bound_by == "bandwidth" else f"The {c.bound_by} peak"
        if c.dropped == repetitions:
            notes.append(
                f"{figure} changed by more than 10 % within every repetition of {what}, so there is no share; "
                "run again on a quieter machine."
            )
        elif c.dropped:
            notes.append(f"{c.dropped} of {repetitions} repetitions do not count towards the share of {what}.")
    if load > 0.5 * threads:
        notes.append(f"Other programs were running (load average {load:.1f} before the start).")
    return notes


class Ours:
    """The timed loops over one model and one store of keys and values."""

    def __init__(self, model: LLM | Loaded, fmt: str, prefill: int, batch: int, steps: int) -> None:
        self.transformer = (model.loaded if isinstance(model, LLM) else model).transformer
        config = self.transformer.config
        room = max(_whole(prefill), batch * _whole(PROMPT + steps))
        self.pool = kv.KVPool(config, room, fmt)
        self.sequences = [kv.Sequence(self.pool) for _ in range(batch)]
        self.tokens = np.random.default_rng(0).integers(0, config.vocab, (batch, max(prefill, PROMPT + steps)), "i4")

    def _run(self, tokens: I32, sequence: kv.Sequence) -> None:
        """A prompt after what the sequence holds, up to the logits of its last token."""
        sequence.reserve(len(tokens))
        for start in range(0, len(tokens), MAX_TOKENS):
            part = tokens[start : start + MAX_TOKENS]
            positions = np.arange(sequence.length, sequence.length + len(part), dtype=np.int32)
            hidden = self.transformer.hidden(part, positions, sequence)
            sequence.length += len(part)
        self.transformer.logits(hidden[-1:])

    def _step(self, tokens: I32) -> None:
        """One token more in each of the first sequences, and the logits of all."""
        if len(tokens) == 1:
            self._run(tokens, self.sequences[0])
            return
        batch = self.sequences[: len(tokens)]
        for sequence in batch:
            sequence.reserve(1)
        positions = np.array([s.length for s in batch], np.int32)
        rows = np.array([s.row for s in batch], np.int32)
        hidden = self.transformer.step(tokens, positions, rows, self.pool)
        self.transformer.logits(hidden, copy=False)
        for sequence in batch:
            sequence.length += 1

    def _empty(self) -> None:
        for sequence in self.sequences:
            sequence.truncate(0)

    def prefill(self, tokens: int) -> float:
        self._empty()
        started = time.perf_counter()
        self._run(self.tokens[0, :tokens], self.sequences[0])
        return time.perf_counter() - started

    def decode(self, batch: int, steps: int) -> float:
        self._empty()
        for row, sequence in zip(self.tokens[:batch], self.sequences):
            self._run(row[:PROMPT], sequence)
        started = time.perf_counter()
        for at in range(PROMPT, PROMPT + steps):
            self._step(self.tokens[:batch, at])
        return time.perf_counter() - started


def _whole(tokens: int) -> int:
    return -(-tokens // kv.BLOCK) * kv.BLOCK
