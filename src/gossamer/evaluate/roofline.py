"""The least time that a step can take on this machine: bytes at the bandwidth, multiply-adds at their peak.

Probes measure both with the same threads just before and just after what is timed, for they change from one second
to the next on a shared machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gossamer import ops
from gossamer.engine import kv
from gossamer.errors import ResourceError
from gossamer.formats.dispatch import Runner
from gossamer.models.load import Loaded
from gossamer.models.transformer import MAX_TOKENS

__all__ = [
    "Peaks",
    "Work",
    "arithmetic",
    "decode_work",
    "kv_bytes_per_token",
    "prefill_work",
    "probe",
    "weight_bytes",
]

PROBE_BYTES = 1 << 30
PROBE_SECONDS = 0.25
DOT_SECONDS = 0.02
AGREE = 0.10  # two probes that differ by more enclose a time that says nothing about the machine


@dataclass(frozen=True)
class Peaks:
    """What all threads reach: ``bandwidth`` in 1e9 bytes/s read; the rest in 1e9 operations/s, 2 per multiply-add."""

    bandwidth: float
    int8: float
    bf16: float
    f32: float

    def of(self, name: str) -> float:
        """The figure of that name: "bandwidth", "int8", "bf16" or "f32"."""
        return float(getattr(self, name))

    def between(self, other: Peaks) -> Peaks:
        """The mean of two probes."""
        return Peaks(*((getattr(self, n) + getattr(other, n)) / 2 for n in Peaks.__dataclass_fields__))

    def agree(self, other: Peaks, name: str) -> bool:
        """Whether a figure changed by at most 10 % from one probe to the other."""
        a, b = self.of(name), other.of(name)
        return abs(a - b) <= AGREE * max(a, b)


def probe() -> Peaks:
    """Measures now. The memory of the bandwidth probe is kept until ``ops.probe_release``."""
    try:
        bandwidth = ops.read_bandwidth(PROBE_BYTES, PROBE_SECONDS)
    except ValueError as error:
        raise ResourceError(f"memory bandwidth cannot be measured: {error}.") from None
    return Peaks(bandwidth, *(ops.dot_peak(kind, DOT_SECONDS) for kind in ("int8", "bf16", "f32")))


@dataclass(frozen=True)
class Work:
    """What a step does at least: ``bytes`` read, and multiply-adds by the kind of their instruction."""

    bytes: int
    macs: Mapping[str, int]

    def bound(self, peaks: Peaks) -> tuple[float, str]:
        """Seconds that the step takes at least, and what sets them: "bandwidth" or the kind that takes longest.

        Reading and multiplying overlap, so the longer of the two counts; multiply-adds of several kinds add up.
        """
        memory = self.bytes / peaks.bandwidth / 1e9
        parts = {kind: 2 * n / peaks.of(kind) / 1e9 for kind, n in self.macs.items()}
        if memory >= sum(parts.values()):
            return memory, "bandwidth"
        return sum(parts.values()), max(parts, key=lambda kind: parts[kind])


def arithmetic(runner: Runner) -> dict[str, int]:
    """Multiply-adds of a site for one token, by what multiplies: int8, bf16 or f32."""
    macs: dict[str, int] = {}
    for leaf in runner.leaves:
        kind = "f32" if leaf.path == "sparse" else leaf.path
        macs[kind] = macs.get(kind, 0) + leaf.macs
    return macs


def decode_work(loaded: Loaded, batch: int, context: float, fmt: str) -> Work:
    """One step of ``batch`` sequences, each after ``context`` tokens: every matrix once, each one's keys and values.

    Attention's arithmetic is left out.
    """
    macs = _macs(loaded, body=batch, head=batch)
    return Work(weight_bytes(loaded, batch) + batch * kv_bytes_per_token(loaded, fmt, context), macs)


def prefill_work(loaded: Loaded, tokens: int, fmt: str) -> Work:
    """A prompt of ``tokens`` tokens into an empty context, logits of the last one only; attention is left out."""
    calls = -(-tokens // MAX_TOKENS)
    return Work(loaded.weight_bytes * calls, _macs(loaded, body=tokens, head=1))


def weight_bytes(loaded: Loaded, batch: int = 1) -> int:
    """Packed bytes that a step reads: all matrices, of an embedding that is not the head too ``batch`` rows."""
    if loaded.topology.tied:
        return loaded.weight_bytes
    table = loaded.packed["model.embed_tokens"]
    return loaded.weight_bytes - table.nbytes + batch * (table.nbytes // table.shape[0])


def kv_bytes_per_token(loaded: Loaded, fmt: str, context: float) -> int:
    """Bytes of keys and values that a token at position ``context`` reads; a sliding window bounds a layer's."""
    config = loaded.transformer.config
    per_key = kv.kv_bytes(config, kv.BLOCK, fmt) / kv.BLOCK / config.layers
    return round(per_key * sum(min(context, window or context) for window in config.windows))


def _macs(loaded: Loaded, body: int, head: int) -> dict[str, int]:
    macs: dict[str, int] = {}
    last = "model.embed_tokens" if loaded.topology.tied else "lm_head"
    for name in loaded.packed:
        if name == "model.embed_tokens" and name != last:
            continue
        for kind, count in arithmetic(loaded.transformer.runners[name]).items():
            macs[kind] = macs.get(kind, 0) + count * (head if name == last else body)
    return macs
