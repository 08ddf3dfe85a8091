"""What belongs together in a layer, as transforms read it."""

from __future__ import annotations

import numpy as np
import pytest

from gossamer.models.config import Config, Rope
from gossamer.models.topology import describe


def config(**changes: object) -> Config:
    sizes = {"vocab": 32, "hidden": 24, "layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 4, "ffn": 40, "context": 64}
    both = {"ropes": (Rope(1e4),) * 2, "windows": (0, 0)}
    return Config(**{"family": "llama", "norm_eps": 1e-5, **sizes, **both, **changes})


def test_heads_share_values() -> None:
    attention = describe(config()).attention[1]
    assert (attention.layer, attention.group) == (1, 3)
    assert attention.v == "model.layers.1.self_attn.v_proj"
    assert (attention.q_norm, attention.k_norm) == (None, None)
    spread = attention.spread(np.arange(8))
    assert spread.tolist() == [0, 1, 2, 3] * 3 + [4, 5, 6, 7] * 3
    assert (attention.by_kv(spread) == np.arange(8).reshape(2, 1, 4)).all()
    t = describe(config())
    assert t.values_of(attention.v) is t.attention[1]
    assert t.values_of(attention.o) is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("post_norms", [False, True])
def test_everything_that_meets_the_stream(tied: bool, post_norms: bool) -> None:
    t = describe(config(tied=tied, post_norms=post_norms, qk_norm=post_norms))
    sites, vectors = {s.name: s for s in t.sites}, {v.name for v in t.vectors}
    assert len(t.stream.writers) == 1 + 2 * 2
    assert [sites[w].role for w in t.stream.writers] == ["embed", "o", "down", "o", "down"]
    readers = [name for _, consumers in t.stream.readers for name in consumers]
    assert [sites[r].role for r in readers] == ["q", "k", "v", "gate", "up"] * 2 + ["embed" if tied else "head"]
    named = {norm for norm, _ in (*t.stream.readers,)} | {norm for _, norm in t.stream.posts}
    heads = {a.q_norm for a in t.attention} | {a.k_norm for a in t.attention}
    assert named | (heads - {None}) == vectors  # every norm has one place
    assert len(t.stream.posts) == (4 if post_norms else 0)
    assert [m.down for m in t.mlps] == [w for w in t.stream.writers if "down" in w]


def test_a_site_may_have_a_bias_of_its_own() -> None:
    own = "model.layers.1.mlp.up_proj"
    c = config(biased=frozenset({"q", own, "lm_head"}))
    biased = {s.name for s in describe(c).sites if s.bias}
    assert biased == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)} | {own, "lm_head"}
    assert c.own_biases == {own, "lm_head"}
    assert c.plain.biased == {"q"}
