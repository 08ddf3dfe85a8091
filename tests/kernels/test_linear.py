"""Linear kernels against float64, for every format, input format and instruction-set level.

The reference models the rounding of the input exactly and multiplies the stored codes in float64. Tolerance: a
float32 sum of n terms errs by at most n 2^-24 times the sum of their magnitudes, and twice that is allowed, since a
level without a fused multiply-add rounds twice. For float and bf16 inputs n is the length of a chain (a quarter of
the group), plus one for each group, plus 8 for joins, scale and bias; the terms are (|s| (|c| + |z|) + |m|) |x|. For
int8 inputs sums within a group are exact, so that n counts groups alone and a term is a group's part of the result.
The bf16 dot instruction takes subnormal inputs, products and sums for zero: 2^-126 a term, times the scale.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gossamer.formats import ArraySource, Dense, Packed, allocate, encode, halves, parse_weight
from gossamer.formats.node import PANEL
from gossamer.formats.numbers import FLOATS, INTEGERS

kernels = pytest.importorskip("gossamer._kernels")
ops = pytest.importorskip("gossamer.ops")

LEVELS = kernels.isa_supported()
INPUTS = ("f32", "bf16", "int8/token")
FORMATS = [parse_weight(text) for text in (
    *FLOATS,
    *(f"{n}/{g}*{s}" for n in INTEGERS for g in ("g8", "g32", "g64", "g128", "row") for s in FLOATS),
    *(f"{n}/{g}*{s}-m({m})" for n in ("uint8", "uint5", "uint4") for g in ("g8", "g32", "g64", "g128", "row")
      for s in FLOATS for m in FLOATS),
)]  # fmt: skip
# One for each inner loop and offset.
KINDS = [parse_weight(text) for text in (
    "f32", "f16", "bf16", "int8/g32", "int8/row", "int5/g32", "int4/g32", "int4/row", "uint8/g32", "uint5/g64*f32",
    "uint4/g32*bf16", "uint8/row-m(f32)", "uint5/g8-m(bf16)", "uint4/g32-m(f16)",
)]  # fmt: skip
ROWS = (1, 15, 16, 17, 33)
COLS = (1, 7, 8, 9, 31, 32, 33, 100, 257)
TOKENS = (1, 2, 3, 5, 8, 9, 17)


@pytest.fixture(autouse=True)
def restore():
    level, threads = kernels.isa(), kernels.threads()
    yield
    kernels.set_isa(level)
    kernels.set_threads(threads)


def accepts(fmt, kind):
    return fmt.integer or kind != "int8/token"


def stored(fmt, rows, cols, seed=0, scale=1.0):
    """Random codes, scales of both signs and offsets: all that a file may hold, not just what encode writes."""
    rng = np.random.default_rng([seed, rows, cols])
    if isinstance(fmt, Dense):
        return encode(fmt, ArraySource(rng.uniform(-scale, scale, (rows, cols)).astype(np.float32)))
    group = fmt.group or cols
    shape = (rows, (cols + group - 1) // group)
    codes = rng.integers(0, fmt.number.levels, (rows, cols)).astype(np.uint8)
    codes[rng.random(codes.shape) < 0.1] = fmt.number.levels - 1
    scales = scale * rng.uniform(0.01, 0.1, shape) * rng.choice([-1, 1, 1, 1], shape)
    offset = None
    if fmt.minimum:
        offset = halves.from_float((scale * rng.uniform(-0.5, 0.5, shape)).astype(np.float32), fmt.minimum)
    elif not fmt.number.signed:
        offset = rng.integers(0, fmt.number.levels, shape).astype(np.uint8)
    arrays = allocate(fmt, rows, cols)
    fmt.pack_rows(codes, halves.from_float(scales.astype(np.float32), fmt.scale), offset, arrays, 0)
    return Packed(fmt, (rows, cols), arrays)


def make(packed, bias=None):
    return ops.make_weight(packed.format.kernel(packed.arrays, *packed.shape), *packed.shape, bias)


def run(weight, x, kind):
    out = np.full((len(x), weight.rows), np.nan, np.float32)
    ops.linear(x, [weight], [out], kind)
    return out


def inputs(tokens, cols, seed=0):
    """Normal activations, each token with one element twenty times as large."""
    rng = np.random.default_rng([seed, tokens, cols])
    x = rng.standard_normal((tokens, cols)).astype(np.float32)
    x[np.arange(tokens), rng.integers(0, cols, tokens)] *= 20
    return x


def round_to_bf16(x):
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.view(np.float32))


def parts(packed):
    """float64 codes less the zero of signed codes, scales, zero points and minima, each [rows, cols]; and the group."""
    rows, cols = packed.shape
    fmt = packed.format
    if isinstance(fmt, Dense):
        none = np.zeros((rows, cols))
        return packed.decode().astype(np.float64), none + 1, none, none, cols
    codes, scales, offset = fmt.unpack_rows(packed.arrays, cols, 0, (rows + PANEL - 1) // PANEL)
    group = fmt.group or (cols + 7) // 8 * 8

    def spread(a):
        return np.repeat(a[:rows].astype(np.float64), group, axis=1)[:, :cols]

    none = np.zeros((rows, cols))
    z = none if offset is None or fmt.minimum else spread(offset)
    m = spread(halves.to_float(offset, fmt.minimum)) if fmt.minimum else none
    s = spread(halves.to_float(scales, fmt.scale))
    return codes[:rows].astype(np.float64) - fmt.number.zero, s, z, m, group


def reference(packed, x, kind, bias=None):
    """float64 outputs [tokens, rows] and how far a kernel may be from them."""
    c, s, z, m, group = parts(packed)
    cols = packed.shape[1]
    edges = np.arange(0, cols, group)
    with np.errstate(all="ignore"):
        if kind == "int8/token":
            step = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
            q = np.where(step > 0, np.rint(x / np.where(step > 0, step, np.float32(1))), 0)
            q = np.clip(q, -127, 127).astype(np.float64)
            token = np.where(np.isfinite(x).all(axis=1, keepdims=True), step, np.nan).astype(np.float64)
            # [tokens, rows, groups]: exact integers within a group
            dots = np.add.reduceat(q[:, None, :] * (c - z)[None], edges, axis=2) * s[:, edges][None]
            lows = np.add.reduceat(q, edges, axis=1)[:, None, :] * m[:, edges][None]
            y = (dots - lows).sum(axis=2) * token
            size = (np.abs(dots) + np.abs(lows)).sum(axis=2) * token
            terms, lost = 2 * len(edges) + 8, 0.0
        else:
            v = (round_to_bf16(x) if kind == "bf16" else x).astype(np.float64)
            weight = np.abs(s) * (np.abs(c) + z) + np.abs(m)
            y = v @ (s * (c - z) - m).T
            size = np.abs(v) @ weight.T
            terms = min(group, cols) / 4 + len(edges) + 8
            dot = kind == "bf16" and ops.isa() == "avx512bf16"
            lost = (weight + np.abs(s)).sum(axis=1) * 2.0**-126 if dot else 0.0
        if bias is not None:
            y, size = y + bias, size + np.abs(bias)
        return y, terms * 2.0**-23 * size + lost + terms * 2.0**-149


def within(y, packed, x, kind, bias=None):
    wanted, error = reference(packed, x, kind, bias)
    return bool((np.abs(y - wanted) <= error).all())


# ------------------------------------------------------------ against the reference


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_linear_of_every_format(fmt):
    """Every format with every input format at every level; shapes and token counts rotate through their pairs."""
    turn = FORMATS.index(fmt)
    for kind in (k for k in INPUTS if accepts(fmt, k)):
        for step in range(3):
            turn += 1
            rows, cols, tokens = ROWS[turn % 5], COLS[(turn + step * 2) % 9], TOKENS[(turn * 3 + step) % 7]
            packed = stored(fmt, rows, cols, seed=turn)
            bias = np.random.default_rng(turn).standard_normal(rows).astype(np.float32) if turn % 2 else None
            weight, x = make(packed, bias), inputs(tokens, cols, seed=turn)
            for level in LEVELS:
                kernels.set_isa(level)
                y = run(weight, x, kind)
                assert within(y, packed, x, kind, bias), (kind, level, rows, cols, tokens)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("fmt", KINDS, ids=str)
def test_every_shape_and_count(fmt, kind):
    if not accepts(fmt, kind):
        assert ops.refuse(make(stored(fmt, 1, 8)), kind) == "int8 inputs need integer codes"
        return
    for rows in ROWS:
        for cols in COLS:
            packed = stored(fmt, rows, cols)
            weight, x = make(packed), inputs(17, cols)
            for level in LEVELS:
                kernels.set_isa(level)
                whole = run(weight, x, kind)
                assert within(whole, packed, x, kind), (level, rows, cols)
                # A token's bits do not depend on how many come with it.
                for tokens in TOKENS:
                    part = run(weight, x[:tokens], kind)
                    assert part.tobytes() == whole[:tokens].tobytes(), (level, rows, cols, tokens)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", INPUTS)
def test_threads_and_batches_give_the_same_bits(kind, level):
    """Large enough for the team to be woken; also with more threads than there is work for."""
    kernels.set_isa(level)
    for fmt in (f for f in KINDS if accepts(f, kind)):
        packed = stored(fmt, 70, 257, seed=1)
        bias = inputs(1, 70)[0]
        weight, x = make(packed, bias), inputs(17, 257)
        kernels.set_threads(1)
        whole = run(weight, x, kind)
        assert within(whole, packed, x, kind, bias)
        for threads in (1, 2, 7):
            kernels.set_threads(threads)
            assert run(weight, x, kind).tobytes() == whole.tobytes(), (str(fmt), threads)
            for token in (0, 16):
                assert run(weight, x[token : token + 1], kind).tobytes() == whole[token].tobytes(), (str(fmt), threads)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("level", LEVELS)
def test_several_weights_in_one_call(kind, level):
    """Weights with different codes and groups share one prepared input and give the bits they give alone."""
    kernels.set_isa(level)
    x = inputs(5, 100)
    weights = [make(stored(f, 3 + 7 * i, 100, seed=i)) for i, f in enumerate(KINDS) if accepts(f, kind)]
    for threads in (1, 2):
        kernels.set_threads(threads)
        outs = [np.full((5, w.rows), np.nan, np.float32) for w in weights]
        ops.linear(x, weights, outs, kind)
        for weight, out in zip(weights, outs):
            assert out.tobytes() == run(weight, x, kind).tobytes()


def test_callers_on_several_python_threads():
    """The interpreter lock is released while a kernel runs; scratch memory belongs to the calling thread."""
    kernels.set_threads(2)
    jobs = [(make(stored(f, 70, 257, seed=i)), inputs(17, 257, seed=i), k)
            for i, f in enumerate(KINDS) for k in INPUTS if accepts(f, k)]  # fmt: skip
    wanted = [run(*job).tobytes() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert [y.tobytes() for y in pool.map(lambda job: run(*job), jobs)] == wanted


# ------------------------------------------------------------ extremes


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("level", LEVELS)
def test_tokens_that_hold_nan_or_infinity(kind, level):
    kernels.set_isa(level)
    for fmt in (f for f in KINDS if accepts(f, kind)):
        packed = stored(fmt, 33, 100)
        weight, clean = make(packed), inputs(6, 100)
        x = clean.copy()
        x[1, 7], x[2, 99], x[4, 0] = np.nan, np.inf, -np.inf
        x[5, 3], x[5, 50] = np.inf, np.nan
        y = run(weight, x, kind)
        # Tokens beside them are as they were.
        assert y[[0, 3]].tobytes() == run(weight, clean, kind)[[0, 3]].tobytes()
        assert np.isnan(y[[1, 5]]).all()
        if kind == "int8/token":
            assert np.isnan(y[[2, 4]]).all()
            continue
        # c * inf - z * inf is NaN where (c - z) * inf is infinite: with an offset all that is promised is "not finite".
        # So it is where a byte is multiplied as two nibbles.
        assert not np.isfinite(y[[2, 4]]).any()
        nibbles = not isinstance(fmt, Dense) and fmt.number.bits == 8 and kind == "bf16" and level == "avx512bf16"
        if isinstance(fmt, Dense) or (fmt.number.signed and not nibbles):
            assert np.array_equal(y[[2, 4]], reference(packed, x, kind)[0][[2, 4]].astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("level", LEVELS)
def test_zero_tiny_and_large_tokens(kind, level):
    kernels.set_isa(level)
    for fmt in (f for f in KINDS if accepts(f, kind)):
        packed = stored(fmt, 17, 100)
        bias = inputs(1, 17)[0]
        x = inputs(5, 100)
        x[1] = 0
        with np.errstate(under="ignore"):
            x[2] *= np.float32(1e-40)
        x[3] *= np.float32(1e30)
        x[4] = np.where(x[4] > 0, np.float32(2.0**-149), 0)  # the smallest number: its int8 scale is zero
        y = run(make(packed, bias), x, kind)
        assert within(y, packed, x, kind, bias), str(fmt)
        assert np.array_equal(y[1], bias)
        assert not run(make(packed), x, kind)[1].any()


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("level", LEVELS)
def test_subnormal_scales(kind, level):
    """Scales of a few units of their type; the f32 and bf16 ones make subnormal results."""
    kernels.set_isa(level)
    for fmt in (f for f in KINDS if accepts(f, kind) and not isinstance(f, Dense)):
        size = {"f16": 2.0**-19, "f32": 2.0**-143, "bf16": 2.0**-128}[fmt.scale]
        packed = stored(fmt, 17, 100, scale=size)
        assert packed.arrays["scales"].any()
        x = inputs(3, 100)
        y = run(make(packed), x, kind)
        assert y.any()
        assert within(y, packed, x, kind), str(fmt)


@pytest.mark.parametrize("level", LEVELS)
def test_the_largest_integer_sums(level):
    """Codes and inputs at their largest over the longest group that is taken: 255 * 127 * 65536 fits 31 bits."""
    kernels.set_isa(level)
    for text, code in [("int8/row", 0), ("int8/row", 255), ("uint8/row", 255), ("uint8/row-m(f32)", 255)]:
        fmt = parse_weight(text)
        arrays = allocate(fmt, 1, 65536)
        offset = None
        if not fmt.number.signed:
            offset = np.zeros((1, 1), np.float32 if fmt.minimum else np.uint8)
        fmt.pack_rows(np.full((1, 65536), code, np.uint8), np.ones((1, 1), np.float32), offset, arrays, 0)
        packed = Packed(fmt, (1, 65536), arrays)
        for value in (127.0, -127.0):
            x = np.full((1, 65536), value, np.float32)
            assert run(make(packed), x, "int8/token")[0, 0] == np.float32((code - fmt.number.zero) * value * 65536)


# ------------------------------------------------------------ decode


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_decode_rows_is_decode_bit_for_bit(fmt):
    turn = FORMATS.index(fmt)
    for step in range(3):
        rows, cols = ROWS[(turn + step) % 5], COLS[(turn + 2 * step) % 9]
        packed = stored(fmt, rows, cols, seed=turn)
        ids = np.random.default_rng(turn).integers(0, rows, rows + 3)
        out = np.full((len(ids), cols), np.nan, np.float32)
        ops.decode_rows(make(packed), ids, out)
        assert out.tobytes() == packed.decode()[ids].tobytes()


def test_decode_rows_on_several_threads():
    for fmt in KINDS:
        packed = stored(fmt, 40, 257)
        ids = np.random.default_rng(0).integers(0, 40, 300)  # enough work to wake the team
        for threads in (1, 2, 3):
            kernels.set_threads(threads)
            out = np.full((300, 257), np.nan, np.float32)
            ops.decode_rows(make(packed), ids, out)
            assert out.tobytes() == packed.decode()[ids].tobytes()
