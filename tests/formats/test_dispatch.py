"""Which kernel runs a site: the reason when none does, and the same answer without one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from gossamer.formats import ArraySource, Dense, encode, parse

pytest.importorskip("gossamer._kernels")
dispatch = pytest.importorskip("gossamer.formats.dispatch")
linear, make_runner = dispatch.linear, dispatch.make_runner


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(runner, x):
    out = np.full((len(x), runner.rows), np.nan, np.float32)
    linear([runner], x, [out])
    return out


def close(y, w, x, bias=0.0):
    """A float32 sum of n terms errs by at most n 2^-23 times the sum of their magnitudes."""
    exact = x.astype(np.float64) @ w.astype(np.float64).T + bias
    size = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T + np.abs(bias)
    return bool((np.abs(y - exact) <= w.shape[1] * 2.0**-23 * size).all())


FUSED = ["f32 @ f32", "f16", "bf16", "int4/g32", "uint5/g8-m(f16) @ f32", "int8/row @ int8/token"]


@pytest.mark.parametrize("text", FUSED)
def test_a_fused_site(text):
    site = parse(text)
    runner = make_runner(encode(site.weight, ArraySource(normal(20, 40))), site)
    assert runner.refused is None
    assert runner.input == site.input
    assert runner.rows == 20


def test_a_row_too_long_for_integer_sums_runs_unfused():
    site = parse("int8/row @ int8/token")
    cols = 65536 + 8
    packed = encode(site.weight, ArraySource(normal(3, cols)))
    bias = normal(3, seed=1)
    runner = make_runner(packed, site, bias)
    assert "65536" in runner.refused
    assert runner.input == "f32"
    x = normal(2, cols, seed=2)
    assert close(run(runner, x), packed.decode(), x, bias)
    # Other inputs, and one block less, are fused.
    assert make_runner(packed, parse("int8/row @ bf16")).refused is None
    assert make_runner(encode(site.weight, ArraySource(normal(1, 65536))), site).refused is None


def test_the_columns_count_and_not_the_name_of_the_group():
    site = parse("int8/g131072 @ int8/token")
    assert make_runner(encode(site.weight, ArraySource(normal(3, 100))), site).refused is None


@dataclass(frozen=True)
class Unknown(Dense):
    """A format without a kernel."""

    def kernel(self, arrays, rows, cols):
        return None

    def __str__(self):
        return "unknown"


def test_a_format_without_a_kernel_runs_unfused():
    fmt = Unknown("bf16")
    packed = encode(fmt, ArraySource(normal(18, 33)))
    runner = make_runner(packed, parse("bf16"))
    assert runner.refused == "no kernel reads unknown"
    x = normal(3, 33, seed=1)
    assert close(run(runner, x), packed.decode(), x)
    ids = np.array([17, 0, 17])
    assert runner.look_up(ids).tobytes() == packed.decode()[ids].tobytes()


def test_sites_that_share_an_input_in_different_formats():
    x = normal(5, 64)
    sites = [parse(t) for t in ("int4/g32 @ f32", "int8/g32 @ f32", "f16 @ f32")]
    mixed = [*sites, parse("int8/row @ int8/token"), parse("bf16")]
    for some in (sites, mixed):
        runners = [make_runner(encode(s.weight, ArraySource(normal(9 + i, 64, seed=i))), s) for i, s in enumerate(some)]
        outs = [np.full((5, r.rows), np.nan, np.float32) for r in runners]
        linear(runners, x, outs)
        for runner, out in zip(runners, outs):
            assert out.tobytes() == run(runner, x).tobytes()


@pytest.mark.parametrize("text", ["f32", "bf16", "int4/g32", "uint4/g8", "uint5/row-m(bf16)"])
def test_look_up(text):
    site = parse(text)
    packed = encode(site.weight, ArraySource(normal(40, 19)))
    ids = np.array([39, 0, 16, 16, 15])
    assert make_runner(packed, site).look_up(ids).tobytes() == packed.decode()[ids].tobytes()
