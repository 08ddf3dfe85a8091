"""Codes and scales that are improved on the layer's objective: never worse, and at rest where nothing helps."""

from __future__ import annotations

import numpy as np
import pytest
from solver_cases import EVERY, inputs, matrix, moments, parsed

from gossamer.compress.solvers import Grid, Obs, Search, fit_grid, objective, obs, refit_scales, round_learned
from gossamer.compress.solvers import rounding as module
from gossamer.errors import FormatError, UsageError
from gossamer.formats import parse_weight

every = pytest.mark.parametrize("fmt", parsed(EVERY), ids=str)
SLACK = 1 + 1e-5  # float32 sums


def test_the_objective_by_hand():
    w, hessian = matrix(20, 48), moments(inputs(200, 48))
    values = fit_grid(parse_weight("int3/g16"), w).nearest(w)[1]
    d = (w - values).astype(np.float64)
    assert np.allclose(objective(w, values, hessian), np.einsum("ri,ij,rj->r", d, hessian, d), rtol=1e-4)


@every
def test_never_worse_for_any_row_whatever_the_start(fmt):
    w, hessian = matrix(32, 80), moments(inputs(300, 80))
    grid = fit_grid(fmt, w)
    nearest = grid.nearest(w)[0]
    solved = Grid.of(obs(fmt, w, hessian, Obs(order="act"), grid=grid).packed)[1]
    mixed = np.random.default_rng(0).permuted(nearest, axis=1)
    for start in (nearest, solved, mixed):
        codes = round_learned(grid, start, w, hessian, passes=2)
        before, after = (objective(w, grid.values(c), hessian) for c in (start, codes))
        assert (after <= before * SLACK + 1e-12).all()
        assert codes.max() < fmt.number.levels
        if start is not solved:
            assert after.sum() < before.sum()


def test_it_rests_where_no_single_code_helps():
    w, hessian = matrix(20, 48), moments(inputs(200, 48))
    grid = fit_grid(parse_weight("uint2/g16"), w)
    codes = round_learned(grid, grid.nearest(w)[0], w, hessian, passes=100)
    assert np.array_equal(round_learned(grid, codes, w, hessian), codes)
    least = objective(w, grid.values(codes), hessian)
    for column in range(48):
        for code in range(4):
            other = codes.copy()
            other[:, column] = code
            assert (objective(w, grid.values(other), hessian) >= least * (1 - 1e-3)).all()


def test_blocks_and_row_parts_change_nothing_much(monkeypatch):
    w, hessian = matrix(150, 96), moments(inputs(300, 96))
    grid = fit_grid(parse_weight("uint3/16x32-m(f16)"), w)
    start = grid.nearest(w)[0]
    whole = round_learned(grid, start, w, hessian)
    monkeypatch.setattr(module, "BLOCK", 20)
    monkeypatch.setattr(module, "ELEMENTS", 64 * 96)
    assert np.mean(round_learned(grid, start, w, hessian) != whole) < 2e-3


def test_damping_is_added():
    w, hessian = matrix(20, 48), moments(inputs(20, 48))
    grid = fit_grid(parse_weight("int3/g16"), w)
    start = grid.nearest(w)[0]
    damped = hessian + 0.1 * np.diagonal(hessian).mean(dtype=np.float32) * np.eye(48, dtype=np.float32)
    ours, theirs = round_learned(grid, start, w, hessian, damping=0.1), round_learned(grid, start, w, damped)
    assert np.mean(ours != theirs) < 1e-3
    assert np.array_equal(round_learned(grid, start, w, hessian, damping=1e9), start)


@pytest.mark.parametrize("text", ["int3/g32", "uint2/g32", "uint3/g32-m(f16)", "uint3/row-m(bf16)", "nf4/g16*f32",
                                  "e2m1/row", "bipolar2/g64", "ternary/g32*bf16"])  # fmt: skip
def test_scales_fitted_again_are_never_worse(text):
    fmt, w, hessian = parse_weight(text), matrix(40, 112), moments(inputs(300, 112))
    grid = fit_grid(fmt, w)
    for codes in (grid.nearest(w)[0], Grid.of(obs(fmt, w, hessian, Obs(order="act"), grid=grid).packed)[1]):
        again = refit_scales(grid, codes, w, hessian, passes=2)
        before, after = (objective(w, g.values(codes), hessian) for g in (grid, again))
        assert (after <= before * SLACK + 1e-12).all()
        assert after.sum() < 0.99 * before.sum()
        packed = again.pack(codes)
        assert np.array_equal(packed.decode(), again.values(codes))
    assert np.array_equal(grid.s, fit_grid(fmt, w).s)  # the one given is as it was


def test_rounding_after_the_sweep_helps_on_real_text(real):
    fmt = parse_weight("uint3/g64-m(f16)")
    for site in [s for s in real if s.name in ("k", "o")]:
        grid, codes = Grid.of(obs(fmt, site.w, site.hessian, Obs(search=Search(), damping=0.05)).packed)
        start = site.error(grid.values(codes))
        for _ in range(2):
            codes = round_learned(grid, codes, site.w, site.hessian, passes=2, damping=0.05)
            grid = refit_scales(grid, codes, site.w, site.hessian)
        assert site.error(grid.values(codes)) < start


def test_requests_that_cannot_be():
    w, hessian = matrix(16, 32), np.eye(32, dtype=np.float32)
    for text in ("int4/g16*(int8/row)", "e2m1/g16*e8m0", "int4/16x16", "uint4/g16-m(uint4/g16-z(0))"):
        grid = fit_grid(parse_weight(text), w)
        with pytest.raises(FormatError, match="cannot be fitted again"):
            refit_scales(grid, grid.nearest(w)[0], w, hessian)
    grid = fit_grid(parse_weight("int4/g16"), w)
    codes = grid.nearest(w)[0]
    with pytest.raises(UsageError, match="not of one matrix"):
        round_learned(grid, codes[:, :31], w, hessian)
    with pytest.raises(UsageError, match="layer 3 hold NaN"):
        round_learned(grid, codes, w, hessian * np.nan, where="layer 3")
    with pytest.raises(UsageError, match="at least one"):
        round_learned(grid, codes, w, hessian, passes=0)
    with pytest.raises(UsageError, match="at least one"):
        refit_scales(grid, codes, w, hessian, passes=0)
