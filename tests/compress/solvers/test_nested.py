"""Planes of a nested weight, and the two-level integer scales of QoQ and DGQ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from real_sites import real_sites

from gossamer.compress.solvers import nested
from gossamer.compress.solvers.nested import PROTECTIVE, dual, planes, progressive
from gossamer.compress.solvers.search import Search
from gossamer.errors import FormatError, UsageError
from gossamer.formats import Coded, Packed, bits_per_weight, layout, parse_weight, project

F = np.float32
TWO = parse_weight("uint4/g128*(int8/row)")


def coded(text: str) -> Coded:
    fmt = parse_weight(text)
    assert isinstance(fmt, Coded)
    return fmt


def integers(packed: Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """s1 [rows, 1], s2 [rows, groups], z [rows, groups], codes [rows, cols] as stored."""
    rows, cols = packed.shape
    parts = packed.format.unpack_parts(packed.arrays, rows, cols, 0, layout.panels(rows))
    s2 = parts.scales.codes[:rows].astype(int) - 128
    s1 = (
        packed.format.scale.decode_rows(layout.under(packed.arrays, "scales."), rows, s2.shape[1], 0, rows)[:, :1]
        / s2[:, :1]
    )
    return s1, s2, parts.zeros[:rows].astype(int), parts.codes[:rows].astype(int)


def bytes_of(packed: Packed) -> np.ndarray:
    """s2 (q - z) of every weight."""
    _, s2, z, q = integers(packed)
    width = packed.format.width(packed.shape[1])
    spread = [np.repeat(x, width, axis=1)[:, : packed.shape[1]] for x in (s2, z)]
    return spread[0] * (q - spread[1])


def awkward(cols: int) -> np.ndarray:
    """Rows whose groups are one-sided, constant, zero, lopsided, or ordinary."""
    rng = np.random.default_rng(0)
    kinds = [rng.standard_normal(cols) for _ in range(6)]
    kinds += [np.abs(kinds[0]), -np.abs(kinds[0]), 5 + kinds[0], np.full(cols, 2.5), np.zeros(cols)]
    step = np.where(np.arange(cols) % 2, 1.0, -1.0)
    kinds += [step, step * 0.93, np.where(np.arange(cols) < 128, step, 0.001 * step), 1e-30 * kinds[1], 1e20 * kinds[1]]
    kinds += [np.concatenate([[100.0], kinds[2][1:]]), np.where(np.arange(cols) % 16, 0.49, -1) * 3]
    return np.array(kinds, F)


# ---------------------------------------------------------------- QoQ


@pytest.mark.parametrize("cols", [256, 200, 128, 17])
@pytest.mark.parametrize("lowest", [1.0, 0.5])
def test_progressive_weights_are_bytes(cols: int, lowest: float) -> None:
    packed = progressive(TWO, awkward(cols), lowest=lowest)
    values = bytes_of(packed)
    assert values.min() >= -128
    assert values.max() <= 127
    s2 = integers(packed)[1]
    assert s2.min() >= 1
    assert s2.max() <= 16


def second_level(level: list[int]) -> list[int]:
    """QoQ's formula, one number after another: what uint4 keeps of a group of integers."""
    low, high = min(0, *level), max(0, *level)
    s2 = max(1, round((high - low) / 15))
    z = min(15, max(0, round(-low / s2)))
    return [s2 * (min(15, max(0, round(v / s2) + z)) - z) for v in level]


def test_the_second_level_is_rounded_from_the_first() -> None:
    w = awkward(256)
    packed = progressive(TWO, w)
    got = bytes_of(packed)
    for row in range(len(w)):
        extreme = np.abs(w[row]).max()
        if extreme == 0:
            assert not got[row].any()
            continue
        s1 = F(np.float64(extreme) / PROTECTIVE)
        level = np.rint(w[row] / s1).astype(int)
        assert np.abs(level).max() == PROTECTIVE
        wanted = [v for g in range(0, 256, 128) for v in second_level(level[g : g + 128].tolist())]
        assert got[row].tolist() == wanted


def test_a_range_of_127_would_overflow_and_119_never_does() -> None:
    def worst(reach: int) -> int:
        extremes = [
            second_level([low, high]) for low in range(-reach, 1) for high in range(max(0, reach - 3), reach + 1)
        ]
        return max(max(e[1], -e[0] - 1) for e in extremes)

    assert worst(127) > 127
    assert worst(PROTECTIVE) <= 127


def test_smaller_steps_are_taken_where_they_are_better(smollm2_gguf: Path) -> None:
    site = real_sites(smollm2_gguf)["gate"]
    w, square = site.w[:200], site.stats.square
    errors = [(((progressive(TWO, w, square, lowest=x).decode() - w) ** 2) * square).sum() for x in (1.0, 0.8, 0.4)]
    assert errors[0] > errors[1] >= errors[2]


# ---------------------------------------------------------------- DGQ


@pytest.mark.parametrize("cols", [256, 200, 17])
@pytest.mark.parametrize("sampled", [True, False])
def test_dual_weights_are_bytes(cols: int, sampled: bool) -> None:
    w = awkward(cols)
    samples = np.random.default_rng(1).standard_normal((32, cols)).astype(F) if sampled else None
    packed = dual(TWO, w, samples)
    assert np.abs(bytes_of(packed)).max() <= 127
    s2 = integers(packed)[1]
    assert s2.min() >= 1
    assert s2.max() <= 127
    ordinary = slice(0, 6)
    error = ((packed.decode()[ordinary] - w[ordinary]) ** 2).sum() / (w[ordinary] ** 2).sum()
    assert error < 0.02


def test_integer_scales_cost_little_over_float_ones_and_beat_one_scale_per_row(smollm2_gguf: Path) -> None:
    ratios = []
    for site in real_sites(smollm2_gguf).values():
        w, samples = site.w[:192], site.stats.samples[::4]

        def error(values: np.ndarray, w: np.ndarray = w, samples: np.ndarray = samples) -> float:
            return float(((samples @ (values - w).T) ** 2).sum())

        x, groups = nested._groups(samples, 128), nested._groups(w, 128)
        s, zero = nested._fine(groups, x, 15)
        codes = np.clip(np.rint(groups / s[..., None]) + zero[..., None], 0, 15)
        floats = (s[..., None] * (codes - zero[..., None])).reshape(len(w), -1)[:, : w.shape[1]]
        ours = error(dual(TWO, w, samples).decode())
        ratios.append(ours / error(floats))
        assert ours < 0.75 * error(project(parse_weight("uint4/row"), w))
        assert ours < error(project(TWO, w))
    assert sorted(ratios)[-2] <= 1.1  # of four sites; one may lie a little above
    assert max(ratios) <= 1.15


@pytest.mark.parametrize("solver", [progressive, dual])
@pytest.mark.parametrize(
    "text", ["uint4/g128", "int4/g128*(int8/row)", "uint4/g128*(int8/g16)", "uint4/g128*(int6/row)"]
)
def test_formats_without_two_levels_are_refused(solver, text: str) -> None:
    with pytest.raises(UsageError, match=r"uint4/g128\*\(int8/row\), so it cannot fit"):
        solver(coded(text), np.ones((4, 128), F))


def test_half_precision_row_scales_stay_within_bytes() -> None:
    fmt = coded("uint4/g64*(int8/row*f16)")
    w = awkward(256)[:10]
    for packed in (progressive(fmt, w), dual(fmt, w)):
        parts = packed.format.unpack_parts(packed.arrays, 10, 256, 0, 1)
        assert parts.scales.scales.dtype == np.float16 or parts.scales.scales.dtype.itemsize == 2
        assert np.abs(bytes_of(packed)).max() <= 128


# ---------------------------------------------------------------- D2MoE

WIDTHS = [coded(t) for t in ("uint2/g128", "bipolar1/g128", "bipolar1/g128")]


def test_fewer_planes_are_the_quantizer_of_that_width(smollm2_gguf: Path) -> None:
    site = real_sites(smollm2_gguf)["q"]
    w, h = site.w[:128], site.stats.hessian
    whole = planes(WIDTHS, w, h, search=Search())
    for k in (1, 2):
        for a, b in zip(planes(WIDTHS[:k], w, h, search=Search()), whole):
            assert all(np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays)


def test_every_plane_lowers_the_error_of_the_output(smollm2_gguf: Path) -> None:
    for name, site in real_sites(smollm2_gguf).items():
        w = site.w[:192]
        kept, errors = np.zeros_like(w), []
        for packed in planes(WIDTHS, w, site.stats.hessian, search=Search()):
            kept += packed.decode()
            e = kept - w
            errors.append(float(np.einsum("rc,rc->", e @ site.stats.hessian, e)))
        assert errors[0] > errors[1] > errors[2], name


def test_pushed_errors_help_every_site_at_the_base(smollm2_gguf: Path) -> None:
    for name, site in real_sites(smollm2_gguf).items():
        w, h = site.w[:192], site.stats.hessian

        def error(hessian: np.ndarray | None, w: np.ndarray = w, h: np.ndarray = h, site=site) -> float:
            (base,) = planes(WIDTHS[:1], w, hessian, square=site.stats.square, search=Search())
            e = base.decode() - w
            return float(np.einsum("rc,rc->", e @ h, e))

        assert error(h) < 0.9 * error(None), name


def test_signs_have_the_scale_of_least_weighed_error() -> None:
    rng = np.random.default_rng(2)
    w, square = rng.standard_normal((6, 80)).astype(F), rng.random(80).astype(F)
    (signs,) = planes([coded("bipolar1/g32*f32")], w, None, square=square)
    values = signs.decode()
    for r in range(6):
        for c in range(0, 80, 32):
            x, h = w[r, c : c + 32], square[c : c + 32]
            s = float((h * np.abs(x)).sum() / h.sum())
            assert values[r, c : c + 32] == pytest.approx(s * np.sign(x), rel=1e-5)


def test_planes_without_a_hessian_are_what_encode_gives() -> None:
    w = np.random.default_rng(3).standard_normal((33, 200)).astype(F)
    found = planes(WIDTHS, w, None)
    total = sum(packed.decode() for packed in found)
    assert np.allclose(total, project(parse_weight("uint2/g128 + bipolar1/g128 + bipolar1/g128"), w), atol=1e-6)


def test_three_widths_take_less_than_half_of_three_copies() -> None:
    one = bits_per_weight(parse_weight(" + ".join(map(str, WIDTHS))), 1024, 4096)
    three = sum(bits_per_weight(parse_weight(f"uint{b}/g128"), 1024, 4096) for b in (2, 3, 4))
    assert one < 0.5 * three


def test_shapes_at_the_edge() -> None:
    rng = np.random.default_rng(4)
    for rows, cols in ((1, 1), (17, 16), (3, 129), (16, 300)):
        w = rng.standard_normal((rows, cols)).astype(F)
        x = rng.standard_normal((64, cols)).astype(F)
        h = (x.T @ x / 64).astype(F)
        errors = np.cumsum([p.decode() for p in planes(WIDTHS, w, h)], axis=0) - w
        assert np.isfinite(errors).all()
    w = np.zeros((4, 32), F)
    assert not any(p.decode().any() for p in planes(WIDTHS, w, np.eye(32, dtype=F)))


def test_damping_that_is_too_little_is_raised_and_said() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((3, 64)).astype(F) * np.exp(4 * rng.standard_normal(64)).astype(F)
    log: list[str] = []
    found = planes(WIDTHS, rng.standard_normal((8, 64)).astype(F), (x.T @ x / 3).astype(F), damping=0, log=log)
    assert all(np.isfinite(p.decode()).all() for p in found)
    assert "damping" in log[0]


def test_broken_inputs_are_refused() -> None:
    w = np.ones((4, 64), F)
    with pytest.raises(UsageError, match=r"blk\.0"):
        planes(WIDTHS, w, np.full((64, 64), np.nan, F), where="blk.0")
    with pytest.raises(FormatError, match="NaN"):
        planes(WIDTHS, np.full((4, 64), np.nan, F), None)
    for solver in (progressive, dual):
        with pytest.raises(FormatError, match="NaN"):
            solver(TWO, np.full((4, 64), np.nan, F))
