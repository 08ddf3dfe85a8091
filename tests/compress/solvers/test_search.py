"""Searched ranges are never worse than the whole one, by the measure that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from solver_cases import EVERY, NESTED, inputs, matrix, moments, parsed

from gossamer.compress.solvers import Search, clip, fit_grid, group_metric, nearest, search
from gossamer.compress.solvers.gaussian import normal_error, normal_steps
from gossamer.errors import FormatError, UsageError
from gossamer.formats import parse_weight
from gossamer.formats.numbers import NUMBERS

every = pytest.mark.parametrize("fmt", parsed(EVERY), ids=str)


def normal(rows=32, cols=512):
    return np.random.default_rng(1).standard_normal((rows, cols)).astype(np.float32)


def weighted(fmt, w, values, importance, norm=2):
    """The error of each group, by hand."""
    cols = w.shape[1]
    d = np.abs(values - w).astype(np.float64)
    width = fmt.width(cols)
    found = []
    for g in range(fmt.groups(cols)):
        c = slice(g * width, min(cols, (g + 1) * width))
        part = d[:, c]
        if importance is not None and importance.ndim == 3:
            part = (values - w)[:, c].astype(np.float64)
            n = part.shape[1]
            found.append(np.einsum("ri,ij,rj->r", part, importance[g, :n, :n], part))
        else:
            h = 1 if importance is None else importance[..., c]
            found.append((part**norm * h).sum(axis=1))
    return np.array(found).T


@pytest.mark.parametrize(
    ("fmt", "kind"),
    [(f, k) for f in parsed(EVERY) for k in ("none", "groups")]
    + [(f, k) for f in parsed(EVERY[::4]) for k in ("columns", "each", "norm")],
    ids=str,
)
def test_never_worse_than_the_whole_range(fmt, kind):
    rows, cols = 24, 112
    w, norm = matrix(rows, cols), 2
    hessian = moments(inputs(300, cols))
    importance = {
        "none": None,
        "columns": np.diagonal(hessian).copy(),
        "each": np.random.default_rng(0).uniform(0, 1, w.shape).astype(np.float32),
        "groups": group_metric(fmt, hessian),
        "norm": None,
    }[kind]
    if kind == "norm":
        norm = 2.4
    grid = fit_grid(fmt, w, importance, search=Search(norm=norm))
    values = grid.nearest(w)[1]
    assert np.array_equal(grid.pack(grid.nearest(w)[0]).decode(), values)
    plain = fit_grid(fmt, w).nearest(w)[1]
    ours, theirs = (weighted(fmt, w, v, importance, norm) for v in (values, plain))
    if not fmt.group.shared and str(fmt) not in NESTED:  # there each group is on its own
        assert (ours <= theirs * 1.001 + 1e-12).all()
    assert ours.sum() <= theirs.sum()


def test_four_bits_of_normal_weights():
    w, fmt = normal(), parse_weight("int4/g128")
    error = np.square(nearest(fmt, w).decode() - w).mean()
    assert 0.010 < error < 0.0145
    assert np.square(clip(fmt, w).decode() - w).mean() < 0.95 * error


@pytest.mark.parametrize("text", ["int2/g128", "uint2/g128", "bipolar2/g128", "uint2/g128-m(f16)"])
def test_two_bits_gain_a_quarter(text):
    w, fmt = normal(), parse_weight(text)
    error = np.square(nearest(fmt, w).decode() - w).mean()
    assert np.square(clip(fmt, w).decode() - w).mean() < 0.75 * error


def test_a_smaller_group_is_never_worse_by_much_less_error():
    w = normal()
    errors = [np.square(clip(parse_weight(f"int3/g{g}*f32"), w).decode() - w).mean() for g in (256, 128, 64, 32, 16)]
    assert errors == sorted(errors, reverse=True)


def test_importance_moves_the_error_to_where_it_counts_little():
    w, fmt = normal(), parse_weight("int3/g64")
    importance = np.where(np.arange(512) % 8 == 0, 100, 1).astype(np.float32)
    plain, ours = (np.square(clip(fmt, w, i).decode() - w).sum(axis=0) for i in (None, importance))
    assert ours @ importance < 0.9 * (plain @ importance)
    assert ours.sum() > plain.sum()


def test_the_metric_of_groups_is_their_own_output_error():
    fmt, w, x = parse_weight("int3/g32"), matrix(16, 96), inputs(400, 96)
    metric = group_metric(fmt, moments(x))
    values = clip(fmt, w).decode()
    for g in range(3):
        c = slice(32 * g, 32 * g + 32)
        by_tokens = np.square((values - w)[:, c] @ x[:, c].T).mean(axis=1)
        assert np.allclose(weighted(fmt, w, values, metric)[:, g], by_tokens, rtol=1e-3)


def test_constants_of_normal_weights():
    # QuEST (Panferov et al. 2025): the largest value over the rms, from 1 to 4 bits and ternary; errors there too.
    wide = {1: 0.79788456, 2: 1.49353462, 3: 2.05106835, 4: 2.51393058}
    error = {1: 0.36338, 2: 0.118846, 3: 0.0374397, 4: 0.0115429}
    for bits, c in wide.items():
        n = NUMBERS[f"bipolar{bits}"]
        assert normal_steps(n) * n.largest == pytest.approx(c, rel=1e-4)
        assert normal_error(n, normal_steps(n)) == pytest.approx(error[bits], rel=1e-3)
        if bits > 1:  # the same levels about their middle
            assert normal_steps(NUMBERS[f"uint{bits}"]) * (n.levels - 1) / 2 == pytest.approx(c, rel=1e-4)
    assert normal_steps(NUMBERS["ternary"]) == pytest.approx(1.22401, rel=1e-4)
    assert normal_steps(NUMBERS["e2m1"]) == pytest.approx(0.48708, rel=1e-3)


@pytest.mark.parametrize(
    "text", ["bipolar2/row", "bipolar4/g256", "uint3/row", "uint4/row-m(f32)", "int4/row", "e2m1/row"]
)
def test_the_normal_scale_on_normal_weights(text):
    fmt, w = parse_weight(text), normal(32, 4096) * 3 + (1 if "uint" in text else 0)
    values = fit_grid(fmt, w, search=Search(by="gaussian")).nearest(w)[1]
    expected = normal_error(fmt.number, normal_steps(fmt.number))
    # The rounded zero point shifts the middle by half a step at most.
    assert np.square(values - w).mean() / 9 == pytest.approx(expected, rel=0.25 if fmt.zero else 0.05)


def test_powers_of_two_are_rounded_as_asked():
    w, fmt = normal(64, 256), parse_weight("e2m1/g32*e8m0")
    ideal = np.abs(w).reshape(64, 8, 32).max(axis=2) / 6
    by = {r: fit_grid(fmt, w, search=Search(steps=1, refine=0, rounding=r)) for r in ("nearest", "ceil", "mse")}
    for grid in by.values():
        assert (np.frexp(grid.s)[0] == 0.5).all()
    assert (by["ceil"].s >= ideal).all()
    assert (by["ceil"].s < 2 * ideal).all()
    error = {r: np.square(g.nearest(w)[1] - w).sum() for r, g in by.items()}
    assert error["mse"] < min(error["nearest"], error["ceil"])
    exact = np.exp2(np.arange(-8, 8))[:, None].astype(np.float32) * 6 * np.ones((1, 32), np.float32)
    for rounding in ("nearest", "ceil"):
        grid = fit_grid(fmt, exact, search=Search(steps=1, refine=0, rounding=rounding))
        assert np.array_equal(grid.s[:, 0], np.exp2(np.arange(-8, 8)))


@pytest.mark.parametrize("fmt", parsed(t for t in NESTED if "row)" in t or "g16-z(0)" in t), ids=str)
def test_the_range_of_nested_scales_is_searched_too(fmt, monkeypatch):
    w = normal(32, 512) * np.exp(np.random.default_rng(0).standard_normal((32, 32)).repeat(16, axis=1) * 0.5)
    w = w.astype(np.float32)
    errors = []
    for ratios in (search.OUTER, (1.0,)):
        monkeypatch.setattr(search, "OUTER", ratios)
        errors.append(np.square(clip(fmt, w).decode() - w).sum())
    assert errors[0] <= errors[1]
    assert errors[1] <= np.square(nearest(fmt, w).decode() - w).sum()


def test_scales_between_powers_of_two_of_a_row():
    w, fmt = normal(32, 512), parse_weight("e2m1/g64*(e3m0/row)")
    ratio = {}
    for rounding in ("nearest", "ceil", "mse"):
        grid = fit_grid(fmt, w, search=Search(rounding=rounding))
        share = grid.s / grid.s.max(axis=1, keepdims=True)
        assert (np.frexp(share)[0] == 0.5).all()
        ratio[rounding] = np.square(grid.nearest(w)[1] - w).sum()
    assert ratio["mse"] <= min(ratio.values())


@every
def test_odd_groups(fmt):
    w = np.zeros((16, 96), np.float32)
    w[1] = 0.5
    w[2, 7] = -3
    w[3] = 1e-30
    w[4] = 1e30
    w[5] = np.linspace(-1, 1, 96)
    w[6] = -w[5] - 2
    for options in (Search(), Search(by="gaussian"), Search(norm=2.4, steps=1, refine=0)):
        grid = fit_grid(fmt, w, search=options)
        values = grid.nearest(w)[1]
        assert np.isfinite(values).all()
    importance = np.zeros(96, np.float32)  # inputs that are always zero
    assert np.isfinite(fit_grid(fmt, w, importance, search=Search()).nearest(w)[1]).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"by": "guess"}, "'error' or 'gaussian'"),
        ({"steps": 0}, "1 to 1000 ranges"),
        ({"lowest": 0}, r"lowest one in \(0, 1\]"),
        ({"norm": 0.1}, "norm 0.1"),
        ({"rounding": "floor"}, "nearest, ceil, mse"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(UsageError, match=words):
        Search(**options)


def test_bad_requests():
    w = normal(16, 64)
    with pytest.raises(UsageError, match="does not fit a 16 x 64 matrix"):
        fit_grid(parse_weight("int4/g32"), w, np.ones(63, np.float32), search=Search())
    with pytest.raises(UsageError, match=r"norm 2\.4"):
        fit_grid(parse_weight("int4/g32"), w, np.ones((2, 32, 32), np.float32), search=Search(norm=2.4))
    with pytest.raises(FormatError, match="no negative values"):
        fit_grid(parse_weight("uint4/g32-z(0)"), w, search=Search(by="gaussian"))
