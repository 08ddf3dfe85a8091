"""Attention bit by bit: threads, batches, chunks and block sizes do not matter; hostile arguments are refused."""

from __future__ import annotations

import numpy as np
import pytest

kernels = pytest.importorskip("gossamer._kernels")

from paged import KINDS, Cache, normal  # noqa: E402


@pytest.fixture(params=kernels.isa_supported(), autouse=True)
def level(request):
    before, threads = kernels.isa(), kernels.threads()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)
    kernels.set_threads(threads)


def prefill(kind, k, v, q, chunk, window, block=32):
    """Writes and attends chunk by chunk into a fresh pool full of NaN."""
    cache = Cache(kind, k.shape[1], k.shape[2], len(k), block, seed=chunk)
    outs = []
    for start in range(0, len(k), chunk):
        stop = min(start + chunk, len(k))
        cache.write(k[start:stop], v[start:stop], start)
        outs.append(cache.attend(q[start:stop], range(start, stop), window=window))
    return [np.concatenate(parts) for parts in zip(*outs)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 1, 40)])
def test_chunks_threads_and_blocks_do_not_matter(kind, window, heads, kv_heads, dim):
    tokens = 70
    k, v, q = normal(tokens, kv_heads, dim), normal(tokens, kv_heads, dim, seed=1), normal(tokens, heads, dim, seed=2)
    kernels.set_threads(1)
    whole = prefill(kind, k, v, q, tokens, window)
    assert np.all(np.isfinite(whole[0]))
    for threads in (1, 2, 5):
        kernels.set_threads(threads)
        for chunk in (1, 7, 64, 70):
            for a, b in zip(whole, prefill(kind, k, v, q, chunk, window)):
                assert np.array_equal(a, b)
    for a, b in zip(whole, prefill(kind, k, v, q, 70, window, block=16)):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_split_decode_is_bitwise_equal(kind, kv_heads):
    """Long enough that several threads share the segments of one row."""
    tokens, dim = 2100, 64
    cache = Cache(kind, kv_heads, dim, tokens)
    cache.write(normal(tokens, kv_heads, dim), normal(tokens, kv_heads, dim, seed=1))
    q = normal(3, 3 * kv_heads, dim, seed=2)
    for window in (0, 1000):
        kernels.set_threads(1)
        together = cache.attend(q, [2097, 2098, 2099], window=window)
        for threads in (1, 2, 3, 5):
            kernels.set_threads(threads)
            alone = [cache.attend(q[i : i + 1], [2097 + i], window=window) for i in range(3)]
            for a, b in zip(together, (np.concatenate(x) for x in zip(*alone))):
                assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 300])
def test_batch_composition_does_not_matter(kind, window):
    """Every token of a mixed step has the bits it has alone, whatever the others are and however many threads run."""
    heads, kv_heads, dim = 6, 2, 33
    lengths = [1100, 40, 300]
    cache = Cache(kind, kv_heads, dim, max(lengths), block=32, sequences=3)
    for s, n in enumerate(lengths):
        cache.write(normal(n, kv_heads, dim, seed=s), normal(n, kv_heads, dim, seed=9 + s), sequence=s)
    step = [(0, 1099)] + [(1, p) for p in range(20, 40)] + [(2, p) for p in range(253, 258)] + [(0, 7), (2, 299)]
    q = normal(len(step), heads, dim, seed=20)
    sequence, positions = (np.array(x) for x in zip(*step))
    kernels.set_threads(1)
    alone = [cache.attend(q[m : m + 1], [p], sequence=s, window=window) for m, (s, p) in enumerate(step)]
    want = [np.concatenate(x) for x in zip(*alone)]
    rng = np.random.default_rng(0)
    for threads in (1, 2, 5):
        kernels.set_threads(threads)
        for size in (len(step), 9, 2):
            some = rng.permutation(len(step))[:size]
            got = cache.attend(q[some], positions[some], sequence=sequence[some], window=window)
            for a, b in zip(got, want):
                assert np.array_equal(a, b[some])
        for a, b in zip(cache.attend(q, positions, sequence=sequence, window=window), want):
            assert np.array_equal(a, b)


def test_tables_may_repeat_and_forget_blocks():
    """A window reads no block before its first key, so the table may hold anything there."""
    tokens, dim = 200, 16
    cache = Cache("float32", 1, dim, tokens)
    cache.write(normal(tokens, 1, dim), normal(tokens, 1, dim, seed=1))
    q = normal(2, 2, dim, seed=2)
    want = cache.attend(q, [198, 199], window=30)
    cache.tables[0, :5] = [-1, 2**31 - 1, -(2**31), 99, 4242]
    for a, b in zip(want, cache.attend(q, [198, 199], window=30)):
        assert np.array_equal(a, b)
    with pytest.raises(ValueError, match=r"tables\[0, 4\] is 4242"):
        cache.attend(q, [198, 199], window=60)
    with pytest.raises(ValueError, match="tables"):
        cache.write(normal(1, 1, dim), normal(1, 1, dim), start=0)


def call(**change):
    """A sound call of attention with some arguments replaced."""
    arguments = {
        "q": np.zeros((2, 4, 8), np.float32), "positions": np.array([3, 4], np.int32),
        "sequence": np.zeros(2, np.int32), "tables": np.array([[1, 0]], np.int32),
        "K": np.zeros((2, 2, 8, 16), np.float16),
        "V": np.zeros((2, 2, 16, 8), np.float16), "k_scale": None, "v_scale": None,
        "out": np.zeros((2, 4, 8), np.float32), "lse": None, "scale": 1.0, "window": 0, "softcap": 0.0,
    }  # fmt: skip
    kernels.attention(**{**arguments, **change})


INT8 = {"K": np.zeros((2, 2, 2, 16, 4), np.uint8), "V": np.zeros((2, 2, 4, 8, 4), np.uint8)}
UINT4 = {"K": np.zeros((2, 2, 1, 16, 4), np.uint8), "V": np.zeros((2, 2, 2, 8, 4), np.uint8)}
BF16 = {"K": np.zeros((2, 2, 4, 16, 2), np.uint16), "V": np.zeros((2, 2, 8, 8, 2), np.uint16)}
SCALES = {"k_scale": np.zeros((2, 2, 16), np.float32), "v_scale": np.zeros((2, 2, 16), np.float32)}
HALVES = {"k_scale": np.zeros((2, 2, 2, 16), np.float16), "v_scale": np.zeros((2, 2, 2, 16), np.float16)}


@pytest.mark.parametrize(
    "change",
    [
        {"q": np.zeros((2, 3, 8), np.float32)},
        {"q": np.zeros((2, 4, 9), np.float32)},
        {"q": np.zeros((2, 0, 8), np.float32), "out": np.zeros((2, 0, 8), np.float32)},
        {"q": np.zeros((2, 4, 8))},
        {"q": np.zeros((8, 4, 2), np.float32).T},
        {"positions": np.array([3], np.int32)},
        {"positions": np.array([3, 32], np.int32)},
        {"positions": np.array([3, -2], np.int32)},
        {"positions": np.array([3, 2**31 - 1], np.int32)},
        {"positions": np.array([3, 4], np.int64)},
        {"tables": np.array([[2, 0]], np.int32)},
        {"tables": np.array([[-1, 0]], np.int32)},
        {"tables": np.zeros((1, 0), np.int32)},
        {"tables": np.zeros((0, 2), np.int32)},
        {"tables": np.zeros(2, np.int32)},
        {"tables": np.zeros((1, 2), np.int64)},
        {"sequence": np.array([0, 1], np.int32)},
        {"sequence": np.array([-1, 0], np.int32)},
        {"sequence": np.zeros(1, np.int32)},
        {"K": np.zeros((2, 2, 8, 15), np.float16)},
        {"K": np.zeros((2, 2, 8, 24), np.float16)},
        {"K": np.zeros((2, 2, 8, 16), np.float32)},
        {"K": np.zeros((2, 2, 8, 16), np.float64), "V": np.zeros((2, 2, 16, 8), np.float64)},
        {"V": np.zeros((2, 2, 8, 16), np.float16)},
        {"V": np.zeros((1, 2, 16, 8), np.float16)},
        INT8,
        {**INT8, **SCALES, "k_scale": None},
        {**INT8, **SCALES, "v_scale": np.zeros((2, 2, 15), np.float32)},
        {**INT8, **SCALES, "v_scale": np.zeros((2, 2, 16), np.float64)},
        SCALES,
        UINT4,
        {**UINT4, **SCALES},
        {**INT8, **HALVES},
        {**UINT4, **HALVES, "v_scale": np.zeros((2, 2, 16), np.float16)},
        {**BF16, "V": np.zeros((2, 2, 16, 8), np.uint16)},
        {**BF16, **SCALES},
        {"K": np.zeros((1, 1, 5000, 16), np.float16), "V": np.zeros((1, 1, 16, 5000), np.float16)},
        {"out": np.zeros((2, 4, 7), np.float32)},
        {"out": np.zeros((2, 4, 8), np.float16)},
        {"lse": np.zeros((2, 3), np.float32)},
        {"scale": np.nan},
        {"window": -1},
        {"softcap": -1.0},
        {"softcap": np.inf},
    ],
)
def test_hostile_arguments(change):
    call()
    call(**INT8, **SCALES)
    call(**UINT4, **HALVES)
    call(**BF16)
    with pytest.raises(ValueError, match=r"\w+ .*\w"):
        call(**change)


def test_no_tokens():
    cache = Cache("float32", 1, 8, 32)
    cache.write(normal(0, 1, 8), normal(0, 1, 8))
    out, lse = cache.attend(normal(0, 2, 8), [])
    assert out.shape == (0, 2, 8)
    assert lse.shape == (0, 2)
