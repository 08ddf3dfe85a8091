"""What a model says about itself once: its linear sites, what they share, and what feeds what.

Solvers, transforms, allocators, loaders and the planner read this and never name an architecture. Names are
those of Hugging Face checkpoints without ``.weight``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gossamer.models.config import Config

__all__ = ["Attention", "Gated", "Site", "Stream", "Topology", "Vector", "describe"]


@dataclass(frozen=True)
class Site:
    """A linear map W [rows, cols].

    ``role`` is one of embed, q, k, v, o, gate, up, down, head. Sites with the same ``shares`` read the same input.
    """

    name: str
    role: str
    layer: int | None
    rows: int
    cols: int
    shares: str
    bias: bool = False


@dataclass(frozen=True)
class Vector:
    """A float vector kept as it is: a norm's gain over ``size`` elements."""

    name: str
    role: str
    layer: int | None
    size: int


@dataclass(frozen=True)
class Attention:
    """One layer's attention: its sites, and how their channels belong together.

    Query head i reads the keys and values of head i // ``group``. Rotary positions turn channel j of a head together
    with channel j + head_dim / 2. ``q_norm`` and ``k_norm`` are gains over one head, between projection and rotation.
    """

    layer: int
    q: str
    k: str
    v: str
    o: str
    heads: int
    kv_heads: int
    head_dim: int
    q_norm: str | None = None
    k_norm: str | None = None

    @property
    def group(self) -> int:
        """Query heads for each head of keys and values."""
        return self.heads // self.kv_heads

    def spread(self, values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Values for each channel of all key-value heads, repeated for the channels of all query heads."""
        per_head = values.reshape(self.kv_heads, -1, *values.shape[1:])
        return np.repeat(per_head, self.group, axis=0).reshape(-1, *values.shape[1:])

    def by_kv(self, values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Values for each channel of all query heads as [kv_heads, group, head_dim]."""
        return values.reshape(self.kv_heads, self.group, self.head_dim)


@dataclass(frozen=True)
class Gated:
    """One layer's gated MLP: down(act(gate(x)) * up(x)). Channels of gate and up may only move together."""

    layer: int
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Stream:
    """The residual stream: every layer adds to it and reads it through a norm.

    ``writers`` are the sites whose output is added; the embedding table is the first. ``readers`` lists (norm, sites
    that read the stream through it). ``posts`` lists (site, norm) where a norm stands between a writer and the stream.
    """

    writers: tuple[str, ...]
    readers: tuple[tuple[str, tuple[str, ...]], ...]
    posts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Topology:
    """All sites and vectors in execution order.

    ``feeds`` lists (producer, consumers): scaling an output channel of the producer by c and the matching input
    column of every consumer by 1/c leaves the function unchanged. The columns match one to one, save where the
    producer is the values of an ``Attention``: there they are ``Attention.spread``.
    """

    sites: tuple[Site, ...]
    vectors: tuple[Vector, ...]
    feeds: tuple[tuple[str, tuple[str, ...]], ...]
    tied: bool
    attention: tuple[Attention, ...]
    mlps: tuple[Gated, ...]
    stream: Stream

    def site(self, name: str) -> Site:
        return self._by_name[name]

    def values_of(self, producer: str) -> Attention | None:
        """The attention whose values ``producer`` makes, if it does."""
        return next((a for a in self.attention if a.v == producer), None)

    @property
    def _by_name(self) -> dict[str, Site]:
        return {s.name: s for s in self.sites}

    @property
    def parameters(self) -> int:
        """All stored numbers, norms and biases included; a tied table counts once."""
        return sum(s.rows * s.cols for s in self.sites) + self.vector_bytes // 4

    @property
    def vector_bytes(self) -> int:
        """Bytes of norms and biases, which are kept in float32."""
        return 4 * (sum(v.size for v in self.vectors) + sum(s.rows for s in self.sites if s.bias))


def describe(c: Config) -> Topology:
    """The topology of a decoder: attention and a gated MLP per layer, RMSNorm before (and after) each."""
    sites = [Site("model.embed_tokens", "embed", None, c.vocab, c.hidden, "tokens")]
    vectors: list[Vector] = []
    feeds: list[tuple[str, tuple[str, ...]]] = []
    attentions: list[Attention] = []
    mlps: list[Gated] = []
    writers, posts = ["model.embed_tokens"], []
    readers: list[tuple[str, tuple[str, ...]]] = []
    q_size, kv_size = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for i in range(c.layers):
        base = f"model.layers.{i}"
        attention, mlp = f"{base}.self_attn", f"{base}.mlp"

        def site(name: str, role: str, rows: int, cols: int, shares: str, layer: int = i) -> Site:
            return Site(name, role, layer, rows, cols, shares, role in c.biased or name in c.biased)

        sites += [
            site(f"{attention}.q_proj", "q", q_size, c.hidden, f"{attention}.input"),
            site(f"{attention}.k_proj", "k", kv_size, c.hidden, f"{attention}.input"),
            site(f"{attention}.v_proj", "v", kv_size, c.hidden, f"{attention}.input"),
            site(f"{attention}.o_proj", "o", c.hidden, q_size, f"{attention}.context"),
            site(f"{mlp}.gate_proj", "gate", c.ffn, c.hidden, f"{mlp}.input"),
            site(f"{mlp}.up_proj", "up", c.ffn, c.hidden, f"{mlp}.input"),
            site(f"{mlp}.down_proj", "down", c.hidden, c.ffn, f"{mlp}.hidden"),
        ]
        before_mlp = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
        vectors.append(Vector(f"{base}.input_layernorm", "attn_norm", i, c.hidden))
        if c.qk_norm:
            vectors.append(Vector(f"{attention}.q_norm", "q_norm", i, c.head_dim))
            vectors.append(Vector(f"{attention}.k_norm", "k_norm", i, c.head_dim))
        if c.post_norms:
            vectors.append(Vector(f"{base}.post_attention_layernorm", "attn_post_norm", i, c.hidden))
        vectors.append(Vector(f"{base}.{before_mlp}", "mlp_norm", i, c.hidden))
        if c.post_norms:
            vectors.append(Vector(f"{base}.post_feedforward_layernorm", "mlp_post_norm", i, c.hidden))
        q, k, v, o = (f"{attention}.{p}_proj" for p in "qkvo")
        gate, up, down = (f"{mlp}.{p}_proj" for p in ("gate", "up", "down"))
        norms = (f"{attention}.q_norm", f"{attention}.k_norm") if c.qk_norm else (None, None)
        attentions.append(Attention(i, q, k, v, o, c.heads, c.kv_heads, c.head_dim, *norms))
        mlps.append(Gated(i, gate, up, down))
        into = [(f"{base}.input_layernorm", (q, k, v)), (f"{base}.{before_mlp}", (gate, up))]
        feeds += [into[0], (v, (o,)), into[1], (up, (down,))]
        readers += into
        writers += [o, down]
        if c.post_norms:
            posts += [(o, f"{base}.post_attention_layernorm"), (down, f"{base}.post_feedforward_layernorm")]
    vectors.append(Vector("model.norm", "final_norm", None, c.hidden))
    if not c.tied:
        sites.append(Site("lm_head", "head", None, c.vocab, c.hidden, "head.input", "lm_head" in c.biased))
        feeds.append(("model.norm", ("lm_head",)))
    readers.append(("model.norm", ("model.embed_tokens" if c.tied else "lm_head",)))
    stream = Stream(tuple(writers), tuple(readers), tuple(posts))
    return Topology(tuple(sites), tuple(vectors), tuple(feeds), c.tied, tuple(attentions), tuple(mlps), stream)
