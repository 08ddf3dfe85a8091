"""Linear sites of several parts: sums, splits, masks, low rank and transforms, with norm, bias and epilogue.

A site is bitwise what its leaves give one by one, transformed and added in float32 in their order; single leaves are
held against float64 in test_linear.py. That the sum means what ``decode`` says is checked with float32 inputs.
"""

from __future__ import annotations

import numpy as np
import pytest

from gossamer.formats import (
    ArraySource,
    Cols,
    Hadamard,
    Mask,
    Packed,
    Permute,
    Planes,
    Rank,
    Rows,
    Scale,
    SiteFormat,
    Sum,
    encode,
    parse,
    parse_input,
    resolve,
)
from gossamer.formats.layout import under
from gossamer.formats.transforms import signs

kernels = pytest.importorskip("gossamer._kernels")
ops = pytest.importorskip("gossamer.ops")

from linear_reference import inputs, make, run, site  # noqa: E402

from gossamer.formats.dispatch import Norm, linear, make_runner  # noqa: E402

LEVELS = kernels.isa_supported()
SITES = (
    "int4/g32 + mask(1%: f16)",
    "mask(2%: int8/tensor) @ int8/token",
    "mask(5%: f32) + int8/row @ uint4/g32",
    "int4/g128 + rank8(bf16)",
    "rank6(int8/g32) @ int8/token",
    "rank16(hadamard(16, 5, int8/row)) @ int8/token",
    "cols(16: bf16 @ bf16, int4/row) @ uint4/token",
    "cols(7: f16, 20: int8/g16 @ int8/token, nf4/g32)",
    "rows(5: int8/g32 @ int8/token, int4/g32 + mask(1%: bf16)) @ f32",
    "rows(17: bf16, 3: ternary/row, kmeans3/row)",
    "hadamard(32, none, int4/row) @ int4/token",
    "hadamard(full, 7, int4/g32 + rank4(f16)) @ int8/token",
    "hadamard(12, 3, e2m1/g16*e8m0) @ e4m3/g16",
    "permute(int4/g32) @ int8/g64",
    "scale(int8/row) @ int8/token-o(6)",
    "planes(int4/g64) @ int8/token",
    "hadamard(16, 1, cols(32: bf16 @ f32, scale(int3/g32))) @ int8/token-o(4)",
    "permute(scale(hadamard(48, 9, uint4/g48-m(f16)))) @ uint4/token",
    "rows(20: permute(scale(int4/g32)), cols(30: permute(int8/g16), int2/g16 + mask(2%: f16))) @ int8/g16",
    "uint3/g16*(uint3/g16) + mask(1%: f16) + rank3(f16) @ bf16",
    "scale(rows(9: rank4(int8/row), int6/g16*(int8/g16))) @ int8/token",
)
ROWS, COLS = 37, 96


@pytest.fixture(autouse=True)
def restore():
    level, threads = kernels.isa(), kernels.threads()
    yield
    kernels.set_isa(level)
    kernels.set_threads(threads)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def stored(text, rows=ROWS, cols=COLS, seed=0):
    """(site format, packed matrix) of heavy-tailed weights."""
    fmt = parse(text)
    return fmt, encode(fmt.weight, ArraySource(normal(rows, cols, seed=seed) ** 3))


def runner_of(text, rows=ROWS, cols=COLS, seed=0, bias=None):
    fmt, packed = stored(text, rows, cols, seed)
    return make_runner(packed, fmt, bias)


def call(runners, x, norm=None, outs=None, epilogue="store"):
    outs = [np.full((len(x), r.rows), np.nan, np.float32) for r in runners] if outs is None else outs
    linear(runners, x, outs, norm, epilogue)
    return outs


# ------------------------------------------------------------ one leaf at a time


def transformed(fmt, arrays, x):
    cols = x.shape[1]
    if isinstance(fmt, Hadamard):
        y = x.copy()
        ops.fwht(y, fmt.size(cols), None if fmt.seed is None else signs(fmt.seed, cols))
        return y
    return fmt.transform(x, arrays)


def add_mask(fmt, arrays, rows, cols, x, given, total):
    """Entry after entry along each row, a product and a sum rounded each."""
    row, col, value = fmt.entries(arrays, rows, cols, 0, -(-rows // 16))
    x = given.apply(x)
    total = np.zeros((len(x), rows), np.float32) if total is None else total.copy()
    for r, c, v in sorted(zip(row.tolist(), col.tolist(), value)):
        total[:, r] += v * x[:, c]
    return total


def by_leaves(fmt, arrays, rows, cols, x, given, total=None):
    """float32 [tokens, rows]: ``total`` (None: nothing yet) and the parts of a block of rows, added one by one."""
    if isinstance(fmt, Sum):
        for name, term in fmt.parts:
            total = by_leaves(term, under(arrays, f"{name}."), rows, cols, x, given, total)
        return total
    if isinstance(fmt, Cols):
        for name, branch, index in fmt.indices(arrays, cols):
            inner, own = resolve(branch, given)
            some = np.ascontiguousarray(x[:, index])
            total = by_leaves(inner, under(arrays, f"{name}."), rows, len(index), some, own, total)
        return total
    if isinstance(fmt, Rows):
        assert total is None
        out = np.full((len(x), rows), np.nan, np.float32)
        for name, branch, index in fmt.indices(arrays, rows):
            inner, own = resolve(branch, given)
            out[:, index] = by_leaves(inner, under(arrays, f"{name}."), len(index), cols, x, own)
        return out
    if isinstance(fmt, (Hadamard, Permute, Scale)):
        inner, own = resolve(fmt.inner, given)
        return by_leaves(inner, under(arrays, "0."), rows, cols, transformed(fmt, arrays, x), own, total)
    if isinstance(fmt, Rank):
        inner, own = resolve(fmt.inner, given)
        between = by_leaves(inner, under(arrays, "1."), fmt.rank, cols, x, own)
        return by_leaves(inner, under(arrays, "0."), rows, fmt.rank, between, own, total)
    if isinstance(fmt, Mask):
        return add_mask(fmt, arrays, rows, cols, x, given, total)
    if isinstance(fmt, Planes):
        fmt, arrays = fmt.inner, fmt.merge(arrays, rows, cols)
    y = run(site(make(Packed(fmt, (rows, cols), arrays)), given), x)
    return y if total is None else total + y


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("text", SITES)
def test_a_site_is_its_leaves(text, level):
    kernels.set_isa(level)
    fmt, packed = stored(text)
    bias = normal(ROWS, seed=1)
    runner, x = make_runner(packed, fmt, bias), inputs(33, COLS)
    assert (runner.refused is None) == ("e4m3/" not in text)
    for tokens in (1, 2, 5, 33):
        wanted = by_leaves(packed.format, dict(packed.arrays), ROWS, COLS, x[:tokens], fmt.input) + bias
        assert call([runner], x[:tokens])[0].tobytes() == wanted.tobytes(), tokens


@pytest.mark.parametrize("text", SITES)
def test_a_site_means_its_decoded_matrix(text):
    """With float32 inputs everywhere: transforms, products of factors and parts that cancel round a few times more."""
    _, packed = stored(text)
    x, w = inputs(5, COLS), packed.decode().astype(np.float64)
    plain = SiteFormat(strip(packed.format), parse_input("f32"))
    y = call([make_runner(Packed(plain.weight, packed.shape, packed.arrays), plain)], x)[0]
    size = np.sqrt((x.astype(np.float64) ** 2).sum(axis=1, keepdims=True)) * np.sqrt((w**2).sum(axis=1))
    assert (np.abs(y - x @ w.T) <= 2.0**-17 * size + 1e-30).all()


def strip(fmt):
    """The format without what it says about inputs inside."""

    def bare(branch):
        return strip(branch.weight if isinstance(branch, SiteFormat) else branch)

    if isinstance(fmt, Sum):
        return Sum(tuple(map(bare, fmt.terms)))
    if isinstance(fmt, (Cols, Rows)):
        return type(fmt)(fmt.counts, tuple(map(bare, fmt.branches)))
    if isinstance(fmt, Hadamard):
        return Hadamard(fmt.block, fmt.seed, bare(fmt.inner))
    if isinstance(fmt, (Permute, Scale)):
        return type(fmt)(bare(fmt.inner))
    return Rank(fmt.rank, bare(fmt.inner)) if isinstance(fmt, Rank) else fmt


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("text", SITES)
def test_the_same_bits_in_every_batch_and_on_any_number_of_threads(text, level):
    kernels.set_isa(level)
    fmt, packed = stored(text, 200, 192, seed=2)
    runner, x = make_runner(packed, fmt, normal(200)), inputs(33, 192)
    kernels.set_threads(1)
    whole = call([runner], x)[0]
    assert np.isfinite(whole).all()
    for threads in (1, 2, 5):
        kernels.set_threads(threads)
        for first, last in ((0, 1), (0, 2), (0, 3), (1, 5), (3, 12), (0, 17), (13, 33), (32, 33)):
            assert call([runner], x[first:last])[0].tobytes() == whole[first:last].tobytes(), (threads, first, last)


@pytest.mark.parametrize("text", SITES)
def test_look_up(text):
    fmt, packed = stored(text)
    runner = make_runner(packed, fmt)
    ids = np.array([36, 0, 16, 16, 15])
    assert runner.look_up(ids).tobytes() == packed.decode()[ids].tobytes()
    out = np.full((5, COLS), np.nan, np.float32)
    ops.embed(runner.weight, ids.astype(np.int32), out)
    assert out.tobytes() == packed.decode()[ids].tobytes()


# ------------------------------------------------------------ calls

GROUPS = (
    ("int4/g32", "int4/g32", "int4/g32"),
    ("int8/row @ int8/token", "uint4/g32 @ int8/g32", "bf16", "f32 @ f32", "int4/g32 @ int8/token-o(3)"),
    ("hadamard(32, 1, int4/row) @ int4/token",) * 3,
    ("hadamard(32, 1, int4/row) @ int4/token", "hadamard(32, 2, int4/row) @ int4/token", "hadamard(full, 1, int8/g16)",
     "hadamard(32, none, int4/row) @ int4/token"),
    ("permute(int4/g32)", "permute(int4/g32)", "scale(int4/g32)", "rank4(f16)", "rows(8: f16, int4/row)", "int4/row"),
    ("int4/g32 + rank4(f16)", "rank5(int8/row) @ int8/token", "int4/g16 + mask(1%: f16)"),
)  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("texts", GROUPS, ids=str)
def test_sites_that_share_an_input(texts, level):
    """Equal and different transforms and roundings: each site gives the bits it gives alone."""
    kernels.set_isa(level)
    x = inputs(9, COLS)
    runners = [runner_of(t, 20 + 9 * i, COLS, i // 2, normal(20 + 9 * i)) for i, t in enumerate(texts)]
    norm = Norm(normal(COLS), 1e-5)
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        for tokens in (1, 3, 9):
            for some in (None, norm):
                outs = call(runners, x[:tokens], some)
                for runner, out in zip(runners, outs):
                    assert out.tobytes() == call([runner], x[:tokens], some)[0].tobytes()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("text", [*SITES, "int4/g32 @ int8/token", "bf16", "f32 @ f32"])
def test_norm_inside(text, level):
    kernels.set_isa(level)
    fmt, packed = stored(text)
    runner, x = make_runner(packed, fmt), 3 * inputs(7, COLS)
    norm = Norm(normal(COLS, seed=5), 1e-5)
    normed = np.empty_like(x)
    ops.rmsnorm(x, norm.gain, norm.eps, normed)
    assert call([runner], x, norm)[0].tobytes() == call([runner], normed)[0].tobytes()


@pytest.mark.parametrize("text", [*SITES, "int4/g32 @ int8/token", "bf16", "f32 @ f32"])
def test_the_epilogue_add(text):
    fmt, packed = stored(text)
    x, before = inputs(7, COLS), normal(7, ROWS)
    for bias in (None, normal(ROWS, seed=4)):
        runner = make_runner(packed, fmt, bias)
        out, wanted = before.copy(), before.copy()
        call([runner], x, None, [out], "add")
        ops.add(wanted, call([runner], x)[0])
        assert out.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("level", LEVELS)
def test_gates(kind, level):
    kernels.set_isa(level)
    pairs = (("int4/g32 @ int8/token", "int4/g32 @ int8/token"), ("bf16", "int8/row @ int8/g16"),
             ("f32 @ f32", "nf4/g32"), ("int4/g32 + rank4(f16)", "hadamard(32, 1, int4/row) @ int4/token"),
             ("mask(1%: f16)", "cols(9: f16, int4/g16) @ int8/token"))  # fmt: skip
    norm = Norm(normal(COLS, seed=5), 1e-5)
    for texts in pairs:
        biases = (normal(ROWS, seed=1), None)
        runners = [runner_of(t, seed=i, bias=biases[i]) for i, t in enumerate(texts)]
        assert all(r.whole for r in runners)
        for tokens in (1, 2, 3, 4, 17):
            x = inputs(tokens, COLS)
            gate, up = call(runners, x, norm)
            wanted, out = np.empty_like(gate), np.full_like(gate, np.nan)
            ops.gated(kind, gate, up, wanted)
            call(runners, x, norm, [out], kind)
            assert out.tobytes() == wanted.tobytes(), (texts, tokens)


def test_an_output_may_be_the_input():
    for text in ("int8/row @ int8/token", "f32 @ f32", "int4/g32 + rank4(f16)"):
        fmt, packed = stored(text, 64, 64)
        runner, x = make_runner(packed, fmt), inputs(9, 64)
        wanted = call([runner], x)[0]
        call([runner], x, None, [x])
        assert x.tobytes() == wanted.tobytes()


# ------------------------------------------------------------ recorded


@pytest.mark.parametrize("level", LEVELS)
def test_inside_a_program(level):
    """Norm, shared inputs, gate, low rank and an addition, replayed for fewer tokens, as calls at once."""
    kernels.set_isa(level)
    width, inner = 64, 112
    texts = ("hadamard(32, 1, int4/row) @ int4/token", "int4/g32 + rank4(f16)", "rows(9: bf16, int8/g32) @ int8/token")
    q, k, v = (runner_of(t, 64, width, i) for i, t in enumerate(texts))
    gate, up = (runner_of("int4/g32 @ int8/token", inner, width, i) for i in (5, 6))
    down = runner_of("cols(16: bf16, int4/g32)", width, inner, bias=normal(width))
    norm = Norm(normal(width, seed=5), 1e-5)

    def step(x, outs, between):
        linear([q, k, v], x, outs, norm)
        linear([gate, up], outs[2], [between], norm, "silu")
        linear([down], between, [x], None, "add")

    capacity = 17
    x, outs = np.zeros((capacity, width), np.float32), [np.zeros((capacity, 64), np.float32) for _ in range(3)]
    between = np.zeros((capacity, inner), np.float32)
    with ops.record(capacity) as program:
        step(x, outs, between)
    for threads in (1, 2, 3):
        kernels.set_threads(threads)
        for tokens in (1, 2, 3, 5, 16, 17):
            given = inputs(tokens, width, seed=threads)
            plain, results = given.copy(), [np.empty((tokens, 64), np.float32) for _ in range(3)]
            step(plain, results, np.empty((tokens, inner), np.float32))
            x[:tokens] = given
            x[tokens:] = 7
            program.run(tokens)
            assert x[:tokens].tobytes() == plain.tobytes(), (threads, tokens)
            assert (x[tokens:] == 7).all()
            for a, b in zip(outs, results):
                assert a[:tokens].tobytes() == b.tobytes()


def test_a_program_keeps_what_it_reads():
    import gc

    fmt, packed = stored("int4/g32 + rank4(f16) + mask(1%: f16)")
    runner = make_runner(packed, fmt, normal(ROWS))
    x, out = inputs(4, COLS), np.zeros((4, ROWS), np.float32)
    wanted = call([runner], x)[0]
    with ops.record(4) as program:
        linear([runner], x, [out])
    del runner, packed
    gc.collect()
    garbage = [np.full(1000, 7, np.float32) for _ in range(100)]
    program.run(4)
    assert out.tobytes() == wanted.tobytes()
    del garbage
