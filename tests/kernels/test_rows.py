"""Row-wise kernels against float64 numpy, at every instruction-set level."""

from __future__ import annotations

import math

import numpy as np
import pytest

kernels = pytest.importorskip("gossamer._kernels")


@pytest.fixture(params=kernels.isa_supported(), autouse=True)
def level(request):
    before, threads = kernels.isa(), kernels.threads()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)
    kernels.set_threads(threads)


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


WIDTHS = [1, 8, 15, 16, 17, 63, 64, 65, 80, 576]


def reference_norm(x, gain, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * gain


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_rmsnorm(rows, width, size):
    x, gain = normal(rows, width, scale=size), normal(width, seed=1)
    out = np.full_like(x, np.nan)
    kernels.rmsnorm(x, gain, 1e-5, out)
    np.testing.assert_allclose(out, reference_norm(x, gain, 1e-5), rtol=2e-6, atol=1e-30)
    kernels.rmsnorm(x, gain, 1e-5, x)
    assert np.array_equal(x, out)  # in place


def test_rmsnorm_keeps_nan_and_zero_rows():
    x = np.zeros((2, 20), np.float32)
    x[1, 3] = np.nan
    out = np.empty_like(x)
    kernels.rmsnorm(x, np.ones(20, np.float32), 1e-6, out)
    assert np.all(out[0] == 0)
    assert np.all(np.isnan(out[1]))


@pytest.mark.parametrize(
    ("dim", "rotated"), [(2, 2), (8, 8), (64, 64), (64, 32), (80, 20), (256, 256), (40, 34), (16, 0)]
)
def test_rope(dim, rotated):
    rows, heads, half = 5, 3, rotated // 2
    x = normal(rows, heads, dim)
    angle = np.random.default_rng(1).uniform(-9, 9, (rows, half))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    want = x.astype(np.float64)
    lo, hi = want[..., :half].copy(), want[..., half:rotated].copy()
    want[..., :half] = lo * cos[:, None] - hi * sin[:, None]
    want[..., half:rotated] = hi * cos[:, None] + lo * sin[:, None]
    k = x[:, 1:].copy()
    kernels.rope(x, k, cos, sin)
    np.testing.assert_allclose(x, want, rtol=0, atol=2e-6)
    assert np.array_equal(k, x[:, 1:])


@pytest.mark.parametrize(("rows", "half"), [(1, 1), (1, 32), (7, 20), (600, 64)])
def test_angles(rows, half):
    positions = np.random.default_rng(rows).integers(0, 1 << 18, rows, dtype=np.int32)
    frequencies = (1e4 ** -np.linspace(0, 1, half)).astype(np.float32)
    cos, sin = np.full((2, rows, half), np.nan, np.float32)
    kernels.angles(positions, frequencies, cos, sin)
    angle = positions.astype(np.float32)[:, None] * frequencies[None, :]
    for ours, function in ((cos, np.cos), (sin, np.sin)):
        assert np.array_equal(ours, function(angle.astype(np.float64)).astype(np.float32))
        np.testing.assert_array_max_ulp(ours, function(angle), maxulp=1)


def sigmoid(x):
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


ACTIVATIONS = {
    "silu": lambda x: x * sigmoid(x),
    "gelu_tanh": lambda x: x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "gelu": lambda x: np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.ravel()]).reshape(x.shape),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_gated(kind, width):
    gate, up = normal(3, width, scale=3.0), normal(3, width, seed=1)
    gate[0, : min(width, 6)] = [0.0, -12.0, 12.0, -1e-6, 1e-3, -9.0][:width]
    want = ACTIVATIONS[kind](gate.astype(np.float64)) * up
    out = np.full_like(gate, np.nan)
    kernels.gated(kind, gate, up, out)
    np.testing.assert_allclose(out, want, rtol=3e-6, atol=1e-15)
    aliased = up.copy()
    kernels.gated(kind, gate, aliased, aliased)
    assert np.array_equal(aliased, out)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gated_extremes(kind):
    gate = np.array([[1e30, -1e30, 1e4, -1e4, 88.0, -88.0, np.nan, np.inf]], np.float32)
    out = np.empty_like(gate)
    kernels.gated(kind, gate, np.ones_like(gate), out)
    np.testing.assert_allclose(out[0, [0, 2, 4]], gate[0, [0, 2, 4]], rtol=1e-6)
    np.testing.assert_allclose(out[0, [1, 3, 5]], 0.0, atol=1e-34)
    assert np.isnan(out[0, 6])
    assert out[0, 7] == np.inf


@pytest.mark.parametrize("width", WIDTHS)
def test_add_and_scale(width):
    x, y = normal(3, width), normal(3, width, seed=1)
    want = x + y
    kernels.add(x, y)
    assert np.array_equal(x, want)
    kernels.scale(x, 0.3)
    assert np.array_equal(x, want * np.float32(0.3))


@pytest.mark.parametrize("cap", [0.5, 30.0, 50.0])
def test_softcap(cap):
    x = np.concatenate([normal(3000, scale=s) for s in (1e-6, 1e-2, 1.0, 40.0, 1e6)]).reshape(5, 3000)
    want = cap * np.tanh(x.astype(np.float64) / cap)
    kernels.softcap(x, cap)
    np.testing.assert_allclose(x, want, rtol=5e-7, atol=0)
    edge = np.array([[np.nan, np.inf, -np.inf, 0.0]], np.float32)
    kernels.softcap(edge, cap)
    assert np.isnan(edge[0, 0])
    assert edge[0, 1:].tolist() == [np.float32(cap), -np.float32(cap), 0.0]


def test_thread_count_does_not_matter():
    x, y, gain = normal(700, 576, scale=4), normal(700, 576, seed=1), normal(576, seed=2)
    cos, sin = normal(700, 32, seed=3), normal(700, 32, seed=4)

    def everything():
        a, outs = x.copy(), []
        kernels.rmsnorm(a, gain, 1e-5, a)
        outs.append(a.copy())
        k = y.copy().reshape(700, 9, 64)
        kernels.rope(a.reshape(700, 9, 64), k, cos, sin)
        outs += [a.copy(), k, *np.empty((2, 700, 32), np.float32)]
        kernels.angles(np.arange(700, dtype=np.int32), cos[0], *outs[-2:])
        for kind in ACTIVATIONS:
            out = np.empty_like(a)
            kernels.gated(kind, a, y, out)
            outs.append(out)
        kernels.add(a, y)
        kernels.scale(a, 1.7)
        kernels.softcap(a, 5.0)
        return [*outs, a]

    kernels.set_threads(1)
    one = everything()
    for threads in (2, 3):
        kernels.set_threads(threads)
        for a, b in zip(one, everything()):
            assert np.array_equal(a, b)


F = np.zeros((4, 8), np.float32)
HOSTILE = {
    "dtype": lambda: kernels.rmsnorm(F.astype(np.float64), F[0].copy(), 1e-5, F.copy()),
    "not contiguous": lambda: kernels.rmsnorm(np.zeros((8, 4), np.float32).T, F[0].copy(), 1e-5, F.copy()),
    "gain": lambda: kernels.rmsnorm(F, np.zeros(7, np.float32), 1e-5, F.copy()),
    "out": lambda: kernels.rmsnorm(F, F[0].copy(), 1e-5, np.zeros((3, 8), np.float32)),
    "one axis": lambda: kernels.rmsnorm(F[0].copy(), F[0].copy(), 1e-5, F[0].copy()),
    "eps": lambda: kernels.rmsnorm(F, F[0].copy(), -1.0, F.copy()),
    "a list": lambda: kernels.rmsnorm([[1.0]], F[0].copy(), 1e-5, F.copy()),
    "byte order": lambda: kernels.scale(F.astype(">f4"), 1.0),
    "rope wide": lambda: kernels.rope(*np.zeros((2, 4, 1, 8), np.float32), *[np.zeros((4, 5), np.float32)] * 2),
    "rope rows": lambda: kernels.rope(*np.zeros((2, 4, 1, 8), np.float32), *[np.zeros((3, 4), np.float32)] * 2),
    "rope head size": lambda: kernels.rope(
        np.zeros((4, 1, 8), np.float32), np.zeros((4, 1, 6), np.float32), *[np.zeros((4, 2), np.float32)] * 2
    ),
    "angles": lambda: kernels.angles(np.zeros(3, np.int32), F[0].copy(), F.copy(), F.copy()),
    "positions": lambda: kernels.angles(np.zeros(4, np.int64), F[0].copy(), F.copy(), F.copy()),
    "scale without rows": lambda: kernels.scale(F[0].copy(), 2.0),
    "kind": lambda: kernels.gated("relu", F, F, F.copy()),
    "gated shape": lambda: kernels.gated("silu", F, F[:3], F.copy()),
    "add": lambda: kernels.add(F.copy(), F[:3]),
    "cap": lambda: kernels.softcap(F.copy(), 0.0),
    "unaligned": lambda: kernels.scale(np.frombuffer(bytearray(21), np.uint8)[1:].view(np.float32)[None], 1.0),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_arguments(case):
    with pytest.raises(ValueError, match=r"\w+ .*\w"):
        HOSTILE[case]()


def test_read_only_output_is_refused_and_input_is_not():
    gain, x = np.ones(8, np.float32), np.ones((1, 8), np.float32)
    gain.flags.writeable = False
    kernels.rmsnorm(x, gain, 1e-5, x)
    x.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        kernels.rmsnorm(x, gain, 1e-5, x)


def test_empty_arrays():
    kernels.rmsnorm(np.zeros((0, 8), np.float32), np.ones(8, np.float32), 1e-5, np.zeros((0, 8), np.float32))
    kernels.add(np.zeros((0, 8), np.float32), np.zeros((0, 8), np.float32))


def test_arithmetic_probe():
    kernels.set_threads(2)
    for kind in ("int8", "bf16", "f32"):
        assert 0.1 < kernels.dot_peak(kind, 0.0) < 1e6
    with pytest.raises(ValueError, match="int8, bf16 and f32, not 'int3'"):
        kernels.dot_peak("int3", 0.0)
    for seconds in (-1, math.nan, 601):
        with pytest.raises(ValueError, match="seconds"):
            kernels.dot_peak("f32", seconds)


def test_bandwidth_probe():
    kernels.set_threads(2)
    assert 0.1 < kernels.read_bandwidth(1 << 22, 0.0) < 10_000
    assert 0.1 < kernels.read_bandwidth((1 << 22) + 13, 0.01) < 10_000
    for size in (0, -5, 1 << 60):
        with pytest.raises(ValueError, match="bytes"):
            kernels.read_bandwidth(size, 0.1)
    with pytest.raises(ValueError, match="seconds"):
        kernels.read_bandwidth(1 << 22, math.nan)
    kernels.probe_release()
    kernels.probe_release()
