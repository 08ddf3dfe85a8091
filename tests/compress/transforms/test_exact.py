"""Every transform that is folded leaves the logits as they were, in every family and in both real models."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from transform_cases import FAMILIES, TOLERANCE, distance, logits, made_up, original

from gossamer.compress.edits import Edited
from gossamer.compress.transforms import (
    FoldNorms,
    OnlineHadamard,
    OnlineOrder,
    OnlineScale,
    OrderChannels,
    OrderStream,
    RotateStream,
    Transform,
    apply_all,
    awq_scales,
    equalise,
    rescale,
    rotate_values,
    smooth,
    smooth_attention,
    smooth_outliers,
    smooth_searched,
    sort_channels,
)
from gossamer.errors import UsageError
from gossamer.formats import ArraySource, encode, encode_with, parse, parse_weight
from gossamer.formats.dispatch import make_runner
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.topology import Site
from gossamer.models.transformer import Transformer

Open = Callable[[str], Checkpoint]


def coarse(site: Site, w: np.ndarray) -> np.ndarray:
    return encode(parse_weight("int3/row"), ArraySource(w)).decode()


def stream_order(edited: Edited) -> list[Transform]:
    return [OrderStream(np.random.default_rng(5).permutation(edited.config.hidden))]


def mixed(edited: Edited) -> list[Transform]:
    """Several on the same sites, in turn."""
    topology, stats = edited.topology, made_up(edited.topology)
    first = [*rescale(topology, 3), *rotate_values(topology), *stream_order(edited)]
    apply_all(first, edited)
    second = [*sort_channels(edited, stats, places=("hidden",)), *smooth_attention(edited, stats), *equalise(edited)]
    apply_all(second, edited)
    return smooth(edited, stats, places=("norm", "hidden"))


FOLDED: dict[str, Callable[[Edited], list[Transform]]] = {
    "rescale": lambda e: rescale(e.topology),
    "smooth": lambda e: smooth(e, made_up(e.topology), 0.6),
    "smooth, alpha and beta": lambda e: smooth(e, made_up(e.topology), 0.3, 0.7),
    "smooth outliers": lambda e: smooth_outliers(e, made_up(e.topology)),
    "smooth, searched": lambda e: smooth_searched(e, made_up(e.topology), coarse, alphas=(0.7,)),
    "awq": lambda e: awq_scales(e, made_up(e.topology), coarse, points=2),
    "equalise": equalise,
    "rotate values": lambda e: rotate_values(e.topology),
    "rotate values, signs": lambda e: rotate_values(e.topology, seed=11),
    "smooth attention": lambda e: smooth_attention(e, made_up(e.topology)),
    "sort channels": lambda e: sort_channels(e, made_up(e.topology)),
    "order stream": stream_order,
    "fold norms": lambda e: [FoldNorms()],
    "fold norms, untied": lambda e: [FoldNorms(untie=True)],
    "mixed": mixed,
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", FOLDED)
def test_small_models_of_every_family(kind: str, name: str, open_tiny: Open) -> None:
    checkpoint = open_tiny(name)
    edited = Edited(checkpoint)
    transforms = FOLDED[kind](edited)
    assert transforms
    apply_all(transforms, edited)
    changed = sum(edited._mapped(s) for s in edited.topology.sites)
    assert changed >= checkpoint.config.layers or "attention" in kind
    assert distance(checkpoint, edited) < TOLERANCE
    assert edited.log[-1] == transforms[-1].describe()


@pytest.mark.parametrize("kind", ["mixed", "awq", "equalise", "smooth attention", "fold norms, untied"])
def test_real_weights(kind: str, smollm2: Checkpoint, gemma3: Checkpoint) -> None:
    for checkpoint in (smollm2, gemma3):
        edited = Edited(checkpoint)
        apply_all(FOLDED[kind](edited), edited)
        assert distance(checkpoint, edited) < TOLERANCE


@pytest.mark.parametrize("name", [n for n in FAMILIES if "Gemma" not in n])
@pytest.mark.parametrize("block", [None, 8])
def test_the_residual_stream_turns_where_no_norm_forbids_it(name: str, block: int | None, open_tiny: Open) -> None:
    checkpoint = open_tiny(name)
    edited = Edited(checkpoint)
    if checkpoint.config.tied:
        with pytest.raises(UsageError, match="stores the table twice"):
            RotateStream(block).apply(edited)
    RotateStream(block, untie=True).apply(edited)
    assert not edited.topology.tied
    assert distance(checkpoint, edited) < TOLERANCE
    # A matrix of one's own, on top of it.
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((edited.config.hidden,) * 2))
    RotateStream(matrix=q).apply(edited)
    assert distance(checkpoint, edited) < TOLERANCE


def test_the_residual_stream_of_smollm2(smollm2: Checkpoint) -> None:
    edited = Edited(smollm2)
    RotateStream(untie=True).apply(edited)
    assert distance(smollm2, edited) < TOLERANCE
    assert all(np.array_equal(edited.vector(v), np.ones(v.size)) for v in edited.topology.vectors)


def test_a_stream_behind_norms_is_not_turned(open_tiny: Open) -> None:
    edited = Edited(open_tiny("Gemma 3, window of 24"))
    with pytest.raises(UsageError, match="stands between each block and the stream"):
        RotateStream(untie=True).apply(edited)
    assert not edited.log
    assert edited.topology.tied


# ---------------------------------------------------------------- online


@pytest.mark.parametrize("name", ["Llama, biases", "Gemma 3, window of 24"])
def test_online_transforms_give_the_same_logits(name: str, open_tiny: Open) -> None:
    checkpoint = open_tiny(name)
    topology, c = checkpoint.topology, checkpoint.config
    random = np.random.default_rng(2)
    online: list[Transform] = [
        OnlineHadamard("mlp.hidden"),
        OnlineHadamard("self_attn.context", c.head_dim, seed=4),
        OnlineOrder("mlp.input", random.permutation(c.hidden)),
        OnlineScale("self_attn.input", np.exp(random.uniform(-1, 1, c.hidden)).astype(np.float32)),
    ]
    edited = apply_all(online, Edited(checkpoint))
    assert len(edited.log) == 4
    runners, kinds = {}, set()
    for site in topology.sites:
        fmt, hints = parse("f32 @ f32"), {}
        for transform in online:
            fmt = transform.format(site, fmt)
            hints |= transform.hints(site)
        kinds.add(str(fmt).split("(")[0])
        w = edited.source(site).read(0, site.rows)
        runners[site.name] = make_runner(encode_with(fmt.weight, w, hints), fmt, checkpoint.bias(site))
    assert {"hadamard", "permute", "scale"} <= kinds
    vectors = {v.name: checkpoint.vector(v) for v in topology.vectors}
    assert np.abs(run(Transformer(c, runners, vectors)) - original(checkpoint)).max() < TOLERANCE


def run(model: Transformer) -> np.ndarray:
    from transform_cases import TOKENS

    from gossamer.engine.kv import KVPool, Sequence, kv_format

    sequence = Sequence(KVPool(model.config, 128, kv_format("f32"), sequences=1))
    sequence.reserve(len(TOKENS))
    ids = np.array(TOKENS, np.int32)
    return model.logits(model.hidden(ids, np.arange(len(ids), dtype=np.int32), sequence))


def test_what_is_folded_is_not_in_the_expression(open_tiny: Open) -> None:
    checkpoint = open_tiny("Qwen3, as many heads")
    site, fmt = checkpoint.topology.site("model.layers.0.mlp.down_proj"), parse("int4/row @ int8/token")
    for transform in rotate_values(checkpoint.topology):
        assert transform.folded
        assert transform.format(site, fmt) == fmt
    assert not OnlineHadamard("mlp.hidden").folded
    assert str(OnlineHadamard("mlp.hidden").format(site, fmt)) == "hadamard(full, none, int4/row) @ int8/token"
    assert OnlineHadamard("mlp.input").format(site, fmt) == fmt
    assert str(OnlineHadamard("down", 8).format(site, fmt)) == str(fmt)  # a role is no input


# ---------------------------------------------------------------- a transform of the wrong place


def test_places_that_do_not_exist(open_tiny: Open) -> None:
    checkpoint = open_tiny("Llama, tied table")
    edited, stats = Edited(checkpoint), made_up(checkpoint.topology)
    with pytest.raises(UsageError, match="'mlp' is no place"):
        smooth(edited, stats, places=("mlp",))
    with pytest.raises(UsageError, match="cannot be reordered alone"):
        OrderChannels("model.layers.0.mlp.gate_proj", np.arange(104)).apply(edited)
    with pytest.raises(UsageError, match="must name each of them once"):
        OrderChannels("model.layers.0.mlp.up_proj", np.zeros(104, np.int64)).apply(edited)
    with pytest.raises(UsageError, match="out of their runs of 12"):
        OrderChannels("model.layers.0.self_attn.v_proj", np.roll(np.arange(24), 1)).apply(edited)
    with pytest.raises(UsageError, match="out of range"):
        smooth(edited, stats, 1.5)
    with pytest.raises(UsageError, match="calibrate this model anew"):
        smooth(edited, dict(zip(stats, reversed(stats.values()))), places=("hidden",))
    with pytest.raises(UsageError, match="range must be positive"):
        rescale(checkpoint.topology, low=0)
    assert np.array_equal(logits(edited), original(checkpoint))
