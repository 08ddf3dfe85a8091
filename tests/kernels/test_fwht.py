"""The fast Walsh-Hadamard transform against the dense matrix, at every instruction-set level."""

from __future__ import annotations

import numpy as np
import pytest

from gossamer import ops

LEVELS = ops.isa_supported()
PALEY_ONE = [12, 20, 24, 44, 48, 60, 68, 72, 80, 84, 104, 108, 132, 140, 152, 164, 168]
PALEY_TWO = [28, 36, 76, 124, 148]


@pytest.fixture(params=LEVELS, autouse=True)
def level(request):
    before, threads = ops.isa(), ops.threads()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)
    ops.set_threads(threads)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sylvester(n):
    h = np.ones((1, 1), np.int64)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def prime(q):
    return q > 1 and all(q % d for d in range(2, q))


def paley(k):
    """H_k as the format documents it, written out from the definition."""

    def core(q, border):
        squares = {a * a % q for a in range(1, q)}
        s = np.zeros((q + 1, q + 1), np.int64)
        s[0, 1:] = 1
        s[1:, 0] = border
        for i in range(q):
            for j in range(q):
                s[1 + i, 1 + j] = 0 if i == j else 1 if (i - j) % q in squares else -1
        return s

    if prime(k - 1) and (k - 1) % 4 == 3:
        return core(k - 1, -1) + np.eye(k, dtype=np.int64)
    q = k // 2 - 1
    assert prime(q)
    assert q % 4 == 1
    plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return np.kron(core(q, 1), plus) + np.kron(np.eye(q + 1, dtype=np.int64), minus)


def matrix(n):
    if n & (n - 1) == 0:
        return sylvester(n)
    k = next(k for k in sorted(PALEY_ONE + PALEY_TWO) if n % k == 0 and (n // k) & (n // k - 1) == 0)
    return np.kron(paley(k), sylvester(n // k))


def dense(x, block, signs=None, transpose=False):
    """Float64 reference, unscaled."""
    h = matrix(block).astype(np.float64)
    y = x.astype(np.float64)
    if signs is not None and not transpose:
        y = y * signs
    shape = y.shape
    y = (y.reshape(-1, block) @ (h if transpose else h.T)).reshape(shape)
    return y * signs if signs is not None and transpose else y


def unit(block):
    return np.float32(1 / np.sqrt(float(block)))


SIZES = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 12, 40, 56, 72, 192, 384, 576, 704, 1536, 2304]


@pytest.mark.parametrize("block", SIZES)
@pytest.mark.parametrize("transpose", [False, True])
def test_integers_are_exact(block, transpose):
    """Below 2^24 every sum is exact in float32, so the result is the integer times the one rounded scale."""
    rng = np.random.default_rng(block)
    width = block * (3 if block <= 256 else 1)
    x = rng.integers(-1023, 1024, (3, width)).astype(np.float32)
    signs = np.where(rng.random(width) < 0.5, -1, 1).astype(np.float32)
    for d in (None, signs):
        y = x.copy()
        ops.fwht(y, block, d, transpose)
        scale = unit(block)
        if transpose and d is not None:
            want = (dense(x, block, None, True).astype(np.float32) * scale) * d
        else:
            want = dense(x, block, d, transpose).astype(np.float32) * scale
        assert np.array_equal(y, want)


@pytest.mark.parametrize("k", PALEY_ONE + PALEY_TWO)
def test_every_paley_order(k):
    h = matrix(k)
    assert np.array_equal(h @ h.T, k * np.eye(k, dtype=np.int64))
    y = np.eye(k, dtype=np.float32)
    ops.fwht(y, k)
    assert np.array_equal(y, h.T.astype(np.float32) * unit(k))  # row i of y is H e_i, a column of H


@pytest.mark.parametrize("block", [8192, 16384, 32768, 5632, 14336])
def test_long_blocks(block):
    """Against one row of the matrix a stride apart: H[i] . x, for orders whose matrix is too large to write out."""
    x = normal(2, block)
    y = x.copy()
    ops.fwht(y, block)
    k = {5632: 44, 14336: 28}.get(block, 1)
    power = block // k
    outer = paley(k) if k > 1 else np.ones((1, 1), np.int64)
    columns = np.arange(power)
    for i in range(0, block, block // 11):
        parity = np.array([(int(c) & (i % power)).bit_count() & 1 for c in columns])
        row = np.kron(outer[i // power], 1 - 2 * parity)
        np.testing.assert_allclose(y[:, i], x.astype(np.float64) @ row / np.sqrt(block), rtol=0, atol=2e-6)
    np.testing.assert_allclose(
        np.linalg.norm(y.astype(np.float64), axis=1), np.linalg.norm(x.astype(np.float64), axis=1), rtol=1e-6
    )


@pytest.mark.parametrize("block", [2, 64, 128, 4096, 12, 576, 1536, 14336])
def test_inverse_and_norm(block):
    x = normal(3, block if block > 100 else 5 * block, seed=block)
    signs = np.where(normal(x.shape[1], seed=1) < 0, -1, 1).astype(np.float32)
    y = x.copy()
    ops.fwht(y, block, signs)
    norms = [np.linalg.norm(a.astype(np.float64), axis=1) for a in (x, y)]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)
    ops.fwht(y, block, signs, transpose=True)
    np.testing.assert_allclose(y, x, rtol=0, atol=1e-5)
    if block & (block - 1) == 0:  # symmetric
        for _ in range(2):
            ops.fwht(y, block)
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "block"),
    [(64, 64), (128, 128), (576, 576), (768, 768), (1536, 1536), (2048, 2048), (2304, 2304), (5632, 5632), (768, 256),
     (5632, 512), (11008, 256), (60, 12), (48, 8)],
)  # fmt: skip
def test_products_are_unchanged(width, block):
    x, w = normal(5, width), normal(7, width, seed=1)
    signs = np.where(normal(width, seed=2) < 0, -1, 1).astype(np.float32)
    want = x.astype(np.float64) @ w.T.astype(np.float64)
    for a in (x, w):
        ops.fwht(a, block, signs)
    got = x.astype(np.float64) @ w.T.astype(np.float64)
    assert np.abs(got - want).max() <= 1e-5 * np.linalg.norm(want) / np.sqrt(want.size)


def test_an_outlier_channel_is_spread():
    """One channel 60 times the others: int8 with one scale a tensor loses far less after the transform."""
    x, w = normal(512, 256), normal(64, 256, seed=1)
    x[:, 17] *= 60

    def error(x, w):
        s = np.abs(x).max() / 127
        want = x.astype(np.float64) @ w.T
        return np.linalg.norm(np.rint(x / s) * s @ w.T - want) / np.linalg.norm(want)

    # Measured where the outlier's own product does not hide the rest: its weights are small.
    w[:, 17] *= 0.01
    before = error(x, w)
    ops.fwht(x, 256)
    ops.fwht(w, 256)
    assert error(x, w) < before / 4


def test_levels_threads_and_rows_give_the_same_bits(level):
    for block, width in [(4, 20), (16, 48), (64, 192), (1024, 2048), (8192, 8192), (12, 36), (576, 1152), (1536, 1536)]:
        x = normal(40, width) * np.exp(normal(40, width, seed=1) * 4)
        want = x.copy()
        ops.set_isa(LEVELS[0])
        ops.set_threads(1)
        ops.fwht(want, block)
        ops.set_isa(level)
        for threads in (1, 2, 3):
            ops.set_threads(threads)
            y = x.copy()
            ops.fwht(y, block)
            assert np.array_equal(y.view(np.uint32), want.view(np.uint32))
        one = x[7:8].copy()
        ops.fwht(one, block)
        assert np.array_equal(one, want[7:8])


def test_nothing_and_special_values():
    for shape in [(0, 64), (3, 0)]:
        ops.fwht(np.zeros(shape, np.float32), 32)
    x = np.zeros((2, 96), np.float32)
    x[1, 40] = np.nan
    ops.fwht(x, 32)
    assert not x[0].any()
    assert np.isnan(x[1, 32:64]).all()
    assert not x[1, :32].any()
    assert not x[1, 64:].any()
    y = np.ones((1, 24), np.float32)
    y[0, 5] = np.inf
    ops.fwht(y, 12)
    assert np.isinf(y[0, :12]).all()
    assert np.isfinite(y[0, 12:]).all()


def frozen(a):
    a.flags.writeable = False
    return a


@pytest.mark.parametrize("block", [1, 0, -4, 3, 6, 14, 22, 33, 172, 344, 11008, 52, 1 << 21, 2**62])
def test_orders_without_a_matrix(block):
    x = normal(1, 64)
    before = x.copy()
    with pytest.raises(ValueError, match="choose a block"):
        ops.fwht(x, block)
    assert np.array_equal(x, before)


@pytest.mark.parametrize(
    ("x", "signs", "word"),
    [
        (normal(2, 60), None, "multiple"),
        (normal(64), None, "axes"),
        (normal(2, 64).astype(np.float64), None, "float32"),
        (normal(64, 2).T, None, "contiguous"),
        (normal(2, 128)[:, ::2], None, "contiguous"),
        (frozen(normal(2, 64)), None, "writable"),
        (normal(2, 64), np.ones(32, np.float32), "shape"),
        (normal(2, 64), np.ones(64, np.float64), "float32"),
        (normal(2, 64), np.full(64, 2, np.float32), "1 or -1"),
        (normal(2, 64), np.full(64, np.nan, np.float32), "1 or -1"),
    ],
)
def test_bad_arguments(x, signs, word):
    before = x.copy()
    with pytest.raises(ValueError, match=word):
        ops.fwht(x, 32, signs)
    assert np.array_equal(x, before)
