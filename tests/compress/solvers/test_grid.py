"""A grid gives the values that its packed form decodes to, and the nearest of them."""

from __future__ import annotations

import numpy as np
import pytest
from solver_cases import EVERY, PLAIN, matrix, parsed

from gossamer.compress.solvers import Grid, fit_grid, nearest
from gossamer.errors import FormatError
from gossamer.formats import ArraySource, encode, fit, parse_weight
from gossamer.formats.numbers import FLOATS

every = pytest.mark.parametrize("fmt", parsed(EVERY), ids=str)


@every
@pytest.mark.parametrize("shape", [(48, 256), (37, 83), (1, 16)])
def test_a_packed_matrix_is_its_grid_and_codes(fmt, shape):
    packed = encode(fmt, ArraySource(matrix(*shape)))
    grid, codes = Grid.of(packed)
    assert codes.shape == shape
    assert np.array_equal(grid.values(codes), packed.decode())
    again = grid.pack(codes)
    again.validate("the matrix")
    assert np.array_equal(again.decode(), packed.decode())
    for name, array in packed.arrays.items():
        # What pads rows may differ: decode reads none of it.
        assert np.array_equal(array, again.arrays[name]) or shape[0] % 16


@every
def test_other_codes_are_packed_as_they_are(fmt):
    grid, codes = Grid.of(encode(fmt, ArraySource(matrix(37, 96))))
    mixed = np.random.default_rng(0).permuted(codes, axis=1)
    packed = grid.pack(mixed)
    assert np.array_equal(Grid.of(packed)[1], mixed)
    assert np.array_equal(packed.decode(), grid.values(mixed))


@every
def test_nearest_is_nearest(fmt):
    w = matrix(24, 80)
    grid = fit_grid(fmt, w)
    codes, values = grid.nearest(w)
    assert np.array_equal(values, grid.values(codes))
    narrow = fmt.number.family == "int" and not fit.signed(fmt, False)
    usable = [c for c in range(narrow, fmt.number.levels) if np.isfinite(fmt.number.values[c])]
    best = np.min([np.abs(grid.values(np.full(w.shape, c, np.uint8)) - w) for c in usable], axis=0)
    assert np.allclose(np.abs(values - w), best, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("fmt", parsed(PLAIN), ids=str)
def test_without_a_search_scales_and_codes_are_those_of_encode(fmt):
    w = matrix(64, 272)
    grid, codes = Grid.of(encode(fmt, ArraySource(w)))
    fitted = fit_grid(fmt, w)
    assert np.array_equal(fitted.s, grid.s)
    for name in ("z", "m"):
        ours, theirs = getattr(fitted, name), getattr(grid, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or np.array_equal(ours, theirs)
    # encode moves a few codes so that it repeats itself (the last code of a zero-point group, small scales).
    assert np.mean(fitted.nearest(w)[0] != codes) <= (2e-4 if fmt.scale in FLOATS else 2e-3)
    assert np.array_equal(nearest(fmt, w).decode(), encode(fmt, ArraySource(w)).decode())


def test_some_columns():
    w = matrix(20, 100)
    grid = fit_grid(parse_weight("uint4/g32"), w)
    codes, values = grid.nearest(w)
    some = np.array([99, 3, 40, 3])
    for columns in (some, slice(30, 70)):
        found = grid.nearest(w[:, columns], columns)
        assert np.array_equal(found[0], codes[:, columns])
        assert np.array_equal(found[1], values[:, columns])
        assert np.array_equal(grid.values(codes[:, columns], columns), values[:, columns])


def test_what_does_not_fit_is_refused():
    w = matrix(20, 100)
    grid = fit_grid(parse_weight("int4/g32"), w)
    with pytest.raises(FormatError, match="do not fit a grid of 20 x 100"):
        grid.pack(np.zeros((20, 99), np.uint8))
    with pytest.raises(FormatError, match="no scales and codes"):
        Grid.of(encode(parse_weight("bf16"), ArraySource(w)))
    with pytest.raises(FormatError, match="multiple of 16 columns"):
        fit_grid(parse_weight("int4/g16*(int8/g8)").scale, w)
