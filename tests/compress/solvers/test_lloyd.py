"""Weighted k-means: no worse than plain k-means and rounding, exact on small cases, sound where there is little."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from real_sites import real_sites

from gossamer.compress.solvers import lloyd as module
from gossamer.compress.solvers.lloyd import lloyd, objective
from gossamer.errors import FormatError, UsageError
from gossamer.formats import KMeans, layout, parse_weight, project

F = np.float32
SAME = 1 + 1e-6  # tables are float32


def tables(packed) -> np.ndarray:
    fmt = packed.format
    return layout.unpack_by_row(packed.arrays["table"], 1 << fmt.bits, 0, layout.panels(packed.shape[0]))[
        : packed.shape[0]
    ]


def rows_of_many_kinds(cols: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    far = rng.standard_normal(cols)
    far[:3] = [40, -55, 31]
    kinds = [
        rng.standard_normal(cols),
        rng.standard_t(2, cols),
        rng.uniform(-1, 3, cols),
        np.abs(rng.standard_normal(cols)),
        np.concatenate([rng.normal(-5, 0.1, cols // 2), rng.normal(5, 1, cols - cols // 2)]),
        rng.standard_normal(cols) * 1e-20,
        far,
    ]
    return np.array(kinds, F)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_no_row_is_worse_than_plain_k_means_or_rounding(bits: int, spread: float) -> None:
    w = rows_of_many_kinds(256)
    weights = np.exp(spread * np.random.default_rng(1).standard_normal(w.shape)).astype(F)
    fmt = KMeans(bits, "row")
    ours = objective(w, lloyd(fmt, w, weights).decode(), weights)
    for other in (fmt, parse_weight(f"int{bits}/row"), parse_weight(f"uint{bits}/row")):
        assert (ours <= objective(w, project(other, w), weights) * SAME).all(), str(other)


def test_no_row_of_a_real_site_is_worse(smollm2_gguf: Path) -> None:
    site = real_sites(smollm2_gguf)["gate"]
    w = site.w[:128]
    weights = np.random.default_rng(2).chisquare(1, (len(w), 1)) * site.stats.square
    fmt = KMeans(3, "row")
    ours = objective(w, lloyd(fmt, w, weights).decode(), weights)
    plain = objective(w, project(fmt, w), weights)
    assert (ours <= plain * SAME).all()
    assert (ours <= objective(w, project(parse_weight("int3/row"), w), weights) * SAME).all()
    assert ours.sum() < 0.9 * plain.sum()


@pytest.mark.parametrize("value", [1.0, 1e-30, 7.0])
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_equal_weights_are_plain_k_means(value: float, per: str) -> None:
    w = rows_of_many_kinds(100)
    fmt = KMeans(3, per)
    for weights in (None, np.full(100, value, F), np.full(w.shape, value, F)):
        found = lloyd(fmt, w, weights)
        assert np.array_equal(found.decode(), project(fmt, w))


def exact(w: np.ndarray, f: np.ndarray, k: int) -> float:
    """The least objective, by trying every way to cut the sorted row into k runs."""
    order = np.argsort(w)
    w, f = w[order].astype(np.float64), f[order].astype(np.float64)
    best = np.inf
    for cuts in combinations(range(1, len(w)), k - 1):
        cost = 0.0
        for a, b in zip((0, *cuts), (*cuts, len(w))):
            mean = (f[a:b] * w[a:b]).sum() / f[a:b].sum()
            cost += (f[a:b] * (w[a:b] - mean) ** 2).sum()
        best = min(best, cost)
    return best


def test_small_rows_reach_the_least_objective_there_is() -> None:
    rng = np.random.default_rng(3)
    w = rng.standard_normal((12, 14)).astype(F)
    weights = np.exp(2 * rng.standard_normal(w.shape)).astype(F)
    got = objective(w, lloyd(KMeans(2, "row"), w, weights).decode(), weights)
    for row in range(len(w)):
        assert got[row] <= exact(w[row], weights[row], 4) * 1.0001


def test_the_unit_of_weights_does_not_matter() -> None:
    w = rows_of_many_kinds(128)
    weights = np.exp(np.random.default_rng(4).standard_normal(w.shape)).astype(F)
    found = lloyd(KMeans(3, "row"), w, weights)
    assert np.array_equal(found.decode(), lloyd(KMeans(3, "row"), w, weights * F(2.0**-60)).decode())


def test_rows_do_not_depend_on_how_many_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    w, weights = rng.standard_normal((50, 64)).astype(F), rng.random((50, 64)).astype(F)
    whole = {per: lloyd(KMeans(4, per), w, weights).arrays for per in ("row", "tensor")}
    monkeypatch.setattr(module, "ELEMENTS", 16 * 64)
    for per, arrays in whole.items():
        again = lloyd(KMeans(4, per), w, weights).arrays
        assert all(np.array_equal(again[name], a) for name, a in arrays.items())


def test_tables_ascend_and_few_values_are_exact() -> None:
    w = np.array([[1, 2, 2, 3] * 8, [0] * 32, [5] * 31 + [-5], [1.5, -2.5] * 16], F)
    weights = np.random.default_rng(6).random(w.shape).astype(F)
    found = lloyd(KMeans(2, "row"), w, weights)
    assert np.array_equal(found.decode(), w)
    assert (np.diff(tables(found), axis=1) >= 0).all()


def test_entries_without_weight_move_nothing() -> None:
    rng = np.random.default_rng(7)
    w = rng.standard_normal((20, 80)).astype(F)
    weights = rng.random(w.shape).astype(F)
    weights[:, ::5] = 0
    moved = w.copy()
    moved[:, ::5] = rng.standard_normal((20, 16)) * 100
    fmt = KMeans(3, "row")
    a, b = lloyd(fmt, w, weights), lloyd(fmt, moved, weights)
    assert np.array_equal(tables(a), tables(b))
    kept = np.delete(np.arange(80), np.arange(0, 80, 5))
    assert np.array_equal(a.decode()[:, kept], b.decode()[:, kept])
    # Entries that another term holds are the same as entries without weight.
    without = np.zeros(w.shape, bool)
    without[:, ::5] = True
    c = lloyd(fmt, moved, np.where(without, F(1), weights), without=without)
    assert np.array_equal(tables(a), tables(c))


def test_entries_held_elsewhere_free_the_table() -> None:
    w = np.random.default_rng(8).standard_normal((16, 128)).astype(F)
    w[:, 7] = 50
    without = np.abs(w) > 10
    fmt = KMeans(3, "row")
    for weights in (None, np.ones(128, F)):
        found = lloyd(fmt, w, weights, without=without)
        assert np.abs(tables(found)).max() < 10
        inside = np.where(without, 0, 1)
        assert (objective(w, found.decode(), inside) < objective(w, project(fmt, w), inside)).all()
        codes = np.searchsorted(tables(found)[0], found.decode()[0, 7])
        assert codes == 7  # an entry held elsewhere still has the nearest code, so little is to be added


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_little_to_go_by(per: str) -> None:
    fmt = KMeans(3, per)
    rng = np.random.default_rng(9)
    w = rng.standard_normal((5, 40)).astype(F)
    nothing = np.zeros(w.shape, F)
    assert np.array_equal(lloyd(fmt, w, nothing).decode(), project(fmt, w))  # no weight at all: all alike
    some = nothing.copy()
    some[2] = rng.random(40)
    assert np.isfinite(lloyd(fmt, w, some).decode()).all()
    zeros = np.zeros((3, 40), F)
    assert not lloyd(fmt, zeros, rng.random(zeros.shape).astype(F)).decode().any()
    everything = np.ones(w.shape, bool)
    assert np.isfinite(lloyd(fmt, w, None, without=everything).decode()).all()
    tiny = lloyd(fmt, w[:1, :1], np.ones((1, 1), F))
    assert np.array_equal(tiny.decode(), w[:1, :1])


def test_a_table_of_the_tensor_follows_the_weights() -> None:
    rng = np.random.default_rng(10)
    w = rng.standard_normal((64, 96)).astype(F)
    weights = np.where(w > 1, 100, 1).astype(F)
    fmt = KMeans(3, "tensor")
    ours = objective(w, lloyd(fmt, w, weights).decode(), weights).sum()
    assert ours < 0.6 * objective(w, project(fmt, w), weights).sum()


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (np.full((4, 8), np.nan, F), "hold a NaN"),
        (np.full((4, 8), -1, F), "negative"),
        (np.full(8, np.inf, F), "infinity"),
        (np.ones((8, 4), F), r"must be \[8\] or \[4, 8\], not \[8, 4\]"),
    ],
)
def test_weights_that_cannot_be(weights: np.ndarray, says: str) -> None:
    w = np.random.default_rng(0).standard_normal((4, 8)).astype(F)
    with pytest.raises(UsageError, match=says):
        lloyd(KMeans(2, "row"), w, weights, where="blk.0")


def test_matrices_that_cannot_be() -> None:
    w = np.full((4, 8), np.nan, F)
    with pytest.raises(FormatError, match=r"blk\.0 holds a NaN"):
        lloyd(KMeans(2, "row"), w, np.ones(8, F), where="blk.0")
    with pytest.raises(UsageError, match="4 x 8 truth values"):
        lloyd(KMeans(2, "row"), np.ones((4, 8), F), without=np.zeros((3, 8), bool))
