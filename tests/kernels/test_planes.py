"""Products with bit planes against int64 numpy: every path at every instruction-set level, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gossamer import ops

LEVELS = ops.isa_supported()


@pytest.fixture(params=LEVELS, autouse=True)
def level(request):
    before, threads = ops.isa(), ops.threads()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)
    ops.set_threads(threads)


def pack(codes, bits, rng=None):
    """One array a bit: [panel][block of 16 columns][h][64 bits], bit 4r + i is column 4h + i of row r.

    What lies in columns past the last is noise when ``rng`` is given: no kernel may depend on it.
    """
    rows, cols = codes.shape
    full = np.zeros((-(-rows // 16) * 16, -(-cols // 16) * 16), np.int64)
    if rng is not None:
        full[:] = rng.integers(0, 2**bits, full.shape)
    full[:rows, :cols] = codes
    shaped = full.reshape(full.shape[0] // 16, 16, full.shape[1] // 16, 4, 4).transpose(0, 2, 3, 1, 4)
    planes = []
    for b in range(bits):
        packed = np.packbits((shaped >> b & 1).astype(np.uint8).reshape(-1), bitorder="little")
        planes.append(np.concatenate([packed, np.zeros(-len(packed) % 64, np.uint8)]))
    return planes


def group_sums(codes, x, group):
    """[tokens, panels, groups, 16] in int64."""
    rows, cols = codes.shape
    panels, groups = -(-rows // 16), -(-cols // group)
    full = np.zeros((panels * 16, cols), np.int64)
    full[:rows] = codes
    out = np.zeros((len(x), panels, groups, 16), np.int64)
    for g in range(groups):
        part = slice(g * group, min(cols, (g + 1) * group))
        product = x[:, part].astype(np.float64) @ full[:, part].T.astype(np.float64)  # exact: far below 2^53
        out[:, :, g] = product.reshape(len(x), panels, 16).astype(np.int64)
    return out


def check(codes, bits, x, group, rng=None):
    rows, cols = codes.shape
    planes = pack(codes, bits, rng)
    want = group_sums(codes, x, group)
    for path in [*ops.planes_paths(), "auto"]:
        got = np.full(want.shape, -7, np.int32)
        ops.planes_sums(planes, rows, cols, group, x, got, path)
        assert np.array_equal(trim(got, rows), trim(want, rows)), path


def trim(sums, rows):
    """The rows that exist: [tokens, groups, rows]."""
    tokens, panels, groups, _ = sums.shape
    return sums.transpose(0, 2, 1, 3).reshape(tokens, groups, panels * 16)[..., :rows]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("cols", [1, 15, 63, 64, 65, 200])
@pytest.mark.parametrize("tokens", [1, 5, 21])
def test_random(bits, cols, tokens):
    rng = np.random.default_rng([bits, cols, tokens])
    for rows, group in [(1, 16), (16, 32), (37, 64), (80, 48), (20, 32768)]:
        codes = rng.integers(0, 2**bits, (rows, cols))
        for low, high in [(-128, 128), (-7, 8)]:
            check(codes, bits, rng.integers(low, high, (tokens, cols)).astype(np.int8), group, rng)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("cols", [4096, 14336])
def test_long_rows(bits, cols):
    rng = np.random.default_rng([bits, cols])
    codes = rng.integers(0, 2**bits, (23, cols))
    x = rng.integers(-128, 128, (5, cols)).astype(np.int8)
    for group in (64, 128, 1040, 16384):
        check(codes, bits, x, group)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("value", [-128, -127, -32, -8, -1, 0, 1, 7, 8, 31, 127])
def test_extremes(bits, value):
    """Every sum at its largest: all codes full, all activations at one end; as many columns as a group may have."""
    cols = 32768
    codes = np.full((17, cols), 2**bits - 1)
    check(codes, bits, np.full((1, cols), value, np.int8), cols)
    check(codes[:, :130], bits, np.full((5, 130), value, np.int8), 128)


@pytest.mark.parametrize("x_bits", range(1, 9))
def test_every_width_of_activations(x_bits):
    rng = np.random.default_rng(x_bits)
    codes = rng.integers(0, 8, (33, 300))
    x = rng.integers(-(2 ** (x_bits - 1)), 2 ** (x_bits - 1), (6, 300)).astype(np.int8)
    check(codes, 3, x, 96, rng)


@pytest.mark.parametrize("value", [-9, -8, 7, 8])
def test_the_edge_of_narrow_tables(value):
    """Activations that just fit, and just do not fit, into the four bits for which tables are narrow."""
    rng = np.random.default_rng(0)
    codes = np.concatenate([rng.integers(0, 4, (16, 96)), np.full((16, 96), 3)])
    x = rng.integers(-8, 8, (2, 96)).astype(np.int8)
    x[1, 40:56] = value
    check(codes, 2, x, 64)


FORMS = {
    "int": (1, lambda bits: 2 ** (bits - 1)),
    "uint": (1, lambda bits: 0),
    "bipolar": (2, lambda bits: 2**bits - 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_scaled_product(form, bits, level):
    step, zero = FORMS[form][0], FORMS[form][1](bits)
    rng = np.random.default_rng(bits)
    rows, cols, group, tokens = 37, 333, 64, 7
    panels, groups = 3, 6
    codes = rng.integers(0, 2**bits, (rows, cols))
    x = rng.integers(-128, 128, (tokens, cols)).astype(np.int8)
    scales = rng.uniform(0.5, 2, (panels, groups, 16)).astype(np.float32)
    x_scale = rng.uniform(0.5, 2, tokens).astype(np.float32)
    planes = pack(codes, bits, rng)
    weight = (step * codes - zero) * scales.transpose(0, 2, 1).reshape(48, groups).repeat(group, 1)[:rows, :cols]
    want = x.astype(np.float64) @ weight.T * x_scale[:, None]
    tolerance = 1e-6 * (np.abs(x).astype(np.float64) @ np.abs(weight).T * x_scale[:, None])
    first = None
    for path in [*ops.planes_paths(), "auto"]:
        for threads in (1, 3):
            ops.set_threads(threads)
            out = np.full((tokens, rows), np.nan, np.float32)
            ops.planes_linear(planes, rows, cols, group, scales.reshape(-1), zero, step, x, x_scale, out, path)
            assert (np.abs(out - want) <= tolerance).all()
            first = out if first is None else first
            assert np.array_equal(out.view(np.uint32), first.view(np.uint32)), (path, threads)
        for t in range(tokens):  # a token by itself
            one = np.empty((1, rows), np.float32)
            ops.planes_linear(
                planes, rows, cols, group, scales.reshape(-1), zero, step, x[t : t + 1], x_scale[t : t + 1], one, path
            )
            assert np.array_equal(one[0], first[t])


def test_many_threads_and_panels():
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 4, (1000, 512))
    x = rng.integers(-128, 128, (9, 512)).astype(np.int8)
    for threads in (1, 2, 5):
        ops.set_threads(threads)
        check(codes, 2, x, 512)
        check(codes[:, :100] % 2, 1, x[:1, :100].copy(), 32)


def test_special_scales():
    """A group whose scale is 0 adds nothing, a NaN scale of a token stays in its row."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2, (16, 32))
    x = rng.integers(-128, 128, (2, 32)).astype(np.int8)
    out = np.empty((2, 16), np.float32)
    for path in ops.planes_paths():
        x_scale = np.array([1, np.nan], np.float32)
        ops.planes_linear(pack(codes, 1), 16, 32, 32, np.zeros(16, np.float32), 1, 2, x, x_scale, out, path)
        assert not out[0].any()
        assert np.isnan(out[1]).all()
        ops.planes_linear(pack(codes, 1), 16, 32, 32, np.ones(16, np.float32), 1, 2, x[:0], x_scale[:0], out[:0], path)


def test_the_instruction_is_asked_for(level):
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.exists() else []
    has = level.startswith("avx512") and "avx512_vpopcntdq" in flags
    assert ("vpopcnt" in ops.planes_paths()) == has


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"planes": []}, "one a bit"),
        ({"planes": [np.zeros(128, np.uint8)] * 9}, "one a bit"),
        ({"planes": [np.zeros(127, np.uint8)]}, "take"),
        ({"planes": [np.zeros(192, np.uint8)]}, "take"),
        ({"planes": [np.zeros(128, np.int8)]}, "uint8"),
        ({"planes": [np.zeros(256, np.uint8)[::2]]}, "contiguous"),
        ({"rows": 0}, "cannot be multiplied"),
        ({"cols": -1}, "cannot be multiplied"),
        ({"rows": 2**40}, "cannot be multiplied"),
        ({"rows": 17}, "take"),
        ({"cols": 96}, "take"),
        ({"group": 0}, "multiple of 16"),
        ({"group": 24}, "multiple of 16"),
        ({"group": 32784}, "multiple of 16"),
        ({"scales": np.zeros(15, np.float32)}, "at least"),
        ({"scales": np.zeros(16, np.float64)}, "float32"),
        ({"zero": -1}, "zero is"),
        ({"zero": 3}, "zero is"),
        ({"step": 3}, "step is"),
        ({"x": np.zeros((2, 63), np.int8)}, "shape"),
        ({"x": np.zeros((2, 64), np.uint8)}, "int8"),
        ({"x": np.zeros(64, np.int8)}, "axes"),
        ({"x_scale": np.zeros(3, np.float32)}, "shape"),
        ({"out": np.zeros((2, 15), np.float32)}, "shape"),
        ({"path": "fast"}, "unknown"),
    ],
)
def test_bad_arguments(change, word):
    good = {
        "planes": [np.zeros(128, np.uint8)],
        "rows": 16,
        "cols": 64,
        "group": 64,
        "scales": np.zeros(16, np.float32),
        "zero": 1,
        "step": 2,
        "x": np.zeros((2, 64), np.int8),
        "x_scale": np.zeros(2, np.float32),
        "out": np.full((2, 16), 5, np.float32),
    }
    given = {**good, **change}
    with pytest.raises(ValueError, match=word):
        ops.planes_linear(**given)
    assert (good["out"] == 5).all()
    if "planes" not in change:
        ops.planes_linear(**good)
