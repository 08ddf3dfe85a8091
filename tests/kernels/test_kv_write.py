"""Writing keys and values: round trips against numpy, at every instruction-set level."""

from __future__ import annotations

import numpy as np
import pytest

kernels = pytest.importorskip("gossamer._kernels")

from paged import KINDS, Cache, bf16_round, normal, widen  # noqa: E402


@pytest.fixture(params=kernels.isa_supported(), autouse=True)
def level(request):
    before, threads = kernels.isa(), kernels.threads()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)
    kernels.set_threads(threads)


def bytes_of(pool):
    return [x.view(np.uint8).copy() for x in pool if x is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "dim", "block"), [(1, 8, 16), (3, 64, 32), (2, 17, 48), (1, 1, 16), (2, 7, 16)])
def test_kv_write(kind, heads, dim, block):
    tokens = 75
    cache = Cache(kind, heads, dim, tokens, block)
    k, v = normal(tokens, heads, dim), normal(tokens, heads, dim, seed=1) * 100
    k[3] = 0
    before = bytes_of(cache.pool)
    cache.write(k, v)
    for got, x in zip(cache.read(tokens), (k, v)):
        if kind == "uint4":
            continue
        if kind == "float32":
            want = x
        elif kind == "float16":
            want = x.astype(np.float16).astype(np.float32)
        elif kind == "bfloat16":
            want = widen(bf16_round(x))
        else:
            s = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
            codes = np.rint(np.divide(x, s, out=np.zeros_like(x), where=s > 0))
            want = codes * s
        assert np.array_equal(got, want)
    spare = np.setdiff1d(np.arange(len(cache.pool[0])), cache.tables)
    for now, then in zip(bytes_of(cache.pool), before):
        assert np.array_equal(now[spare], then[spare])


@pytest.mark.parametrize("kind", ["int8", "uint4"])
@pytest.mark.parametrize("dim", [1, 7, 64, 80])
@pytest.mark.parametrize("shift", [0.0, 5.0, -300.0])
def test_round_trip_is_within_half_a_step(kind, dim, shift):
    """The card of a quantized cache: error at most half a step; constant rows exact; an outlier stays in its row."""
    tokens = 200
    x = normal(tokens, 2, dim) * np.exp(normal(tokens, 2, 1, seed=1) * 3) + np.float32(shift)
    x[50], x[51], x[60, 0, 0] = 0.0, np.float32(shift), 3e4
    cache = Cache(kind, 2, dim, tokens)
    cache.write(x, x)
    for got in cache.read(tokens):
        x64 = x.astype(np.float64)
        if kind == "int8":
            step = np.abs(x64).max(axis=-1, keepdims=True) / 127
        else:  # a float16 scale and minimum, both rounded outwards by at most 2^-10 of their size
            low, high = x64.min(axis=-1, keepdims=True), x64.max(axis=-1, keepdims=True)
            step = ((high - low + np.abs(low) * 2.0**-10) / 15) * (1 + 2.0**-10) + 2.0**-24
        assert np.all(np.abs(got - x64) <= step / 2 + np.abs(x64) * 2.0**-21)
        assert np.all(got[50] == 0)
    assert np.all(np.abs(got[51] - shift) <= (0 if kind == "uint4" else abs(shift) * 2.0**-22))


def test_every_nibble_lands():
    """Slots share bytes of uint4 values: in any order of writing, and when written again, each keeps its codes."""
    dim = 9
    x = np.random.default_rng(0).integers(0, 16, (64, 1, dim)).astype(np.float32)
    x[:, :, 0], x[:, :, 1] = 0, 15  # so that every scale is 1 and every minimum 0
    cache = Cache("uint4", 1, dim, 64)
    order = np.random.default_rng(1).permutation(64)
    for p in [*order, *order[:10]]:
        cache.write(x[p : p + 1], x[p : p + 1], start=int(p))
    for got in cache.read(64):
        assert np.array_equal(got, x)


@pytest.mark.parametrize("kind", KINDS)
def test_writes_of_several_sequences(kind):
    """One call for the tokens of several sequences gives the bytes of one call for each; threads do not matter."""
    heads, dim, n = 3, 33, 40
    k, v = normal(n, heads, dim), normal(n, heads, dim, seed=1)
    rng = np.random.default_rng(2)
    sequence = rng.integers(0, 3, n).astype(np.int32)
    positions = np.array([np.sum(sequence[:i] == sequence[i]) for i in range(n)], np.int32)
    kernels.set_threads(1)
    alone = Cache(kind, heads, dim, n, 16, sequences=3)
    for s in range(3):
        alone.write(k[sequence == s], v[sequence == s], sequence=s)
    for threads in (1, 2, 5):
        kernels.set_threads(threads)
        mixed = Cache(kind, heads, dim, n, 16, sequences=3)
        kernels.kv_write(k, v, positions, sequence, mixed.tables, *mixed.pool)
        for a, b in zip(bytes_of(mixed.pool), bytes_of(alone.pool)):
            assert np.array_equal(a, b)


def test_extremes():
    k = np.zeros((4, 1, 20), np.float32)
    k[0, 0, :5] = [1e30, -1e30, 65519.0, 65520.0, -1e-30]
    k[1, 0, :2] = [np.inf, -np.inf]
    k[2, 0, 19] = np.nan
    k[3] = 1e-42
    half = Cache("float16", 1, 20, 4)
    half.write(k, k)
    for x in half.read(4):
        assert x[0, 0, :5].tolist() == [65504.0, -65504.0, 65504.0, 65504.0, 0.0]
        assert x[1, 0, :2].tolist() == [np.inf, -np.inf]
        assert np.isnan(x[2, 0, 19])
        assert np.all(np.isfinite(x[2, 0, :19]))
    codes = Cache("int8", 1, 20, 4)
    codes.write(k, k)
    for x in codes.read(4):
        assert np.all(np.isnan(x[1:3]))
        assert np.all(np.isfinite(x[[0, 3]]))
        assert x[0, 0, :2].tolist() == pytest.approx([1e30, -1e30], rel=1e-6)
    nibbles = Cache("uint4", 1, 20, 4)
    nibbles.write(k, k)
    for x in nibbles.read(4):
        assert np.all(np.isnan(x[1:3]))
        assert x[0, 0, :2].tolist() == [65504.0 * 14, -65504.0]  # float16 scales and minima end there
        assert np.all(np.abs(x[3]) < 1e-7)


def test_hostile_writes():
    cache = Cache("float32", 1, 8, 32)
    x = normal(2, 1, 8)
    for start in (31, -1, 2**31 - 2):
        with pytest.raises(ValueError, match="positions"):
            cache.write(x, x, start)
    with pytest.raises(ValueError, match="v must have the shape"):
        cache.write(x, x[:1])
    cache.pool[0].flags.writeable = False
    with pytest.raises(ValueError, match="K must be a writable"):
        cache.write(x, x)
    narrow = Cache("uint4", 1, 8, 32)
    with pytest.raises(ValueError, match="sequence holds 1"):
        narrow.write(x, x, sequence=1)
    K, V, k_scale, v_scale = narrow.pool
    for wrong in ((K[..., :3].copy(), V, k_scale, v_scale), (K, V[:, :, :3].copy(), k_scale, v_scale),
                  (K, V, k_scale, None), (K, V, k_scale.astype(np.float32), v_scale),
                  (K, V, k_scale[:, :, :1].copy(), v_scale)):  # fmt: skip
        with pytest.raises(ValueError, match=r"\w+ must .*\w"):
            kernels.kv_write(x, x, np.arange(2, dtype=np.int32), np.zeros(2, np.int32), narrow.tables, *wrong)
