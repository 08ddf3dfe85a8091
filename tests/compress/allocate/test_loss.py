"""Second-order predictions of what a change costs."""

from __future__ import annotations

import numpy as np
import pytest
from made_sites import site

from gossamer.compress.allocate import output_error, packed_bytes, second_order
from gossamer.errors import FormatError, UsageError
from gossamer.formats import ArraySource, encode, parse_weight


def case(rows=300, cols=24, tokens=100, seed=0):
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, cols)).astype(np.float32)
    return x, (x.T @ x / tokens).astype(np.float32), random.standard_normal((rows, cols)).astype(np.float32)


def test_the_error_is_that_of_the_output():
    x, hessian, delta = case()
    change = x @ delta.T
    assert output_error(delta, hessian) == pytest.approx((change**2).mean(axis=0), rel=1e-4)
    assert second_order(delta, hessian) == pytest.approx((change**2).sum(axis=1).mean(), rel=1e-4)


def test_output_weights_and_the_half():
    _, hessian, delta = case()
    weight = np.random.default_rng(1).uniform(size=len(delta))
    assert second_order(delta, hessian, weight) == pytest.approx(0.5 * weight @ output_error(delta, hessian))
    assert second_order(0 * delta, hessian, weight) == 0


def test_it_predicts_the_loss_of_a_quadratic():
    """A loss of which the Kronecker product is the exact curvature: 1/2 sum_n G_n E[(y_n - t_n)^2] at its least."""
    x, hessian, delta = case(rows=5)
    weight = np.array([1.0, 2, 0, 4, 0.5])
    loss = 0.5 * float((weight * (x @ delta.T) ** 2).sum(axis=1).mean())
    assert second_order(delta, hessian, weight) == pytest.approx(loss, rel=1e-4)


def test_bytes_are_those_that_are_stored():
    a = site(rows=50, cols=100)
    for text in ("int4/g32", "rows(10: int8/g32, int4/g32)", "int3/g16 + rank4(bf16)", "kmeans4/row"):
        fmt = parse_weight(text)
        w = np.random.default_rng(0).standard_normal((a.rows, a.cols)).astype(np.float32)
        assert packed_bytes(fmt, a.rows, a.cols) == encode(fmt, ArraySource(w)).nbytes


def test_shapes_that_do_not_fit_are_refused():
    _, hessian, delta = case()
    with pytest.raises(UsageError, match="Hessian"):
        output_error(delta, hessian[:3, :3])
    with pytest.raises(UsageError, match="3 output weights were given for a matrix of 300 rows"):
        second_order(delta, hessian, np.ones(3))
    with pytest.raises(FormatError, match="higher rank"):
        packed_bytes(parse_weight("rank64(bf16)"), 16, 100)
