"""Which scales the searches find: formulas by hand, and errors of real weights on tokens that were not searched on."""

from __future__ import annotations

import numpy as np
import pytest
from transform_cases import FAMILIES, made_up, statistics_of, write_tiny

from gossamer.compress.edits import Edited
from gossamer.compress.maps import Blocks, Diagonal, HadamardMap, Order
from gossamer.compress.statistics import Statistics
from gossamer.compress.transforms import (
    Migrate,
    apply_all,
    awq_scales,
    equalise,
    moved,
    rescale,
    rotate_values,
    smooth,
    smooth_attention,
    smooth_outliers,
    smooth_searched,
    sort_channels,
)
from gossamer.compress.transforms.keys import key_sizes
from gossamer.compress.transforms.ranges import column_absmax, read, row_absmax
from gossamer.formats import ArraySource, encode, parse_weight
from gossamer.models.checkpoint import Checkpoint, open_checkpoint
from gossamer.models.topology import Site

NORM, MLP = "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path_factory.mktemp("small") / "hf", FAMILIES["Llama, biases"]))


def nearest(text: str):
    fmt = parse_weight(text)
    return lambda site, w: encode(fmt, ArraySource(w)).decode()


def factors(found: list[Migrate]) -> dict[str, np.ndarray]:
    return {m.where: m.factors for m in found}


# ---------------------------------------------------------------- formulas


def test_smooth_by_hand(small: Checkpoint) -> None:
    edited, stats = Edited(small), made_up(small.topology)
    found = factors(smooth(edited, stats, 0.7))
    q, k, v, down = (
        read(small, small.topology.site(f"model.layers.0.{n}_proj"))
        for n in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.down")
    )
    w = np.abs(np.concatenate([q, k, v])).max(axis=0)
    a = stats["model.layers.0.self_attn.input"].absmax
    assert np.allclose(1 / found[NORM], a**0.7 / w**0.3)
    hidden = stats["model.layers.0.mlp.hidden"].absmax
    assert np.allclose(1 / found["model.layers.0.mlp.up_proj"], hidden**0.7 / np.abs(down).max(axis=0) ** 0.3)
    # Six query heads read two value heads: three columns of the output site share a factor.
    o = np.abs(read(small, small.topology.site("model.layers.0.self_attn.o_proj"))).max(axis=0).reshape(2, 3, 12)
    x = stats["model.layers.0.self_attn.context"].absmax.reshape(2, 3, 12)
    values = (x.max(axis=1) ** 0.7 / o.max(axis=1) ** 0.3).reshape(-1)
    assert np.allclose(1 / found["model.layers.0.self_attn.v_proj"], values)
    assert set(factors(smooth(edited, stats, places=("norm",)))) == {
        f"model.layers.{i}.{n}_layernorm" for i in range(3) for n in ("input", "post_attention")
    }
    only = {"model.layers.1.mlp.hidden": stats["model.layers.1.mlp.hidden"]}
    assert list(factors(smooth(edited, only))) == ["model.layers.1.mlp.up_proj"]


def test_smoothing_evens_out_the_inputs(small: Checkpoint) -> None:
    """With alpha = 1 every channel's largest input is 1; with 0 every column's largest weight."""
    edited, stats = Edited(small), made_up(small.topology)
    apply_all(smooth(edited, stats, 1.0), edited)
    for site in edited.topology.sites:
        if site.role in ("q", "down"):
            after = moved(stats[site.shares], edited.input_maps(site))
            assert np.allclose(after.absmax, 1, atol=1e-5)
    edited = Edited(small)
    apply_all(smooth(edited, stats, 0.0, places=("hidden",)), edited)
    down = edited.topology.site("model.layers.2.mlp.down_proj")
    assert np.allclose(column_absmax(edited, [down]), 1, atol=1e-5)


def test_dead_channels_keep_their_scale(small: Checkpoint) -> None:
    stats = made_up(small.topology)
    for s in stats.values():
        for values in (s.absmax, s.mean_abs):
            values[[1, 5]] = 0
    edited = Edited(small)
    assert all((m.factors[[1, 5]] == 1).all() for m in smooth(edited, stats, places=("norm", "hidden")))
    for m in awq_scales(edited, stats, nearest("int3/row"), points=2):
        assert np.isfinite(m.factors).all()
    assert all(np.isfinite(m.factors).all() for m in smooth_attention_stats(edited, stats))


def smooth_attention_stats(edited: Edited, stats: dict[str, Statistics]) -> list:
    zero = {
        k: Statistics(s.tokens, s.hessian, s.absmax, s.mean_abs, s.mean, s.square, s.samples * 0)
        for k, s in stats.items()
    }
    return smooth_attention(edited, zero)


def test_outliers_alone_are_smoothed(small: Checkpoint) -> None:
    stats = made_up(small.topology)
    for m in smooth_outliers(Edited(small), stats, 0.03, places=("hidden",)):
        a = stats[m.where.replace("up_proj", "hidden")].absmax
        base = np.sort(a)[-4]  # floor(0.03 x 104 + 1.5)
        assert (m.factors != 1).sum() == 3
        assert np.allclose(a * m.factors, np.minimum(a, base))


def test_equalised_ranges_are_equal(small: Checkpoint) -> None:
    edited = Edited(small)
    apply_all(equalise(edited), edited)
    t = edited.topology
    rows = row_absmax(edited, t.site("model.layers.1.mlp.up_proj"))
    assert np.allclose(rows, column_absmax(edited, [t.site("model.layers.1.mlp.down_proj")]), rtol=1e-5)
    values = row_absmax(edited, t.site("model.layers.1.self_attn.v_proj"))
    output = column_absmax(edited, [t.site("model.layers.1.self_attn.o_proj")]).reshape(2, 3, 12).max(axis=1)
    assert np.allclose(values, output.reshape(-1), rtol=1e-5)


def test_keys_become_even(small: Checkpoint) -> None:
    edited, stats = Edited(small), made_up(small.topology)
    attention = edited.topology.attention[1]
    known = stats["model.layers.1.self_attn.input"]
    before = key_sizes(edited, attention, known)
    # By hand: the length of a rotary pair is what its channels reach as the position turns it.
    k = known.samples @ read(small, small.topology.site(attention.k)).T + small.bias(small.topology.site(attention.k))
    angle = np.linspace(0, 2 * np.pi, 400)[:, None, None]
    first, second = k.reshape(-1, 2, 12)[:, 1, :6], k.reshape(-1, 2, 12)[:, 1, 6:]
    turned = np.abs(first * np.cos(angle) - second * np.sin(angle)).max(axis=(0, 1))
    assert np.allclose(before[1], turned, rtol=1e-3)
    apply_all(smooth_attention(edited, stats, 1.0), edited)
    assert np.allclose(key_sizes(edited, attention, known), 1, atol=1e-4)


def test_sorted_channels_descend(small: Checkpoint) -> None:
    edited, stats = Edited(small), made_up(small.topology)
    apply_all(sort_channels(edited, stats), edited)
    t = edited.topology
    down, o = t.site("model.layers.0.mlp.down_proj"), t.site("model.layers.0.self_attn.o_proj")
    assert (np.diff(moved(stats[down.shares], edited.input_maps(down)).absmax) <= 0).all()
    heads = moved(stats[o.shares], edited.input_maps(o)).absmax.reshape(2, 3, 12).max(axis=1)
    assert (np.diff(heads, axis=1) <= 0).all()


def test_rescale_is_seeded_and_in_range(small: Checkpoint) -> None:
    first, again, other = (factors(rescale(small.topology, seed)) for seed in (4, 4, 5))
    assert set(first) == {producer for producer, _ in small.topology.feeds}
    joined = np.concatenate(list(first.values()))
    assert joined.min() >= 0.75
    assert joined.max() <= 1.33
    assert abs(np.log(joined).mean() - np.log(0.75 * 1.33) / 2) < 0.02
    assert all(np.array_equal(first[p], again[p]) and not np.array_equal(first[p], other[p]) for p in first)


# ---------------------------------------------------------------- statistics of what was mapped


def test_moved_statistics_are_those_of_moved_inputs() -> None:
    random = np.random.default_rng(9)
    x = (random.standard_normal((300, 24)) + random.standard_normal(24)).astype(np.float32)
    q = np.linalg.qr(random.standard_normal((24, 24)))[0]
    maps = [Diagonal(random.uniform(-2, 2, 24)), Order(random.permutation(24)), Blocks(24, q), HadamardMap(24, 8, 3)]
    for used in (maps[:2], maps):
        y = x.astype(np.float64)
        for m in used:
            y = m.tokens(y)
        found, wanted = moved(statistics_of(x), used), statistics_of(y.astype(np.float32))
        for field in ("hessian", "mean", "square", "samples", "absmax", "mean_abs"):
            assert np.allclose(getattr(found, field), getattr(wanted, field), atol=2e-4), field
        assert found.tokens == 300


def test_a_rotation_without_a_hessian_uses_the_samples() -> None:
    random = np.random.default_rng(9)
    x = random.standard_normal((300, 16)).astype(np.float32)
    s = statistics_of(x)
    s.hessian = None
    m = HadamardMap(16, 16)
    found = moved(s, [m])
    assert found.hessian is None
    assert np.allclose(found.square, np.square(m.tokens(x)).mean(axis=0), atol=1e-5)


# ---------------------------------------------------------------- real weights


def first_inputs(checkpoint: Checkpoint, site: str, norm: str, seed: int) -> np.ndarray:
    """What the first layer's norm gives for random tokens (the MLP's as if attention had added nothing)."""
    table = checkpoint.topology.site("model.embed_tokens")
    ids = np.random.default_rng(seed).permutation(table.rows)[:400]
    h = checkpoint.source(table).read(0, table.rows)[ids] * checkpoint.config.embed_scale
    gain = next(checkpoint.vector(v) for v in checkpoint.topology.vectors if v.name == norm)
    return (h / np.sqrt((h * h).mean(axis=1, keepdims=True) + checkpoint.config.norm_eps) * gain).astype(np.float32)


def error(edited: Edited, site: Site, x: np.ndarray, quantize, quantize_input=lambda x: x) -> float:
    """The relative squared error of a site's output; x are inputs of the model below ``edited``."""
    base = edited.base
    wanted = x @ read(base, base.topology.site(site.name)).T
    for m in edited.input_maps(site):
        x = m.tokens(x)
    got = quantize_input(x.astype(np.float32)) @ quantize(site, read(edited, site)).T
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


SITES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def both(checkpoint: Checkpoint, seed: int) -> dict[str, np.ndarray]:
    mlp = "pre_feedforward_layernorm" if checkpoint.config.post_norms else "post_attention_layernorm"
    return {
        "model.layers.0.self_attn.input": first_inputs(checkpoint, "q", NORM, seed),
        "model.layers.0.mlp.input": first_inputs(checkpoint, "up", f"model.layers.0.{mlp}", seed),
    }


def test_awq_helps_on_other_tokens(smollm2: Checkpoint) -> None:
    """3 bits in groups of 64 (off the grid on which the file lies): lower output errors on held-out tokens."""
    seen, held_out = both(smollm2, 0), both(smollm2, 1)
    quantize, edited, plain = nearest("uint3/g64"), Edited(smollm2), Edited(smollm2)
    stats = {k: statistics_of(x) for k, x in seen.items()}
    found = awq_scales(edited, stats, quantize, points=6)
    assert {m.where for m in found} == {NORM, MLP}
    apply_all(found, edited)
    ratios = []
    for name in SITES:
        site = smollm2.topology.site(f"model.layers.0.{name}")
        x = held_out[site.shares]
        ratios.append(error(edited, site, x, quantize) / error(plain, site, x, quantize))
    assert max(ratios) < 1
    assert np.mean(ratios) < 0.9


def test_searched_smoothing_helps_integer_inputs(gemma3: Checkpoint) -> None:
    """Weights and inputs in 4 bits: the searched strength is better than none and than a fixed one."""

    def four_bits(x: np.ndarray) -> np.ndarray:
        scale = np.abs(x).max(axis=1, keepdims=True) / 7
        return np.round(x / np.where(scale > 0, scale, 1)) * scale

    seen, held_out, quantize = both(gemma3, 0), both(gemma3, 1), nearest("int4/row")
    stats = {k: statistics_of(x) for k, x in seen.items()}
    searched, fixed = Edited(gemma3), Edited(gemma3)
    apply_all(smooth_searched(searched, stats, quantize, four_bits), searched)
    apply_all(smooth(fixed, stats, 1.0), fixed)
    total = np.zeros(3)
    for name in SITES:
        site = gemma3.topology.site(f"model.layers.0.{name}")
        x = held_out[site.shares]
        total += [error(e, site, x, quantize, four_bits) for e in (Edited(gemma3), searched, fixed)]
    assert total[1] < 0.8 * total[0]
    assert total[1] < total[2]


def test_rotation_spreads_the_values(gemma3: Checkpoint) -> None:
    edited = Edited(gemma3)
    apply_all(rotate_values(gemma3.topology), edited)
    o = gemma3.topology.site("model.layers.0.self_attn.o_proj")

    def peak(w: np.ndarray) -> float:
        heads = w.reshape(len(w), -1, 256)
        return float(np.mean(np.abs(heads).max(axis=2) / np.sqrt((heads**2).mean(axis=2))))

    assert peak(read(edited, o)) < 0.95 * peak(read(gemma3, o))


def test_the_same_scales_from_the_same_inputs(smollm2: Checkpoint) -> None:
    stats = {k: statistics_of(x) for k, x in both(smollm2, 0).items()}
    first, again = (factors(awq_scales(Edited(smollm2), stats, nearest("int3/row"), points=3)) for _ in range(2))
    assert all(np.array_equal(first[p], again[p]) for p in first)
