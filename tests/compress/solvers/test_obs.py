"""The Hessian solver: against a plain reference, on real sites, and where it has nothing to go on."""

from __future__ import annotations

import numpy as np
import pytest
from solver_cases import EVERY, PLAIN, inputs, loss, matrix, moments, parsed

from gossamer.compress.solvers import Grid, Obs, OutlierRule, Search, fit_grid, nearest, obs, sweep
from gossamer.compress.solvers.factor import inverse_factor, order_of
from gossamer.errors import FormatError, UsageError
from gossamer.formats import parse_weight

every = pytest.mark.parametrize("fmt", parsed(EVERY), ids=str)


def reference(grid, w, hessian, damping):
    """GPTQ without a factor: the inverse itself, columns removed one by one (Frantar et al. 2022, eq. 2 and 3)."""
    w, codes = w.astype(np.float64), np.empty(w.shape, np.uint8)
    inverse = np.linalg.inv(hessian + damping * np.diagonal(hessian).mean() * np.eye(len(hessian)))
    for i in range(w.shape[1]):
        codes[:, i], q = (x[:, 0] for x in grid.nearest(w[:, [i]].astype(np.float32), np.array([i])))
        w -= np.outer((w[:, i] - q) / inverse[i, i], inverse[i])
        inverse -= np.outer(inverse[i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1  # done with
    return codes


@pytest.mark.parametrize("fmt", parsed(["int4/g32", "uint3/g32-m(f16)", "e2m1/g32*e8m0", "ternary/row"]), ids=str)
def test_it_is_gptq(fmt):
    w, hessian = matrix(40, 96), moments(inputs(300, 96))
    grid = fit_grid(fmt, w)
    codes = Grid.of(obs(fmt, w, hessian, Obs(damping=0.02, block=32)).packed)[1]
    assert np.mean(codes != reference(grid, w, hessian, 0.02)) < 1e-3
    assert np.mean(codes != grid.nearest(w)[0]) > 0.1


@every
def test_without_correlations_it_rounds_to_nearest(fmt):
    w = matrix(32, 80)
    grid = fit_grid(fmt, w)
    for options in (Obs(), Obs(order="act", block=32, damping=1)):
        solved = obs(fmt, w, np.eye(80, dtype=np.float32), options)
        assert np.array_equal(Grid.of(solved.packed)[1], grid.nearest(w)[0])
        assert np.array_equal(solved.values, solved.packed.decode())


@pytest.mark.parametrize("fmt", parsed(PLAIN), ids=str)
def test_dynamic_groups_without_correlations_too(fmt):
    w = matrix(32, 80)
    solved = obs(fmt, w, np.eye(80, dtype=np.float32), Obs(groups="dynamic"))
    grid, codes = Grid.of(solved.packed)
    plain = fit_grid(fmt, w)
    assert np.array_equal(grid.s, plain.s)
    assert np.array_equal(codes, plain.nearest(w)[0])


@every
def test_less_output_error_than_nearest(fmt):
    cols = 160
    w, x = matrix(32, cols), inputs(1200, cols)
    hessian, held = moments(x[:900]), moments(x[900:])
    base = loss(w, nearest(fmt, w).decode(), held)
    for options in (Obs(), Obs(order="act", search=Search(steps=8))):
        solved = obs(fmt, w, hessian, options)
        solved.packed.validate("the matrix")
        assert np.array_equal(solved.values, solved.packed.decode())
        assert loss(w, solved.values, held) < (1 if fmt.number.bits == 8 else 0.9) * base


@pytest.mark.parametrize("groups", ["static", "dynamic"])
def test_blocks_change_only_the_order_of_sums(groups):
    w, hessian = matrix(64, 200), moments(inputs(600, 200))
    fmt = parse_weight("int4/g32")
    codes = [Grid.of(obs(fmt, w, hessian, Obs(block=block, groups=groups)).packed)[1] for block in (1, 32, 128, 200)]
    for other in codes[1:]:
        assert np.mean(other != codes[0]) < 1e-3


def test_rows_are_independent(monkeypatch):
    w, hessian = matrix(200, 96), moments(inputs(400, 96))
    for options in (Obs(order="act"), Obs(groups="dynamic"), Obs(outliers=OutlierRule(0.05, 0.2))):
        whole = obs(parse_weight("int3/g32"), w, hessian, options)
        with monkeypatch.context() as patch:
            patch.setattr(sweep, "ELEMENTS", 64 * 96)
            parts = obs(parse_weight("int3/g32"), w, hessian, options)
        assert np.mean(whole.values != parts.values) < 1e-3
        assert whole.loss == pytest.approx(parts.loss, rel=1e-3)


def test_the_loss_is_the_damped_output_error():
    w, hessian = matrix(48, 96), moments(inputs(400, 96))
    solved = obs(parse_weight("int4/g32"), w, hessian, Obs(damping=0.05, order="act"))
    damped = hessian + 0.05 * np.diagonal(hessian).mean() * np.eye(96)
    assert solved.loss == pytest.approx(loss(w, solved.values, damped), rel=1e-3)
    assert solved.damping_used == 0.05
    assert solved.log == []


# ------------------------------------------------------------ real weights


def test_real_sites(real):
    """At most 0.85 of the error of rounding to nearest at 4 bits, and 0.6 at 3, on text not used for calibration."""
    for text, most in (("int4/g128", 0.85), ("int3/g128", 0.6)):
        fmt = parse_weight(text)
        ratios = {}
        for site in real:
            options = Obs(order="act", search=Search(), damping=0.05)
            solved = obs(fmt, site.w, site.hessian, options)
            ratios[site.name] = site.error(solved.values) / site.error(nearest(fmt, site.w).decode())
        assert np.mean([r <= most for r in ratios.values()]) >= 0.9, ratios


def test_a_real_site_takes_less_than_a_second(real):
    import time

    site = next(s for s in real if s.name == "down")
    best = np.inf
    for _ in range(3):
        start = time.process_time()
        obs(parse_weight("int4/g128"), site.w, site.hessian, Obs(order="act"))
        best = min(best, time.process_time() - start)
    assert best < 2  # of all threads together


# ------------------------------------------------------------ outliers and columns that stay


def test_outliers_add_up():
    w, hessian = matrix(40, 96), moments(inputs(400, 96))
    for fmt in parsed(["int3/g32", "uint3/g16*(uint3/g16)-m(uint3/g16)", "e2m1/g32*e8m0", "uint2/g16-m(f16)"]):
        for groups in ("static", "dynamic") if isinstance(fmt.scale, str) else ("static",):
            solved = obs(fmt, w, hessian, Obs(outliers=OutlierRule(0.02, 0.1), groups=groups))
            assert 0 < len(solved.entries) <= 0.1 * w.size
            assert (np.diff(solved.entries) > 0).all()
            total = solved.packed.decode()
            total.ravel()[solved.entries] += solved.entry_values
            assert np.allclose(total, solved.values, atol=1e-7)
            without = obs(fmt, w, hessian, Obs(groups=groups))
            assert without.entries is None
            assert loss(w, total, hessian) < 0.9 * loss(w, without.values, hessian)


def test_the_most_outliers():
    w, hessian = matrix(40, 96), moments(inputs(400, 96))
    fmt = parse_weight("int2/g32")
    free = obs(fmt, w, hessian, Obs(outliers=OutlierRule(0.01, 1)))
    few = obs(fmt, w, hessian, Obs(outliers=OutlierRule(0.01, 0.02)))
    none = obs(fmt, w, hessian, Obs(outliers=OutlierRule(0.01, 0)))
    never = obs(fmt, w, hessian, Obs(outliers=OutlierRule(1e9, 1)))
    assert len(free.entries) > 0.02 * w.size
    assert 0.01 * w.size < len(few.entries) <= 0.02 * w.size
    assert len(none.entries) == len(never.entries) == 0
    plain = obs(fmt, w, hessian, Obs())
    assert np.array_equal(never.values, plain.values)


def test_sensitive_outliers_beat_large_ones(real):
    """The same number of weights kept out: by sensitivity, or the largest (then by the same solver)."""
    fmt, better = parse_weight("int3/g16"), []
    for site in [s for s in real if s.w.size <= 576 * 576]:
        chosen = obs(fmt, site.w, site.hessian, Obs(outliers=OutlierRule(0.05, 0.01)))
        count = len(chosen.entries)
        assert count > 0
        large = np.argsort(-np.abs(site.w).ravel(), kind="stable")[:count]
        rest = site.w.copy()
        rest.ravel()[large] = 0
        kept = obs(fmt, rest, site.hessian, Obs()).values
        kept.ravel()[large] += site.w.ravel()[large]
        better.append(site.error(chosen.values) < site.error(kept))
    assert np.mean(better) >= 0.8


def test_free_columns_make_up_for_the_others():
    w, hessian = matrix(40, 96), moments(inputs(400, 96))
    fmt, free = parse_weight("int3/row"), np.array([90, 5, 17, 33])
    kept = np.setdiff1d(np.arange(96), free)
    for order in ("none", "act"):
        solved = obs(fmt, w, hessian, Obs(order=order), free_columns=free)
        assert solved.packed.shape == (40, 92)
        assert np.array_equal(solved.values[:, kept], solved.packed.decode())
        assert not np.array_equal(solved.values[:, free], w[:, free])
        alone = obs(fmt, np.ascontiguousarray(w[:, kept]), hessian[np.ix_(kept, kept)], Obs(order=order))
        values = w.copy()
        values[:, kept] = alone.values
        assert loss(w, solved.values, hessian) < loss(w, values, hessian)
        # They are at the least-squares solution for the others' errors, but for the damping.
        slope = ((w - solved.values) @ (hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(96)))[:, free]
        assert np.abs(slope).max() < 1e-4 * np.abs((w - values) @ hessian).max()


def test_another_projection_takes_the_same_sweep():
    """Two of four in a sweep of its own: the pattern holds, with less error than the two largest of each four."""

    class TwoOfFour:
        span = 4

        def __init__(self, cost):
            self.cost = cost

        def begin(self, first, current, rows):
            saliency = np.square(current) * self.cost[first : first + 4, None]
            self.first, self.keep = first, saliency.argsort(axis=0).argsort(axis=0) >= 2

        def column(self, at, current, rows):
            keep = self.keep[at - self.first]
            return keep.astype(np.uint8), np.where(keep, current, np.float32(0))

    w, x = matrix(40, 96), inputs(900, 96)
    hessian, held = moments(x[:600]), moments(x[600:])
    factor = inverse_factor(hessian, np.arange(96), np.zeros(96, bool), 0.01)
    cost = 1 / np.diagonal(factor) ** 2
    found = sweep.sweep(w, factor, np.arange(96), 96, TwoOfFour(cost), block=16)
    groups = found.codes.reshape(40, 24, 4).sum(axis=2)
    assert (groups == 2).all()
    assert np.array_equal(found.values != 0, (found.codes == 1) & (found.values != 0))
    size = np.abs(w).reshape(40, 24, 4)
    largest = np.where(size.argsort(axis=2).argsort(axis=2) >= 2, w.reshape(40, 24, 4), 0).reshape(40, 96)
    assert loss(w, found.values, held) < 0.6 * loss(w, largest, held)


# ------------------------------------------------------------ inputs that say little


def test_inputs_that_are_always_zero():
    w, hessian = matrix(40, 96), moments(inputs(400, 96))
    dead = np.array([0, 40, 95])
    hessian[dead] = 0
    hessian[:, dead] = 0
    live = np.setdiff1d(np.arange(96), dead)
    fmt = parse_weight("int4/row")
    grid = fit_grid(fmt, w)
    for order in ("none", "act"):
        solved = obs(fmt, w, hessian, Obs(order=order))
        codes = Grid.of(solved.packed)[1]
        assert np.array_equal(codes[:, dead], grid.nearest(w)[0][:, dead])
        apart = obs(fmt, w[:, live], hessian[np.ix_(live, live)], Obs(order=order),
                    grid=fit_grid(fmt, w[:, live]))  # fmt: skip
        assert loss(w[:, live], solved.values[:, live], hessian[np.ix_(live, live)]) < 1.2 * apart.loss
        assert solved.log == ["the matrix: 3 of 96 inputs were always zero"]


def test_no_input_at_all():
    w, fmt = matrix(20, 48), parse_weight("uint4/g16")
    solved = obs(fmt, w, np.zeros((48, 48), np.float32), Obs(search=Search()))
    assert np.isfinite(solved.values).all()
    assert solved.log == ["the matrix: 48 of 48 inputs were always zero"]


@pytest.mark.parametrize("order", ["none", "act"])
def test_fewer_tokens_than_columns(order):
    x = inputs(20, 96)
    w, hessian = matrix(40, 96), moments(x)
    fmt = parse_weight("int4/g32")
    solved = obs(fmt, w, hessian, Obs(order=order))
    assert loss(w, solved.values, hessian) < 0.5 * loss(w, nearest(fmt, w).decode(), hessian)
    assert np.abs(solved.values).max() < 2 * np.abs(w).max()


def test_too_little_damping_is_raised_and_said():
    w, x = matrix(20, 64), inputs(10, 64)
    solved = obs(parse_weight("int4/g32"), w, moments(x), Obs(damping=0), where="layer 3 down_proj")
    assert solved.damping_used >= 1e-4
    assert "layer 3 down_proj: damping 0 was too little and became 0.0001" in solved.log[0]
    assert "condition" in solved.log[0]
    assert np.isfinite(solved.values).all()


def test_exploding_weights_are_damped():
    """Two inputs that are almost one: the factor exists, and moves weights without end."""
    x = inputs(300, 48)
    x[:, 1] = x[:, 0] * (1 + 1e-4 * np.sin(np.arange(300)))
    w = matrix(20, 48)
    w[:, 1] = -w[:, 0]
    solved = obs(parse_weight("int2/g16"), w, moments(x) * 1e3, Obs(damping=0))
    assert np.abs(solved.values).max() < 10 * np.abs(w).max()


def test_what_no_damping_helps_is_an_error():
    hessian = np.eye(32, dtype=np.float32)
    hessian[0, 1] = hessian[1, 0] = 1e3
    with pytest.raises(UsageError, match=r"layer 3 down_proj from 77 tokens cannot be inverted.*condition infinite"):
        obs(parse_weight("int4/g16"), matrix(16, 32), hessian, where="layer 3 down_proj", tokens=77)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_second_moments_that_are_none(bad):
    hessian = np.eye(32, dtype=np.float32)
    hessian[3, 3] = bad
    with pytest.raises(UsageError, match="layer 3 down_proj hold NaN, infinite or negative variances"):
        obs(parse_weight("int4/g16"), matrix(16, 32), hessian, where="layer 3 down_proj")
    hessian[3, 3] = 1
    if bad != -1:
        hessian[3, 4] = bad
        with pytest.raises(UsageError, match="hold NaN"):
            obs(parse_weight("int4/g16"), matrix(16, 32), hessian)


def test_requests_that_cannot_be():
    w, hessian = matrix(16, 32), np.eye(32, dtype=np.float32)
    with pytest.raises(UsageError, match="32 columns but the second moments"):
        obs(parse_weight("int4/g16"), w, np.eye(31, dtype=np.float32))
    with pytest.raises(FormatError, match="shares or nests scales"):
        obs(parse_weight("int4/g16*(int8/row)"), w, hessian, Obs(groups="dynamic"))
    with pytest.raises(UsageError, match=r"free columns must lie in 0\.\.31"):
        obs(parse_weight("int4/g16"), w, hessian, free_columns=np.array([32]))
    with pytest.raises(UsageError, match="the grid given is int4/g16 of 16 x 32, not int3/g16"):
        obs(parse_weight("int3/g16"), w, hessian, grid=fit_grid(parse_weight("int4/g16"), w))
    with pytest.raises(UsageError, match="at most 1024 columns"):
        obs(parse_weight("int4/row"), matrix(16, 1040), np.eye(1040, dtype=np.float32),
            Obs(search=Search(), metric="hessian"))  # fmt: skip
    with pytest.raises(UsageError, match="permuted inputs at run time"):
        Obs(order="act", groups="dynamic")
    with pytest.raises(UsageError, match="none and act, not 'random'"):
        Obs(order="random")
    with pytest.raises(UsageError, match="damping 11"):
        Obs(damping=11)
    with pytest.raises(UsageError, match="block of 0"):
        Obs(block=0)
    with pytest.raises(UsageError, match="threshold above 0"):
        OutlierRule(threshold=0)


def test_the_factor_is_that_of_the_inverse():
    hessian = moments(inputs(2000, 700))
    order = order_of(hessian, "act", np.array([5, 600]))
    assert sorted(order) == list(range(700))
    assert set(order[-2:]) == {5, 600}
    variance = np.diagonal(hessian)[order[:-2]]
    assert (np.diff(variance) <= 0).all()
    factor = inverse_factor(hessian, order, np.zeros(700, bool), 0.01).astype(np.float64)
    assert np.array_equal(factor, np.triu(factor))
    damped = hessian[np.ix_(order, order)] + 0.01 * np.diagonal(hessian).mean() * np.eye(700)
    assert np.abs(factor.T @ factor @ damped - np.eye(700)).max() < 1e-3
