"""Speed and memory on this machine: prefill, decode, and decode beside what the memory can deliver.

Decoding one token reads every weight once, so its bound is how fast memory is read. A probe measures that with
the same threads just before and just after every decode, and the fraction is taken within each pair: both
change from one second to the next on a shared machine.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.engine import kv
from gossamer.engine.llm import LLM
from gossamer.errors import ResourceError, UsageError
from gossamer.evaluate.score import formats_used
from gossamer.models.load import Loaded, Progress
from gossamer.models.transformer import MAX_TOKENS

__all__ = ["Speed", "bench"]

I32 = npt.NDArray[np.int32]

PROMPT = 16  # tokens before the first that is decoded
PROBE_BYTES = 1 << 30
PROBE_SECONDS = 0.25
AGREE = 0.10  # two probes that differ by more enclose a decode that says nothing about the machine
COLD = 4  # weights of fewer than COLD times the last cache are partly read from it

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Speed:
    """What a model reached. Rates are medians over the repetitions, ``_range`` their least and greatest.

    ``prefill_tps`` and ``decode_tps`` are tokens per second. ``decode_gbps`` is ``weight_bytes_per_token`` (the
    packed bytes of every matrix that a token multiplies with, a tied table once, one row of an untied embedding)
    plus ``kv_bytes_per_token`` (keys and values of the mean context), times the decode rate, in 1e9 bytes per
    second. ``bandwidth_gbps`` is the probe's, ``bandwidth_fraction`` the median over repetitions of decode_gbps
    by the mean of the probes around it, None when each was dropped; ``dropped`` counts repetitions whose two
    probes differ by more than 10 %. ``peak_rss_mb`` is the most memory (1e6 bytes) that the process has had,
    loading included, the probe not. ``load_s`` is None for a model that was not loaded from a file.
    ``weight_bytes`` are those of all packed matrices, ``cache_bytes`` is the last cache's size where known.
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
    load_s: float | None
    peak_rss_mb: float | None
    cache_bytes: int | None
    unfused_sites: dict[str, str]
    protocol: str
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Everything as a dictionary that ``json.dumps`` takes."""
        return asdict(self)


@dataclass(frozen=True)
class _Repetition:
    """Seconds of prefill and decode, and the probe in GB/s before and after the decode."""

    prefill_s: float
    decode_s: float
    before: float
    after: float

    @property
    def probe(self) -> float:
        return (self.before + self.after) / 2

    @property
    def steady(self) -> bool:
        return abs(self.before - self.after) <= AGREE * max(self.before, self.after)


def bench(
    model: LLM | Loaded,
    *,
    name: str | None = None,
    threads: int | None = None,
    prefill: int = 512,
    decode: int = 128,
    repetitions: int = 5,
    progress: Progress | None = None,
) -> Speed:
    """Measures a loaded model, or the random one of ``shape_model``, with ``threads`` threads (None: as set).

    A repetition runs a prompt of ``prefill`` random tokens into an empty context up to the first new token, then,
    in another empty context, a prompt of 16 tokens and ``decode`` single steps (logits and greedy choice included),
    which alone are timed, between two bandwidth probes. One repetition more goes first, untimed. Weights are cold
    in so far as they do not fit into the last cache; a note says so when they nearly do.

    Raises UsageError for lengths that the model does not have and ResourceError when the probe gets no memory.
    """
    loaded = model.loaded if isinstance(model, LLM) else model
    config = loaded.transformer.config
    if prefill < 1 or decode < 1 or repetitions < 1:
        raise UsageError(
            f"{prefill} tokens of prefill, {decode} of decode and {repetitions} repetitions: each must be at least 1."
        )
    longest = max(prefill, PROMPT + decode)
    if longest > config.context:
        raise UsageError(f"a context of {longest} tokens is needed, but the model was made for {config.context}.")
    fmt = model.kv_format if isinstance(model, LLM) else "f16"
    load_average, before = os.getloadavg()[0], ops.threads()
    if threads is not None:
        ops.set_threads(threads)
    try:
        run = _Runner(loaded, longest, fmt, prefill, decode)
        run.prefill()
        run.decode(min(decode, 4))
        peak = _peak_rss_mb()
        done: list[_Repetition] = []
        for _ in range(repetitions):
            done.append(_Repetition(run.prefill(), *run.probed_decode()))
            if progress:
                progress(len(done), repetitions)
        used = ops.threads()
    finally:
        ops.probe_release()
        ops.set_threads(before)

    weight_bytes, kv_bytes = _weight_bytes_per_token(loaded), _kv_bytes_per_token(loaded, fmt, PROMPT + decode / 2)
    steady = [r for r in done if r.steady]
    gbps = [(weight_bytes + kv_bytes) * decode / r.decode_s / 1e9 for r in done]
    fractions = [g / r.probe for g, r in zip(gbps, done) if r.steady]
    prefills, decodes = [prefill / r.prefill_s for r in done], [decode / r.decode_s for r in done]
    cache = _last_cache_bytes()
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
        prefill_tps=statistics.median(prefills),
        prefill_tps_range=(min(prefills), max(prefills)),
        decode_tps=statistics.median(decodes),
        decode_tps_range=(min(decodes), max(decodes)),
        weight_bytes_per_token=weight_bytes,
        kv_bytes_per_token=kv_bytes,
        decode_gbps=statistics.median(gbps),
        bandwidth_gbps=statistics.median(r.probe for r in steady or done),
        bandwidth_fraction=statistics.median(fractions) if fractions else None,
        dropped=repetitions - len(steady),
        load_s=model.load_s if isinstance(model, LLM) else None,
        peak_rss_mb=peak,
        cache_bytes=cache,
        unfused_sites=dict(loaded.unfused),
        protocol=(
            f"prefill of {prefill} tokens from an empty context to the first new token; decode of {decode} tokens "
            f"one by one after a prompt of {PROMPT}; medians of {repetitions} repetitions after one more."
        ),
        notes=_notes(weight_bytes, cache, repetitions, steady, load_average, used),
    )


def _notes(
    weight_bytes: int, cache: int | None, repetitions: int, steady: Sequence[_Repetition], load: float, threads: int
) -> list[str]:
    notes = []
    if cache is not None and weight_bytes < COLD * cache:
        notes.append(
            f"The weights ({weight_bytes / 1e6:.0f} MB) are less than {COLD} times the last cache "
            f"({cache / 1e6:.0f} MB), so a part of them is read from it and not from memory."
        )
    if not steady:
        notes.append(
            "Memory bandwidth changed by more than 10 % within every repetition, so there is no fraction; "
            "run again on a quieter machine."
        )
    elif len(steady) < repetitions:
        notes.append(f"{repetitions - len(steady)} of {repetitions} repetitions do not count towards the fraction.")
    if load > 0.5 * threads:
        notes.append(f"Other programs were running (load average {load:.1f} before the start).")
    return notes


class _Runner:
    """The timed loops over one model and one store of keys and values."""

    def __init__(self, loaded: Loaded, context: int, fmt: str, prefill: int, decode: int) -> None:
        self.transformer, self.steps = loaded.transformer, decode
        config = self.transformer.config
        random = np.random.default_rng(0)
        self.long = random.integers(0, config.vocab, prefill, dtype=np.int32)
        self.short = random.integers(0, config.vocab, PROMPT, dtype=np.int32)
        self.sequence = kv.Sequence(kv.KVPool(config, context, fmt))
        self.nothing = np.zeros(0, np.int32)

    def _next(self, tokens: I32) -> int:
        """Runs tokens after what the sequence holds and chooses the one that follows."""
        s = self.sequence
        s.reserve(len(tokens))
        for start in range(0, len(tokens), MAX_TOKENS):
            part = tokens[start : start + MAX_TOKENS]
            hidden = self.transformer.hidden(part, np.arange(s.length, s.length + len(part), dtype=np.int32), s)
            s.length += len(part)
        logits = self.transformer.logits(hidden[-1:])[0]
        token, _ = ops.sample(logits, self.nothing, 0.0, 0, 1.0, 0.0, 1.0, 0, 0)
        return token

    def prefill(self) -> float:
        """Seconds from a prompt to its first new token."""
        self.sequence.truncate(0)
        started = time.perf_counter()
        self._next(self.long)
        return time.perf_counter() - started

    def decode(self, steps: int) -> float:
        """Seconds of ``steps`` single steps after a short prompt."""
        self.sequence.truncate(0)
        token = self._next(self.short)
        started = time.perf_counter()
        for _ in range(steps):
            token = self._next(np.array([token], np.int32))
        return time.perf_counter() - started

    def probed_decode(self) -> tuple[float, float, float]:
        before = _probe()
        seconds = self.decode(self.steps)
        return seconds, before, _probe()


def _probe() -> float:
    try:
        return ops.read_bandwidth(PROBE_BYTES, PROBE_SECONDS)
    except ValueError as error:
        raise ResourceError(f"memory bandwidth cannot be measured: {error}.") from None


# ---------------------------------------------------------------- bytes


def _weight_bytes_per_token(loaded: Loaded) -> int:
    """Packed bytes that one token reads: all matrices, but one row of an embedding that is not the head too."""
    table = loaded.packed["model.embed_tokens"]
    if loaded.topology.tied:
        return loaded.weight_bytes
    return loaded.weight_bytes - table.nbytes + table.nbytes // table.shape[0]


def _kv_bytes_per_token(loaded: Loaded, fmt: str, context: float) -> int:
    """Bytes of keys and values that a token at position ``context`` reads; a sliding window bounds a layer's."""
    config = loaded.transformer.config
    per_key = kv.kv_bytes(config, kv.BLOCK, fmt) / kv.BLOCK / config.layers
    return round(per_key * sum(min(context, window or context) for window in config.windows))


def _peak_rss_mb() -> float | None:
    """The most resident memory this process has had, in 1e6 bytes; None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 / 1e6 if match else None


def _last_cache_bytes() -> int | None:
    """Size of the largest cache of the first processor, None where the system does not tell."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        try:
            match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text(encoding="ascii").strip())
        except (OSError, UnicodeDecodeError):
            continue
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=None)
