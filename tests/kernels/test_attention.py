"""Paged attention against float64 numpy, at every instruction-set level."""

from __future__ import annotations

import numpy as np
import pytest

kernels = pytest.importorskip("gossamer._kernels")

from paged import ATOL, KINDS, Cache, check, normal, reference  # noqa: E402


@pytest.fixture(params=kernels.isa_supported(), autouse=True)
def level(request):
    before, threads = kernels.isa(), kernels.threads()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)
    kernels.set_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 7, 8, 32, 33, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (9, 1)])
def test_attention(kind, dim, heads, kv_heads):
    tokens = 150
    cache = Cache(kind, kv_heads, dim, tokens)
    cache.write(normal(tokens, kv_heads, dim), normal(tokens, kv_heads, dim, seed=1))
    positions = [0, 1, 14, 15, 16, 17, 31, 32, 33, 100, 149, 7]
    check(cache, normal(len(positions), heads, dim, seed=2), positions, tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [16, 32, 48, 128, 512])
def test_long_contexts(kind, block):
    """Several segments; decode and prefill rows, with windows that begin inside, at and before a segment."""
    tokens, heads, kv_heads, dim = 700, 6, 2, 32
    cache = Cache(kind, kv_heads, dim, tokens, block)
    cache.write(normal(tokens, kv_heads, dim), normal(tokens, kv_heads, dim, seed=1))
    for window in (0, 1, 15, 256, 300, 2**40):
        for positions in ([699], [255, 256, 257], [511, 512, 100, -1, 699, 3]):
            check(cache, normal(len(positions), heads, dim, seed=2), positions, tokens, window=window)
    check(cache, normal(1, heads, dim, seed=2), [699], tokens, softcap=1.5, scale=0.7)
    check(cache, normal(4, heads, dim, seed=2), [690, 691, 692, 5], tokens, softcap=50.0, window=40)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 90])
def test_mixed_steps(kind, window):
    """One call: prompt chunks of some sequences beside single tokens of others, the same sequence twice."""
    heads, kv_heads, dim = 6, 2, 40
    lengths = [300, 20, 1, 77]
    cache = Cache(kind, kv_heads, dim, max(lengths), block=16, sequences=len(lengths))
    for s, n in enumerate(lengths):
        cache.write(normal(n, kv_heads, dim, seed=s), normal(n, kv_heads, dim, seed=9 + s), sequence=s)
    step = [(1, p) for p in range(3, 20)] + [(0, 299), (2, 0)] + [(3, p) for p in (74, 75, 76)]
    step += [(1, 19), (0, -1), (0, 256)]
    sequence, positions = (list(x) for x in zip(*step))
    q = normal(len(step), heads, dim, seed=20)
    out, lse = cache.attend(q, positions, sequence=sequence, window=window)
    for m, (s, p) in enumerate(step):
        want, want_lse = reference(q[m : m + 1], [p], *cache.read(lengths[s], s), window=window, kind=kind)
        np.testing.assert_allclose(out[m], want[0], rtol=0, atol=ATOL[kind])
        np.testing.assert_allclose(lse[m], want_lse[0], rtol=1e-5, atol=ATOL[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_four_thousand_keys(kind):
    tokens, heads, dim = 4096, 2, 128
    cache = Cache(kind, 1, dim, tokens)
    cache.write(normal(tokens, 1, dim), normal(tokens, 1, dim, seed=1))
    check(cache, normal(2, heads, dim, seed=2), [4095, 4094], tokens)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "uint4"])
def test_rounding_is_relative_to_the_weights(kind):
    """A sharp softmax beside a flat one; weights a thousand times smaller than the heaviest still count."""
    tokens, dim = 256, 64
    k, v = 0.01 * normal(tokens, 1, dim), normal(tokens, 1, dim, seed=1)
    q = np.ones((1, 1, dim), np.float32)
    k[77] = 7 / dim  # e^7 = 1097 times as heavy as the others, which together weigh a quarter as much
    cache = Cache(kind, 1, dim, tokens)
    cache.write(k, v)
    check(cache, q, [255], tokens, scale=1.0, atol={"bfloat16": 4e-3, "int8": 5e-4, "uint4": 5e-4}[kind])


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_adversarial_scores(kind):
    tokens, dim = 600, 64
    k, v = normal(tokens, 1, dim), normal(tokens, 1, dim, seed=1)
    q = normal(3, 2, dim, seed=2)
    k[::50] = 0
    k[301] = 1e4 / np.abs(q).max() / 8  # one key with huge scores of either sign
    huge = Cache(kind, 1, dim, tokens)
    huge.write(k, v)
    check(huge, q, [598, 599, 301], tokens, scale=1.0)
    equal = Cache(kind, 1, dim, tokens)
    equal.write(np.ones_like(k), v)
    check(equal, np.ones_like(q), [598, 599, 301], tokens)
    np.testing.assert_allclose(equal.attend(np.ones_like(q), [599] * 3)[1], 8 + np.log(600), rtol=1e-6)


def test_segments_merge_by_log_sum_exp():
    """Windows cut one row's keys in two: the mergeable outputs give the whole."""
    tokens, dim = 500, 64
    k, v, q = normal(tokens, 1, dim), normal(tokens, 1, dim, seed=1), normal(1, 2, dim, seed=2)
    whole, front = Cache("float32", 1, dim, tokens), Cache("float32", 1, dim, tokens)
    whole.write(k, v)
    front.write(k, v)
    out, lse = whole.attend(q, [499])
    a, la = front.attend(q, [299])
    b, lb = whole.attend(q, [499], window=200)
    top = np.maximum(la, lb)
    wa, wb = np.exp(la - top), np.exp(lb - top)
    np.testing.assert_allclose((a * wa[..., None] + b * wb[..., None]) / (wa + wb)[..., None], out, atol=1e-6)
    np.testing.assert_allclose(top + np.log(wa + wb), lse, rtol=1e-6)


def test_rows_without_keys():
    cache = Cache("float32", 1, 40, 20)  # every slot still NaN
    out, lse = cache.attend(normal(2, 3, 40), [-1, -1])
    assert np.all(out == 0)
    assert np.all(lse == -np.inf)


@pytest.mark.parametrize("kind", KINDS)
def test_poison_stays_with_the_rows_that_see_it(kind):
    tokens, dim = 40, 32
    k, v = normal(tokens, 1, dim), normal(tokens, 1, dim, seed=1)
    k[20, 0, 3], v[30, 0, 4] = np.nan, np.inf
    cache = Cache(kind, 1, dim, tokens)
    cache.write(k, v)
    q = normal(tokens, 2, dim, seed=2)
    q[5, 0, 0] = np.inf
    out, lse = cache.attend(q, range(tokens))
    assert np.all(np.isfinite(out[:5]))
    assert np.all(np.isfinite(out[6:20]))
    assert np.all(np.isnan(out[20:]))
    assert np.all(np.isnan(lse[20:]))
    assert not np.any(np.isfinite(out[5, 0]))
    assert np.all(np.isfinite(out[5, 1]))


def test_infinitely_unlikely_keys_weigh_nothing():
    """Scores of -infinity in a whole segment drop out of the merge."""
    tokens, dim = 300, 16
    k, v, q = normal(tokens, 1, dim), normal(tokens, 1, dim, seed=1), np.abs(normal(1, 1, dim, seed=2)) + 0.1
    k[:256] = -np.inf
    cache = Cache("float32", 1, dim, tokens)
    cache.write(k, v)
    out, lse = cache.attend(q, [299])
    tail, tail_lse = cache.attend(q, [299], window=44)
    assert np.array_equal(out, tail)
    assert np.array_equal(lse, tail_lse)


@pytest.mark.parametrize("kind", KINDS)
def test_levels_agree(level, kind):
    tokens, dim = 300, 64
    cache = Cache(kind, 1, dim, tokens)
    cache.write(normal(tokens, 1, dim), normal(tokens, 1, dim, seed=1))
    q = normal(20, 4, dim, seed=2)
    out, _ = cache.attend(q, range(280, 300))
    kernels.set_isa("scalar")
    other = cache.attend(q, range(280, 300))[0]
    # Where weights are rounded to bfloat16, one that lies between two of them may fall to either side.
    np.testing.assert_allclose(out, other, rtol=0, atol=1e-3 if kind == "bfloat16" else 1e-5)
