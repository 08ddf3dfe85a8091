"""Low-rank factors: the least error there is, for each scaling; whitening best on what the model sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from real_sites import real_sites

from gossamer.compress.solvers.lowrank import SCALINGS, factors, root
from gossamer.errors import UsageError
from gossamer.formats import parse_weight, project

F = np.float32


def correlated(tokens: int, cols: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((cols, cols)) * np.exp(-np.arange(cols) / (cols / 4))
    return (rng.standard_normal((tokens, cols)) @ mixing.T).astype(F)


def moments(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return (wide.T @ wide / len(x)).astype(F)


def output_error(e: np.ndarray, h: np.ndarray) -> float:
    wide = e.astype(np.float64)
    return float(np.trace(wide @ h.astype(np.float64) @ wide.T))


@pytest.mark.parametrize(("rows", "cols", "rank"), [(40, 64, 8), (64, 40, 8), (7, 96, 3), (96, 7, 5), (33, 33, 16)])
def test_the_error_is_the_tail_of_the_singular_values(rows: int, cols: int, rank: int) -> None:
    e = np.random.default_rng(1).standard_normal((rows, cols)).astype(F)
    h = moments(correlated(4 * cols, cols))
    roots = {"plain": np.eye(cols), "rms": np.diag(np.sqrt(np.diagonal(h))), "whiten": root(h, "w")}
    for scaling, s in roots.items():
        u, v = factors(e, rank, scaling, hessian=h, square=np.diagonal(h))
        tail = (np.linalg.svd(e.astype(np.float64) @ s, compute_uv=False)[rank:] ** 2).sum()
        assert output_error(e - u @ v, (s @ s.T).astype(F)) == pytest.approx(tail, rel=1e-4), scaling


def test_both_factors_have_the_root_of_the_singular_values() -> None:
    e = np.random.default_rng(2).standard_normal((48, 32)).astype(F)
    h = moments(correlated(200, 32))
    for scaling, s in (("plain", np.eye(32)), ("whiten", root(h, "w"))):
        u, v = factors(e, 6, scaling, hessian=h)
        sigma = np.linalg.svd(e.astype(np.float64) @ s, compute_uv=False)[:6]
        assert np.linalg.norm(u, axis=0) ** 2 == pytest.approx(sigma, rel=1e-4)
        assert np.linalg.norm(v @ s, axis=1) ** 2 == pytest.approx(sigma, rel=1e-3)


def test_whitening_is_best_on_held_out_inputs(smollm2_gguf: Path) -> None:
    for name, site in real_sites(smollm2_gguf).items():
        w = site.w[:256]
        stored = project(parse_weight("int3/g64"), w)
        power = ((site.fresh @ w.T) ** 2).sum()
        left = {}
        for scaling in SCALINGS:
            u, v = factors(w - stored, 32, scaling, hessian=site.stats.hessian, square=site.stats.square)
            left[scaling] = ((site.fresh @ (w - stored - u @ v).T) ** 2).sum() / power
        assert left["whiten"] < left["rms"] < left["plain"], (name, left)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_more_ranks_leave_less_and_all_of_them_nothing(scaling: str) -> None:
    e = np.random.default_rng(3).standard_normal((48, 80)).astype(F)
    h = moments(correlated(300, 80))
    errors = []
    for rank in (1, 8, 32, 48):
        u, v = factors(e, rank, scaling, hessian=h, square=np.diagonal(h))
        errors.append(output_error(e - u @ v, h if scaling != "plain" else np.eye(80, dtype=F)))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert np.abs(e - u @ v).max() < 1e-4 * np.abs(e).max()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_singular_inputs_give_finite_factors(scaling: str) -> None:
    x = correlated(10, 64)  # fewer tokens than columns
    x[:, 5], x[:, 9] = 0, 3
    h = moments(x)
    e = np.random.default_rng(4).standard_normal((32, 64)).astype(F)
    log: list[str] = []
    u, v = factors(e, 8, scaling, hessian=h, square=np.diagonal(h), log=log)
    assert np.isfinite(u).all()
    assert np.isfinite(v).all()
    assert output_error(e - u @ v, h) < output_error(e, h)
    assert np.linalg.norm(e - u @ v) <= 1.001 * np.linalg.norm(e)  # a projection: what no input shows is not blown up
    if scaling == "whiten":
        assert log
        assert all("damping" in line for line in log)


def test_what_is_nothing_stays_nothing() -> None:
    zeros, h = np.zeros((6, 8), F), np.zeros((8, 8), F)
    for scaling in SCALINGS:
        u, v = factors(zeros, 3, scaling, hessian=h, square=np.diagonal(h))
        assert not u.any()
        assert not v.any()
        e = np.random.default_rng(5).standard_normal((6, 8)).astype(F)
        u, v = factors(e, 6, scaling, hessian=h, square=np.diagonal(h))  # an input that is always zero
        assert np.isfinite(u @ v).all()


def test_a_rank_that_the_matrix_does_not_have_is_filled_with_zeros() -> None:
    e = np.random.default_rng(6).standard_normal((4, 16)).astype(F)
    u, v = factors(e, 10)
    assert u.shape == (4, 10)
    assert v.shape == (10, 16)
    assert not u[:, 4:].any()
    assert np.allclose(u @ v, e, atol=1e-5)


def test_what_is_missing_or_broken_is_said() -> None:
    e = np.ones((4, 8), F)
    with pytest.raises(UsageError, match=r"blk\.0 need the second moments"):
        factors(e, 2, "whiten", where="blk.0")
    with pytest.raises(UsageError, match=r"blk\.0 scaled by rms need"):
        factors(e, 2, "rms", where="blk.0")
    with pytest.raises(UsageError, match="NaN"):
        factors(e, 2, "whiten", hessian=np.full((8, 8), np.nan, F))
    with pytest.raises(UsageError, match="not finite"):
        factors(e, 2, "rms", square=np.full(8, np.nan, F))
    with pytest.raises(UsageError, match="not positive definite"):
        factors(e, 2, "whiten", hessian=np.full((8, 8), 5, F) - 4 * np.eye(8, dtype=F))  # an eigenvalue of -4
    with pytest.raises(UsageError, match="there are plain, rms, whiten"):
        factors(e, 2, "white")  # type: ignore[arg-type]
