"""Linear layers at the edges: no tokens, NaN, infinities, zeros, subnormal numbers, foreign memory, huge matrices."""

from __future__ import annotations

import numpy as np
import pytest

from gossamer.formats import ArraySource, Coded, Dense, KMeans, Packed, allocate, encode, parse_input, parse_weight
from gossamer.formats.coded import Parts

kernels = pytest.importorskip("gossamer._kernels")
ops = pytest.importorskip("gossamer.ops")

from linear_reference import Matrix, input_of, inputs, make, moved, reference, run, site  # noqa: E402

LEVELS = kernels.isa_supported()
KINDS = tuple(map(parse_weight, (
    "f32", "f16", "bf16", "int8/g32", "int4/row", "uint4/g32", "uint5/g64-m(f16)", "int3/g16*(int6/g16)",
    "uint8/128x128", "bipolar3/g32", "ternary/row", "e2m1/g16*(e4m3/tensor)", "e4m3/g64*e8m0", "nf4/g64",
    "kmeans3/tensor", "kmeans4/row",
)))  # fmt: skip
INPUTS = tuple(map(parse_input, (
    "f32", "bf16", "int8/token", "uint4/g32", "e4m3/g16", "int8/static(0.1)", "int4/token-o(5)",
)))  # fmt: skip
MORE = tuple(map(parse_weight, (
    "int7/g48", "uint6/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))", "int2/32x16", "uint3/g16*(int4/g24*(uint4/row))",
    "bipolar1/tensor",
)))  # fmt: skip


@pytest.fixture(autouse=True)
def restore():
    level, threads = kernels.isa(), kernels.threads()
    yield
    kernels.set_isa(level)
    kernels.set_threads(threads)


def near(matrix, y, x, given, bias=None):
    path = make(matrix.packed).path(input_of(given))[0]
    wanted, error = reference(matrix, x, given, path, bias)
    return bool((np.abs(y - wanted) <= error).all())


# ------------------------------------------------------------ inputs


@pytest.mark.parametrize("level", LEVELS)
def test_no_tokens(level):
    kernels.set_isa(level)
    for fmt in KINDS:
        weight = make(Matrix(fmt, 20, 40).packed)
        x, out = np.zeros((0, 40), np.float32), np.zeros((0, 20), np.float32)
        for given in INPUTS:
            s = site(weight, given, np.ones(20, np.float32))
            ops.linear(x, [s], [out])
            ops.linear(x, [s], [out], None, np.ones(40, np.float32), 1e-5, "add")
            ops.linear(x, [s, s], [out], epilogue="silu")
        ops.decode_rows(weight, np.empty(0, np.int64), np.zeros((0, 40), np.float32))
        ops.embed(weight, np.empty(0, np.int32), np.zeros((0, 40), np.float32))


@pytest.mark.parametrize("given", INPUTS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_tokens_that_hold_nan_or_infinity(given, level):
    """They spoil their own token alone, as docs/formats.md says."""
    kernels.set_isa(level)
    for fmt in KINDS:
        matrix = Matrix(fmt, 33, 100)
        s, clean = site(make(matrix.packed), given), inputs(6, 100)
        x = clean.copy()
        x[1, 7], x[2, 99], x[4, 0] = np.nan, np.inf, -np.inf
        x[5, 3], x[5, 50] = np.inf, np.nan
        y = run(s, x)
        assert y[[0, 3]].tobytes() == run(s, clean)[[0, 3]].tobytes()
        assert np.isnan(y[[1, 5]]).all()
        if given.quantized and given.outlier is None:
            assert np.isnan(y[[2, 4]]).all()
            continue
        # c * inf - z * inf is NaN where (c - z) * inf is infinite: with an offset it is no number, but which is open.
        assert not np.isfinite(y[[2, 4]]).any()
        if not (isinstance(fmt, Coded) and (fmt.zero or fmt.minimum)) or given.quantized:
            with np.errstate(all="ignore"):
                exact = reference(matrix, x, given, make(matrix.packed).path(input_of(given))[0])[0][[2, 4]]
            assert np.array_equal(y[[2, 4]], exact.astype(np.float32), equal_nan=True), str(fmt)


def test_a_mask_reads_its_columns_alone():
    """What is not stored is not multiplied, so a NaN reaches the rows that have an entry in its column."""
    w = np.zeros((20, 40), np.float32)
    w[3, 7], w[11, 7], w[5, 8] = 1, 2, 3
    from gossamer.formats import SiteFormat
    from gossamer.formats.dispatch import linear, make_runner

    fmt = parse_weight("mask(1%: f16)")
    runner = make_runner(encode(fmt, ArraySource(w)), SiteFormat(fmt, parse_input("f32")))
    x, out = np.ones((2, 40), np.float32), np.zeros((2, 20), np.float32)
    x[0, 7] = np.nan
    linear([runner], x, [out])
    assert np.flatnonzero(np.isnan(out[0])).tolist() == [3, 11]
    assert np.array_equal(out[1], w.sum(axis=1))


@pytest.mark.parametrize("given", INPUTS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_zero_tiny_and_large_tokens(given, level):
    kernels.set_isa(level)
    for fmt in KINDS:
        matrix = Matrix(fmt, 17, 100)
        bias = inputs(1, 17)[0]
        x = inputs(6, 100)
        x[1] = 0
        x[2] *= np.float32(1e-40)
        x[3] *= np.float32(1e30)
        x[4] = np.where(x[4] > 0, np.float32(2.0**-149), 0)  # the smallest number: its integer scales are zero
        x[5, 32:64] = 0  # whole groups
        y = run(site(make(matrix.packed), given, bias), x)
        assert near(matrix, y, x, given, bias), str(fmt)
        assert np.array_equal(y[1], bias)
        assert not run(site(make(matrix.packed), given), x)[1].any()


def test_scales_beyond_float32():
    """The range of one token or group is beyond float32, so that it has no scale: NaN, and no other token."""
    x = inputs(3, 64)
    x[1, :2] = 3e38, -3e38
    for given in map(parse_input, ("uint8/token", "uint4/token", "uint4/g32")):
        for fmt in KINDS:
            y = run(site(make(Matrix(fmt, 17, 64).packed), given), x)
            assert np.isnan(y[1]).all()
            assert np.isfinite(y[[0, 2]]).all()


# ------------------------------------------------------------ weights


@pytest.mark.parametrize("given", INPUTS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_subnormal_scales(given, level):
    """Scales of a few units of their type; the f32 and bf16 ones make subnormal results."""
    kernels.set_isa(level)
    sizes = {"f16": 2.0**-19, "f32": 2.0**-143, "bf16": 2.0**-128}
    for text in ("int8/g32", "int4/g32*f32", "uint4/g16*bf16", "uint5/row-m(f32)", "e2m1/g32*bf16", "nf4/g64"):
        fmt = parse_weight(text)
        matrix = Matrix(fmt, 17, 100, size=sizes[fmt.scale])
        assert matrix.s.any()
        x = inputs(3, 100)
        y = run(site(make(matrix.packed), given), x)
        assert near(matrix, y, x, given), text


@pytest.mark.parametrize("level", LEVELS)
def test_zero_scales(level):
    kernels.set_isa(level)
    for fmt in (f for f in KINDS if isinstance(f, Coded) and f.scale != "e8m0"):  # which has no zero
        arrays = dict(Matrix(fmt, 17, 100).packed.arrays)
        arrays |= {n: np.zeros_like(a) for n, a in arrays.items() if "scales" in n or "mins" in n}
        for given in INPUTS:
            assert not run(site(make(Packed(fmt, (17, 100), arrays)), given), inputs(3, 100)).any()


@pytest.mark.parametrize("level", LEVELS)
def test_numbers_that_are_none_stay_in_their_row(level):
    """Scales and codes that mean NaN or infinity, which encode never writes."""
    kernels.set_isa(level)
    for text in ("int4/g32*f32", "int4/g32", "uint4/g32*bf16", "int8/g32*e8m0", "int5/g16*e4m3", "e4m3/g32"):
        fmt = parse_weight(text)
        rng = np.random.default_rng(1)
        tiles, groups = fmt.matrix(20, 64)
        codes = rng.integers(1, fmt.number.levels // 4, (20, 64)).astype(np.uint8)
        half = {"f32": np.float32(0.5), "f16": np.float16(0.5), "bf16": np.uint16(0x3F00)}
        scales = np.full((tiles, groups), half.get(fmt.scale, np.uint8(40)))
        if fmt.number.family == "minifloat":
            codes[3, 40] = 0x7F
        else:
            scales[3, 1] = {"f32": np.nan, "f16": np.nan, "bf16": 0x7FC0, "e8m0": 255, "e4m3": 0xFF}[fmt.scale]
        zeros = np.ones((20, groups), np.uint8) if fmt.zero else None
        arrays = allocate(fmt, 20, 64)
        fmt.pack_parts(Parts(codes, scales, zeros), arrays, 0)
        packed = Packed(fmt, (20, 64), arrays)
        for given in INPUTS:
            for tokens in (1, 5):
                y = run(site(make(packed), given), inputs(tokens, 64))
                assert np.isnan(y[:, 3]).all(), (text, str(given))
                assert np.isfinite(np.delete(y, 3, axis=1)).all(), (text, str(given))


# ------------------------------------------------------------ memory


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("offset", [1, 3])
def test_arrays_that_begin_anywhere(offset, level):
    kernels.set_isa(level)
    for fmt in (*KINDS, parse_weight("uint4/g32*f32-m(bf16)"), parse_weight("kmeans2/row")):
        packed = Matrix(fmt, 33, 100).packed
        other = Packed(fmt, packed.shape, {n: moved(a, offset) for n, a in packed.arrays.items()})
        for given in INPUTS[:3]:
            for tokens in (1, 5, 33):
                x = inputs(tokens, 100)
                assert run(site(make(other), given), x).tobytes() == run(site(make(packed), given), x).tobytes()
        out, wanted = np.zeros((2, 100), np.float32), np.zeros((2, 100), np.float32)
        for weight, to in ((make(other), out), (make(packed), wanted)):
            ops.decode_rows(weight, np.array([32, 0]), to)
        assert out.tobytes() == wanted.tobytes()


def sized(packed):
    """(array name, bytes of it that are used) of every array."""
    for name, field in packed.format.fields(*packed.shape).items():
        yield name, field.used * field.numpy.itemsize


@pytest.mark.parametrize("fmt", [*KINDS, *MORE], ids=str)
def test_every_array_a_byte_too_short_is_refused(fmt):
    """And none is refused that has just what is used: the padding of files is not read."""
    packed = Matrix(fmt, 33, 100).packed
    exact = {n: packed.arrays[n].view(np.uint8)[:used] for n, used in sized(packed)}
    if isinstance(fmt, KMeans):
        exact["table"] = exact["table"].view(np.float32)
    x = inputs(4, 100)
    whole = make(Packed(fmt, packed.shape, exact))
    assert run(site(whole, INPUTS[0]), x).tobytes() == run(site(make(packed), INPUTS[0]), x).tobytes()
    for name in exact:
        short = exact | {name: exact[name][:-1]}
        with pytest.raises(ValueError, match=r"needs|too few"):
            make(Packed(fmt, packed.shape, short))


def test_a_matrix_of_more_than_2_to_the_31_elements():
    """Offsets are 64 bits wide. The zeros are never written, so they take no memory."""
    rows, cols = 65552, 32784
    assert rows * cols > 2**31
    blocks = cols // 16
    q2 = np.zeros(rows // 16 * blocks * 64, np.uint8)
    scales = np.zeros(rows, np.float32)
    row = np.random.default_rng(0).integers(0, 4, cols).astype(np.uint8)
    last = q2[-blocks * 64 :].reshape(blocks, 16, 4)
    four = row.reshape(blocks, 4, 4)  # block, h, i
    last[:, 15] = four[:, 0] | four[:, 1] << 2 | four[:, 2] << 4 | four[:, 3] << 6
    scales[-1] = 0.5
    kernel = ops.Kernel("u2", q2=q2, zero=2, group=cols, scales=ops.Scales("f32", scales))
    weight = ops.make_weight(kernel, rows, cols)
    out = np.full((1, cols), np.nan, np.float32)
    ops.decode_rows(weight, np.array([rows - 1]), out)
    assert np.array_equal(out[0], 0.5 * (row.astype(np.float32) - 2))
    ops.embed(weight, np.array([rows - 1], np.int32), out)
    assert np.array_equal(out[0], 0.5 * (row.astype(np.float32) - 2))
    x = np.random.default_rng(1).integers(-127, 128, (1, cols)).astype(np.float32)
    x[0, 0] = 127
    y = run(site(weight, parse_input("int8/token")), x)
    assert not y[0, :-1].any()
    assert y[0, -1] == 0.5 * (x[0].astype(np.int64) @ (row.astype(np.int64) - 2))


def test_dense_numbers_that_are_none_stay_in_their_row():
    w = inputs(20, 64)
    for name in ("f32", "f16", "bf16"):
        fmt = Dense(name)
        packed = encode(fmt, ArraySource(w))
        values = packed.arrays["values"]
        spot = 16 * 5 + 3 if name != "bf16" else (0 * 16 + 3) * 2  # row 3, some column
        values[spot] = np.nan if name != "bf16" else 0x7FC0
        y = run(site(make(packed), parse_input("f32")), inputs(4, 64))
        assert np.isnan(y[:, 3]).all()
        assert np.isfinite(np.delete(y, 3, axis=1)).all()
