"""What a model says about itself once: its linear sites, what they share, and what feeds what.

Solvers, transforms, allocators, loaders and the planner read this and never name an architecture. Names are
those of Hugging Face checkpoints without ``.weight``.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.models.config import Config

__all__ = ["Site", "Topology", "Vector", "describe"]


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
class Topology:
    """All sites and vectors in execution order.

    ``feeds`` lists (producer, consumers): scaling an output channel of the producer by c and the matching input
    column of every consumer by 1/c leaves the function unchanged.
    """

    sites: tuple[Site, ...]
    vectors: tuple[Vector, ...]
    feeds: tuple[tuple[str, tuple[str, ...]], ...]
    tied: bool

    def site(self, name: str) -> Site:
        return self._by_name[name]

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
    q_size, kv_size = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for i in range(c.layers):
        base = f"model.layers.{i}"
        attention, mlp = f"{base}.self_attn", f"{base}.mlp"

        def site(name: str, role: str, rows: int, cols: int, shares: str, layer: int = i) -> Site:
            return Site(name, role, layer, rows, cols, shares, role in c.biased)

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
        feeds += [
            (f"{base}.input_layernorm", tuple(f"{attention}.{p}_proj" for p in "qkv")),
            (f"{attention}.v_proj", (f"{attention}.o_proj",)),
            (f"{base}.{before_mlp}", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
            (f"{mlp}.up_proj", (f"{mlp}.down_proj",)),
        ]
    vectors.append(Vector("model.norm", "final_norm", None, c.hidden))
    if not c.tied:
        sites.append(Site("lm_head", "head", None, c.vocab, c.hidden, "head.input"))
        feeds.append(("model.norm", ("lm_head",)))
    return Topology(tuple(sites), tuple(vectors), tuple(feeds), c.tied)
