"""Paged attention and cache writes against float64 numpy, at every instruction-set level."""

from __future__ import annotations

import numpy as np
import pytest

kernels = pytest.importorskip("gossamer._kernels")

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}


@pytest.fixture(params=kernels.isa_supported(), autouse=True)
def level(request):
    before, threads = kernels.isa(), kernels.threads()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)
    kernels.set_threads(threads)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def widen(bits):
    """bfloat16 stored as uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Cache:
    """A pool whose every slot starts as NaN (garbage codes and NaN scales for int8), with a shuffled table."""

    def __init__(self, kind, heads, dim, tokens, block=32, seed=0):
        rng = np.random.default_rng(seed)
        used = -(-tokens // block)
        blocks = used + 3
        self.kind, self.block = kind, block
        self.table = rng.permutation(blocks)[:used].astype(np.int32)
        shapes = (blocks, heads, dim, block), (blocks, heads, block, dim)
        dtype = TYPES[kind]
        fill = {"bfloat16": 0x7FC0, "int8": -77}.get(kind, np.nan)
        self.K, self.V = (np.full(shape, fill, dtype) for shape in shapes)
        self.k_scale, self.v_scale = None, None
        if kind == "int8":
            self.k_scale, self.v_scale = (np.full((blocks, heads, block), np.nan, np.float32) for _ in range(2))

    def write(self, k, v, start=0):
        positions = np.arange(start, start + len(k), dtype=np.int32)
        kernels.kv_write(k, v, positions, self.table, self.K, self.V, self.k_scale, self.v_scale)

    def read(self, tokens):
        """What the pool holds for positions 0..tokens-1, as float32 [tokens, heads, dim]."""
        K, V = self.K[self.table].transpose(0, 3, 1, 2), self.V[self.table].transpose(0, 2, 1, 3)
        if self.kind == "bfloat16":
            K, V = widen(K), widen(V)
        K, V = K.astype(np.float32), V.astype(np.float32)
        if self.kind == "int8":
            K = K * self.k_scale[self.table].transpose(0, 2, 1)[..., None]
            V = V * self.v_scale[self.table].transpose(0, 2, 1)[..., None]
        return tuple(x.reshape(-1, *x.shape[2:])[:tokens] for x in (K, V))

    def attend(self, q, positions, window=0, softcap=0.0, scale=None, lse=True):
        out, log = np.full_like(q, np.nan), np.full(q.shape[:2], np.nan, np.float32)
        kernels.attention(
            q, np.asarray(positions, np.int32), self.table, self.K, self.V, self.k_scale, self.v_scale, out,
            log if lse else None, q.shape[-1] ** -0.5 if scale is None else scale, window, softcap,
        )  # fmt: skip
        return out, log


def reference(q, positions, K, V, window=0, softcap=0.0, scale=None):
    """The definition, in float64: [tokens, heads, dim] and [tokens, heads]."""
    q, K, V = (x.astype(np.float64) for x in (q, K, V))
    group = q.shape[1] // K.shape[1]
    out, lse = np.zeros_like(q), np.full(q.shape[:2], -np.inf)
    for m, p in enumerate(positions):
        keys = slice(max(0, p - window + 1) if window else 0, p + 1)
        for h in range(q.shape[1]):
            s = K[keys, h // group] @ q[m, h] * (q.shape[-1] ** -0.5 if scale is None else scale)
            if softcap:
                s = softcap * np.tanh(s / softcap)
            if len(s):
                e = np.exp(s - s.max())
                out[m, h] = e @ V[keys, h // group] / e.sum()
                lse[m, h] = s.max() + np.log(e.sum())
    return out, lse


def check(cache, q, positions, tokens, atol=2e-5, **options):
    out, lse = cache.attend(q, positions, **options)
    want, want_lse = reference(q, positions, *cache.read(tokens), **options)
    np.testing.assert_allclose(out, want, rtol=0, atol=atol)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=atol)
    assert np.array_equal(cache.attend(q, positions, lse=False, **options)[0], out)


def bf16_round(x):
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("heads", "dim", "block"), [(1, 8, 16), (3, 64, 32), (2, 17, 48), (1, 1, 16)])
def test_kv_write(kind, heads, dim, block):
    tokens = 75
    cache = Cache(kind, heads, dim, tokens, block)
    k, v = normal(tokens, heads, dim), normal(tokens, heads, dim, seed=1) * 100
    k[3] = 0
    untouched = {name: getattr(cache, name).copy() for name in ("K", "V")}
    cache.write(k, v)
    for got, x in zip(cache.read(tokens), (k, v)):
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
    spare = np.setdiff1d(np.arange(len(cache.K)), cache.table)
    for name, before in untouched.items():
        assert np.array_equal(getattr(cache, name)[spare].view(np.uint8), before[spare].view(np.uint8))


def test_kv_write_extremes():
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


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dim", [1, 8, 32, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (9, 1)])
def test_attention(kind, dim, heads, kv_heads):
    tokens = 150
    cache = Cache(kind, kv_heads, dim, tokens)
    cache.write(normal(tokens, kv_heads, dim), normal(tokens, kv_heads, dim, seed=1))
    positions = [0, 1, 14, 15, 16, 17, 31, 32, 33, 100, 149, 7]
    check(cache, normal(len(positions), heads, dim, seed=2), positions, tokens)


@pytest.mark.parametrize("kind", TYPES)
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


def test_four_thousand_keys():
    tokens, heads, dim = 4096, 2, 128
    cache = Cache("float32", 1, dim, tokens)
    cache.write(normal(tokens, 1, dim), normal(tokens, 1, dim, seed=1))
    check(cache, normal(2, heads, dim, seed=2), [4095, 4094], tokens)


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


@pytest.mark.parametrize("kind", TYPES)
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


def test_levels_agree(level):
    tokens, dim = 300, 64
    cache = Cache("float16", 1, dim, tokens)
    cache.write(normal(tokens, 1, dim), normal(tokens, 1, dim, seed=1))
    q = normal(20, 4, dim, seed=2)
    out, _ = cache.attend(q, range(280, 300))
    kernels.set_isa("scalar")
    np.testing.assert_allclose(out, cache.attend(q, range(280, 300))[0], rtol=0, atol=1e-5)


def prefill(kind, k, v, q, chunk, window, block=32):
    """Writes and attends chunk by chunk into a fresh pool full of NaN."""
    cache = Cache(kind, k.shape[1], k.shape[2], len(k), block, seed=chunk)
    outs = []
    for start in range(0, len(k), chunk):
        stop = min(start + chunk, len(k))
        cache.write(k[start:stop], v[start:stop], start)
        outs.append(cache.attend(q[start:stop], range(start, stop), window=window))
    return [np.concatenate(parts) for parts in zip(*outs)]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 1, 40)])
def test_chunks_threads_and_blocks_do_not_matter(kind, window, heads, kv_heads, dim):
    tokens = 70
    k, v, q = normal(tokens, kv_heads, dim), normal(tokens, kv_heads, dim, seed=1), normal(tokens, heads, dim, seed=2)
    kernels.set_threads(1)
    whole = prefill(kind, k, v, q, tokens, window)
    assert np.all(np.isfinite(whole[0]))
    for threads in (1, 2):
        kernels.set_threads(threads)
        for chunk in (1, 7, 64, 70):
            for a, b in zip(whole, prefill(kind, k, v, q, chunk, window)):
                assert np.array_equal(a, b)
    for a, b in zip(whole, prefill(kind, k, v, q, 70, window, block=16)):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", TYPES)
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


def test_tables_may_repeat_and_forget_blocks():
    """A window reads no block before its first key, so the table may hold anything there."""
    tokens, dim = 200, 16
    cache = Cache("float32", 1, dim, tokens)
    cache.write(normal(tokens, 1, dim), normal(tokens, 1, dim, seed=1))
    q = normal(2, 2, dim, seed=2)
    want = cache.attend(q, [198, 199], window=30)
    cache.table[:5] = [-1, 2**31 - 1, -(2**31), 99, 4242]
    for a, b in zip(want, cache.attend(q, [198, 199], window=30)):
        assert np.array_equal(a, b)
    with pytest.raises(ValueError, match=r"block_table\[4\] is 4242"):
        cache.attend(q, [198, 199], window=60)
    with pytest.raises(ValueError, match="block_table"):
        cache.write(normal(1, 1, dim), normal(1, 1, dim), start=0)


def call(**change):
    """A sound call of attention with some arguments replaced."""
    arguments = {
        "q": np.zeros((2, 4, 8), np.float32), "positions": np.array([3, 4], np.int32),
        "block_table": np.array([1, 0], np.int32), "K": np.zeros((2, 2, 8, 16), np.float16),
        "V": np.zeros((2, 2, 16, 8), np.float16), "k_scale": None, "v_scale": None,
        "out": np.zeros((2, 4, 8), np.float32), "lse": None, "scale": 1.0, "window": 0, "softcap": 0.0,
    }  # fmt: skip
    kernels.attention(**{**arguments, **change})


INT8 = {"K": np.zeros((2, 2, 8, 16), np.int8), "V": np.zeros((2, 2, 16, 8), np.int8)}
SCALES = {"k_scale": np.zeros((2, 2, 16), np.float32), "v_scale": np.zeros((2, 2, 16), np.float32)}


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
        {"block_table": np.array([2, 0], np.int32)},
        {"block_table": np.array([-1, 0], np.int32)},
        {"block_table": np.zeros(0, np.int32)},
        {"block_table": np.zeros((1, 2), np.int32)},
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
    with pytest.raises(ValueError, match=r"\w+ .*\w"):
        call(**change)


def test_hostile_writes():
    cache = Cache("float32", 1, 8, 32)
    x = normal(2, 1, 8)
    for start in (31, -1, 2**31 - 2):
        with pytest.raises(ValueError, match="positions"):
            cache.write(x, x, start)
    with pytest.raises(ValueError, match="v must have the shape"):
        cache.write(x, x[:1])
    cache.K.flags.writeable = False
    with pytest.raises(ValueError, match="K must be a writable"):
        cache.write(x, x)


def test_no_tokens():
    cache = Cache("float32", 1, 8, 32)
    cache.write(normal(0, 1, 8), normal(0, 1, 8))
    out, lse = cache.attend(normal(0, 2, 8), [])
    assert out.shape == (0, 2, 8)
    assert lse.shape == (0, 2)
