"""What a decoder is, in one frozen value: sizes, norms, positions, and what differs from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import CheckpointError, UnsupportedError

__all__ = ["Config", "Fields", "Rope"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions: base ``theta`` and how the frequencies are scaled.

    ``kind`` is "default", "linear" (all frequencies divided by ``factor``) or "llama3" (Llama 3.1: only the
    wavelengths longer than ``original_context`` / ``low`` are divided, those shorter than / ``high`` are kept, a
    linear blend between).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192
    divisors: tuple[float, ...] = ()  # one per frequency, as Llama 3.x GGUF files carry them

    def inverse_frequencies(self, head_dim: int) -> npt.NDArray[np.float32]:
        """float32 [head_dim / 2]: radians per position."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        inverse = (np.float32(1) / np.float32(self.theta) ** exponent).astype(np.float32)
        if self.divisors:
            return (inverse / np.array(self.divisors, np.float32)).astype(np.float32)
        if self.kind == "linear":
            return (inverse / np.float32(self.factor)).astype(np.float32)
        if self.kind == "llama3":
            wavelength = 2 * math.pi / inverse
            smooth = (self.original_context / wavelength - self.low) / (self.high - self.low)
            blend = (1 - smooth) * inverse / self.factor + smooth * inverse
            long = wavelength > self.original_context / self.low
            short = wavelength < self.original_context / self.high
            return np.where(long, inverse / self.factor, np.where(short, inverse, blend)).astype(np.float32)
        return inverse


@dataclass(frozen=True)
class Config:
    """A decoder-only transformer. Lengths are in elements; ``windows`` and ``ropes`` have one entry per layer."""

    family: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    context: int
    norm_eps: float
    ropes: tuple[Rope, ...]
    windows: tuple[int, ...]  # keys a query sees, itself included; 0 means all
    activation: str = "silu"  # gate activation: "silu", "gelu" or "gelu_tanh"
    tied: bool = False  # the head is the embedding table
    qk_norm: bool = False  # RMSNorm over each head of q and k
    post_norms: bool = False  # RMSNorm after attention and after the MLP, before the residual sum
    norm_plus_one: bool = False  # files store gain - 1
    embed_scale: float = 1.0
    attn_scale: float = 0.0  # 0: 1 / sqrt(head_dim)
    biased: frozenset[str] = field(default_factory=frozenset)  # linear sites that have a bias: roles, names

    def __post_init__(self) -> None:
        check_sizes({name: getattr(self, name) for name in SIZES}, "the model's configuration")
        if not len(self.ropes) == len(self.windows) == self.layers:
            raise CheckpointError(
                f"the model's configuration has {self.layers} layers, {len(self.ropes)} RoPEs and "
                f"{len(self.windows)} windows; there must be one of each for every layer."
            )
        for rope in set(self.ropes):
            if rope.divisors and len(rope.divisors) != self.head_dim // 2:
                raise CheckpointError(
                    f"the model's configuration has {len(rope.divisors)} RoPE divisors for a head size of "
                    f"{self.head_dim}; there must be one for each pair."
                )

    @property
    def own_biases(self) -> frozenset[str]:
        """Sites that have a bias though their role has none: somebody gave them one."""
        return frozenset(name for name in self.biased if name not in ROLES)

    @property
    def plain(self) -> Config:
        """The configuration without what no config.json can say."""
        return replace(self, biased=self.biased - self.own_biases)

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return self.attn_scale or 1 / math.sqrt(self.head_dim)


ROLES = ("embed", "q", "k", "v", "o", "gate", "up", "down", "head")
SIZES = ("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "context", "norm_eps")
_MOST = 1 << 28  # far above any real size, and far below what overflows
_MOST_LAYERS = 4096  # each layer is described by some twenty values


def check_sizes(sizes: Mapping[str, Any], where: str) -> None:
    """Refuses ``SIZES`` that no model has, before anything is made from them."""
    for name in SIZES[:-1]:
        if not 1 <= sizes[name] <= (_MOST_LAYERS if name == "layers" else _MOST):
            raise CheckpointError(
                f"{where} gives {name} = {shown(sizes[name])}, which cannot be right; check the file."
            )
    heads, kv_heads, head_dim, eps = sizes["heads"], sizes["kv_heads"], sizes["head_dim"], sizes["norm_eps"]
    if heads % kv_heads:
        raise CheckpointError(
            f"{where} has {heads} heads and {kv_heads} key-value heads, which do not divide them; check the file."
        )
    if head_dim % 2:
        raise UnsupportedError(f"{where} has heads of {head_dim} elements, and rotary positions need pairs of them.")
    if not (eps >= 0 and math.isfinite(eps)):
        raise CheckpointError(f"{where} gives a norm epsilon of {eps}, which cannot be right; check the file.")


class Fields:
    """Typed reading of a configuration: a missing or mistyped entry is an error that names it."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        value = self.data.get(key)
        if value is None:
            if default is ...:
                raise CheckpointError(f"{self.where} has no '{key}', which this architecture needs.")
            return default
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(
                f"{self.where} has '{key}' = {shown(value)}, which should be of type {kind.__name__}."
            )
        return value

    def integer(self, key: str, default: Any = ...) -> int:
        return int(self.get(key, int, default))

    def count(self, key: str, default: Any = ...) -> int:
        """An integer of at least 1."""
        value = self.integer(key, default)
        if not 1 <= value <= _MOST:
            raise CheckpointError(f"{self.where} has '{key}' = {shown(value)}, which must be between 1 and {_MOST}.")
        return value

    def number(self, key: str, default: Any = ...) -> float:
        """A finite number."""
        value = self.get(key, float, default)
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise CheckpointError(f"{self.where} has '{key}' = {value}, which should be a finite number.")
        return float(value)

    def positive(self, key: str, default: Any = ...) -> float:
        """A finite number above zero."""
        value = self.number(key, default)
        if not value > 0:
            raise CheckpointError(f"{self.where} has '{key}' = {value:g}, which must be above 0.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.get(key, bool, default))

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses a value that this architecture's code does not implement."""
        value = self.data.get(key)
        # Compared one by one: an array of a GGUF file has no single truth value.
        if value is not None and (isinstance(value, np.ndarray) or value not in allowed):
            raise UnsupportedError(
                f"{self.where} has '{key}' = {shown(value)}, which is not supported here; it can be {allowed[0]!r}."
            )


def shown(value: Any) -> str:
    """A value from the file, fit for a one-line message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def rope_from(entry: Any, theta: float, context: int, where: str) -> Rope:
    """A Hugging Face ``rope_scaling`` or ``rope_parameters`` entry; ``theta`` is used when it states no base."""
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{where} has a RoPE entry {shown(entry)}, which should be an object in braces.")
    fields = Fields(entry, where)
    fields.only("partial_rotary_factor", 1.0)
    kind = fields.get("rope_type", str, fields.get("type", str, "default"))
    theta = fields.positive("rope_theta", theta)
    divisors = tuple(fields.get("frequency_divisors", list, []))
    if not all(isinstance(d, float) and 0 < d < math.inf for d in divisors):
        raise CheckpointError(f"{where} has RoPE 'frequency_divisors' that are not positive numbers.")
    if kind == "default":
        return Rope(theta, divisors=divisors)
    factor = fields.positive("factor") if kind in ("linear", "llama3") else 1.0
    if kind == "linear":
        return Rope(theta, kind, factor)
    if kind == "llama3":
        low, high = fields.positive("low_freq_factor"), fields.positive("high_freq_factor")
        if not low < high:
            raise CheckpointError(
                f"{where} has 'low_freq_factor' = {low:g}, which must be below {high:g}, the high one."
            )
        return Rope(theta, kind, factor, low, high, fields.count("original_max_position_embeddings", context))
    raise UnsupportedError(f"{where} asks for RoPE scaling '{kind}'; default, linear and llama3 are supported.")


def rope_to(rope: Rope) -> dict[str, Any]:
    """The Hugging Face entry that ``rope_from`` reads back."""
    entry: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        entry["factor"] = rope.factor
    if rope.kind == "llama3":
        entry.update(
            low_freq_factor=rope.low,
            high_freq_factor=rope.high,
            original_max_position_embeddings=rope.original_context,
        )
    if rope.divisors:
        entry["frequency_divisors"] = list(rope.divisors)
    return entry
