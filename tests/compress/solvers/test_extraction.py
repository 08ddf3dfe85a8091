"""Which entries and columns are kept apart."""

from __future__ import annotations

import numpy as np
import pytest

from gossamer.compress.solvers.extraction import by_error, by_magnitude, by_sensitivity, columns, columns_above
from gossamer.errors import UsageError

F = np.float32


def test_columns_of_the_largest_inputs() -> None:
    absmax = np.array([1, 9, 3, 9, 0, 7], F)
    assert columns(absmax, 3).tolist() == [1, 3, 5]
    assert columns(absmax, 1).tolist() == [1]  # of equal ones the first
    assert columns_above(absmax).tolist() == [1, 3, 5]
    assert columns_above(absmax, 10).tolist() == []
    with pytest.raises(UsageError, match="NaN"):
        columns(np.array([np.nan, 1], F), 1)


def test_the_largest_weights() -> None:
    w = np.array([[1, -5, 0], [5, 0, 2]], F)
    assert by_magnitude(w, 1).tolist() == [[False, True, False], [False, False, False]]
    assert by_magnitude(w, 2).tolist() == [[False, True, False], [True, False, False]]
    assert np.count_nonzero(by_magnitude(w, 6)) == 4  # zeros are not kept
    assert not by_magnitude(w, 0).any()


def test_errors_count_by_the_size_of_their_input() -> None:
    error = np.array([[1, 2, 3]], F)
    assert by_error(error, None, 1).tolist() == [[False, False, True]]
    assert by_error(error, np.array([100, 1, 1], F), 1).tolist() == [[True, False, False]]


def test_sensitive_entries_first_then_the_largest() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((40, 100)).astype(F)
    fisher = rng.random((40, 100)).astype(F)
    kept = by_sensitivity(w, fisher, 20, sensitive=0.05)
    assert np.count_nonzero(kept) == 20
    top = np.zeros(w.shape, bool)
    top.ravel()[np.argsort(-fisher, axis=None)[:2]] = True
    assert kept[top].all()
    rest = np.where(top, 0, np.abs(w))
    assert np.array_equal(kept & ~top, rest >= np.sort(rest, axis=None)[-18])


def test_reach_is_measured_from_the_quartiles() -> None:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((40, 100)).astype(F)
    low, high = np.percentile(w, [25, 75])
    edge = max(abs(low - 1.8 * (high - low)), abs(high + 1.8 * (high - low)))
    kept = by_sensitivity(w, np.zeros(w.shape, F), 4000, sensitive=0, reach=1.8)
    assert np.array_equal(kept, np.abs(w) >= edge)


def test_tiny_matrices_keep_none_for_their_sensitivity() -> None:
    w = np.array([[1, 2], [3, 4]], F)
    assert not by_sensitivity(w, np.ones((2, 2), F), 0).any()
    assert by_sensitivity(w, np.ones((2, 2), F), 1).tolist() == [[False, False], [False, True]]


def test_fisher_information_that_cannot_be() -> None:
    w = np.ones((2, 2), F)
    for bad in (np.full((2, 2), np.nan, F), np.full((2, 2), -1, F)):
        with pytest.raises(UsageError, match="NaN, an infinity or a negative"):
            by_sensitivity(w, bad, 1)
    with pytest.raises(UsageError, match="2 x 2 matrix"):
        by_sensitivity(w, np.ones((3, 2), F), 1)
