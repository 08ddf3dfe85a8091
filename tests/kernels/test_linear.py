"""Linear kernels against float64, for every kind of weight, input format and instruction-set level.

How far a result may be from the reference, and why: see linear_reference.py. Combinations rotate deterministically, so
that every value of each axis meets many of the others.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gossamer.formats import ArraySource, Coded, Packed, allocate, encode, halves, parse_input, parse_weight
from gossamer.formats.coded import Parts
from gossamer.formats.numbers import FLOATS, NUMBERS

kernels = pytest.importorskip("gossamer._kernels")
ops = pytest.importorskip("gossamer.ops")

from linear_reference import Matrix, input_of, inputs, make, reference, run, site  # noqa: E402

LEVELS = kernels.isa_supported()
ROWS = (1, 15, 16, 17, 33, 70)
COLS = (1, 7, 8, 16, 17, 24, 33, 100, 257, 600)
TOKENS = (*range(1, 10), 12, 13, 17, 33)
GROUPS = ("g16", "g32", "g48", "g64", "g128", "row", "tensor", "16x32", "32x48")
SCALES = ("f32", "f16", "bf16", "e8m0", "e4m3", "(int8/row)", "(int6/g16)", "(e4m3/tensor)", "(uint8/row-z(0))",
          "(uint6/g8-z(0))", "(int8/16x16)", "(nf4/g16)", "(uint3/g16)", "(int4/g24*(uint4/row))")  # fmt: skip
MINS = ("f32", "f16", "bf16", "uint4/g16-z(0)", "int8/tensor", "uint6/g8-z(0)")
FAMOUS = (
    "uint2/g16*(uint4/g16-z(0))-m(uint4/g16-z(0))", "int3/g16*(int6/g16)", "uint4/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))",
    "uint5/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))", "int6/g16*(int8/g16)", "e2m1/g32*e8m0", "e3m2/g32*e8m0",
    "e5m2/g32*e8m0", "e2m1/g16*(e4m3/tensor)", "nf4/g64*(int8/g256)", "uint4/g128*(int8/row)",
    "uint4/g128*(uint8/row-z(0))", "uint3/g16*(uint3/g16)", "e4m3/128x128", "uint4/128x128-m(f32)",
)  # fmt: skip
TABLES = tuple(f"kmeans{bits}/{per}" for bits in (2, 3, 4) for per in ("row", "tensor"))
INPUTS = tuple(map(parse_input, (
    "f32", "bf16", "int8/token", "int4/token", "uint4/token", "uint8/token", "e4m3/token", "int8/g16", "int8/g32",
    "int4/g64", "uint4/g48", "uint8/g32", "e4m3/g16", "int8/g128", "uint4/g512", "int8/static(0.05)",
    "uint4/static(0.3)", "e4m3/static(0.02)", "int8/token-o(6)", "int4/g32-o(2.5)", "uint4/token-o(3)",
    "e4m3/token-o(6)", "uint8/g16-o(4)", "int8/static(0.02)-o(1)",
)))  # fmt: skip
# One for each inner loop, way to expand, and offset.
KINDS = tuple(map(parse_weight, (
    "f32", "f16", "bf16", "int8/g32", "int4/g32", "int4/row", "uint4/g32", "uint4/g64-m(f16)", "int2/g16", "int3/g32",
    "int5/row", "int6/g16*(int8/g16)", "uint7/g48", "uint8/128x128", "bipolar1/g32", "bipolar4/row", "ternary/row",
    "e2m1/g16*(e4m3/tensor)", "e2m3/g32*e8m0", "e4m3/g64", "nf4/g64", "kmeans3/tensor", "kmeans4/row",
)))  # fmt: skip


@pytest.fixture(autouse=True)
def restore():
    level, threads = kernels.isa(), kernels.threads()
    yield
    kernels.set_isa(level)
    kernels.set_threads(threads)


def check(matrix, x, given, bias=None):
    """At every level: close to the reference of the path that the weight names."""
    weight = make(matrix.packed)
    s = site(weight, given, bias)
    wanted = {}
    for level in LEVELS:
        kernels.set_isa(level)
        path = weight.path(input_of(given))[0]
        if path not in wanted:
            wanted[path] = reference(matrix, x, given, path, bias)
        y, (exact, error) = run(s, x), wanted[path]
        # A NaN of the reference, inf * 0, is a NaN; an infinite bound bounds nothing.
        far = ~(np.abs(y - exact) <= error) & ~(np.isnan(exact) & np.isnan(y))
        assert not far.any(), (level, path, *np.argwhere(far)[0], y[far][0], exact[far][0], (error + 0 * exact)[far][0])


# ------------------------------------------------------------ against the reference


def formats_of(name, turn):
    """Formats of a number: each group, with scales and offsets that rotate."""
    for i, group in enumerate(GROUPS):
        text = f"{name}/{group}*{SCALES[(turn + 3 * i) % len(SCALES)]}"
        if name.startswith("uint"):
            text += ("", "-z(0)", f"-m({MINS[(turn + i) % len(MINS)]})")[(turn + i) % 3]
        yield parse_weight(text)


def shape(turn):
    return ROWS[turn % 6], COLS[(turn + turn // 7) % 10], TOKENS[(turn * 5 + turn // 13) % 13]


def some_inputs(turn, count):
    return [INPUTS[(turn * 7 + i * 11 + turn // 24) % len(INPUTS)] for i in range(count)]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number(name):
    """Every number with every kind of group; scales, offsets, inputs and shapes rotate."""
    start = 11 * list(NUMBERS).index(name)
    for i, fmt in enumerate(formats_of(name, start // 11)):
        rows, cols, tokens = shape(start + i)
        matrix, x = Matrix(fmt, rows, cols, seed=start + i), inputs(tokens, cols, seed=start + i)
        bias = x[0, :1] * np.arange(rows, dtype=np.float32) if i % 2 else None
        for given in some_inputs(start + i, 3):
            check(matrix, x, given, bias)


@pytest.mark.parametrize("text", [*FLOATS, *FAMOUS, *TABLES])
def test_plain_tables_and_known_formats(text):
    """With every input format that goes with them."""
    fmt = parse_weight(text)
    for turn, given in enumerate(INPUTS, start=len(text)):
        rows, cols, tokens = shape(turn)
        check(Matrix(fmt, rows, cols, seed=turn), inputs(tokens, cols, seed=turn), given)


@pytest.mark.parametrize("given", INPUTS, ids=str)
def test_input_groups_beside_weight_groups(given):
    """Equal, smaller, larger, not dividing one another, and larger than the row."""
    for turn, text in enumerate(("int4/g16", "int8/g32*f32", "uint4/g48", "int3/g64", "uint5/g128-m(f16)", "nf4/row",
                                 "bipolar3/g32", "int8/16x32", "ternary/tensor")):  # fmt: skip
        for cols in (33, 600):
            check(Matrix(parse_weight(text), 17, cols, seed=turn), inputs(1 + turn, cols, seed=turn), given)


@pytest.mark.parametrize("fmt", KINDS, ids=str)
def test_every_shape(fmt):
    turn = 0
    for rows in ROWS:
        for cols in COLS:
            turn += 1
            for given in (INPUTS[turn % 3], *some_inputs(turn, 1)):
                check(Matrix(fmt, rows, cols), inputs(TOKENS[turn % 13], cols), given)


def test_long_rows_and_odd_groups():
    """Segments of the integer and float sums, and several chunks of each."""
    for text, cols in (("int8/row", 65536 + 100), ("int4/g1008", 5000), ("uint4/g1040-m(f32)", 2500), ("nf4/row", 3000),
                       ("int4/g65568", 131200), ("f32", 3000), ("bf16", 2100), ("int5/g32", 4500)):  # fmt: skip
        matrix = Matrix(parse_weight(text), 17, cols)
        for given in map(parse_input, ("f32", "bf16", "int8/token", "int8/g65552")):
            if cols < 100000 or given.number == "int8":
                check(matrix, inputs(5, cols), given)


# ------------------------------------------------------------ exact integers


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "text",
    [*(f"int{b}/g32" for b in range(2, 9)), *(f"uint{b}/row" for b in range(2, 9)), "uint8/g64-m(f32)",
     "uint4/g16-z(0)", *(f"bipolar{b}/g48" for b in range(1, 9)), "ternary/row", "e2m1/g32", "e3m2/g32", "e1m6/row",
     "e2m3/row", "e2m4/g16"],
)  # fmt: skip
def test_integer_sums_are_exact(text, level):
    """With scales of one and inputs that are their own codes, a result is an integer: the very same in int64."""
    kernels.set_isa(level)
    fmt = parse_weight(text)
    rng = np.random.default_rng(len(text))
    for rows, cols, tokens in ((17, 100, 5), (33, 257, 1), (1, 40, 2), (40, 48, 33)):
        tiles, groups = fmt.matrix(rows, cols)
        codes = rng.integers(0, fmt.number.levels, (rows, cols)).astype(np.uint8)
        offset = rng.integers(0, fmt.number.levels, (tiles, groups)).astype(np.uint8)
        one = halves.from_float(np.ones((tiles, groups), np.float32), fmt.scale)
        minimum = offset.astype(np.float32) if fmt.minimum else None
        arrays = allocate(fmt, rows, cols)
        fmt.pack_parts(Parts(codes, one, offset if fmt.zero else None, minimum), arrays, 0)
        s = site(make(Packed(fmt, (rows, cols), arrays)), parse_input("int8/token"))
        x = rng.integers(-127, 128, (tokens, cols)).astype(np.float32)
        x[:, 0] = rng.choice([-127, 127], tokens)
        # Values in units of their smallest step, which is a power of two.
        table = fmt.number.values.astype(np.float64)
        unit = min(1.0, float(np.abs(table[table != 0]).min()) if fmt.number.table is not None else 1.0)
        values = np.rint(table[codes] / unit).astype(np.int64)
        if fmt.zero or fmt.minimum:
            values = values - np.repeat(offset.astype(np.int64), fmt.width(cols), axis=1)[:, :cols]
        exact = x.astype(np.int64) @ values.T
        assert np.abs(exact).max() < 1 << 24
        assert np.array_equal(run(s, x).astype(np.float64) / unit, exact)


@pytest.mark.parametrize("level", LEVELS)
def test_the_largest_integer_sums(level):
    """Codes and inputs at their largest over the longest segment: 255 * 127 * 65536 fits 31 bits."""
    kernels.set_isa(level)
    for text in ("int8/row", "uint8/row", "uint8/row-z(0)", "bipolar8/row"):
        code = 0 if text == "int8/row" else 255
        fmt = parse_weight(text)
        for cols in (65536, 2 * 65536):
            arrays = allocate(fmt, 1, cols)
            zeros = np.zeros((1, 1), np.uint8) if fmt.zero else None
            fmt.pack_parts(Parts(np.full((1, cols), code, np.uint8), np.ones((1, 1), np.float32), zeros), arrays, 0)
            s = site(make(Packed(fmt, (1, cols), arrays)), parse_input("int8/token"))
            for value in (127.0, -127.0):
                exact = float(fmt.number.values[code]) * value * cols
                # bipolar: twice the code less 255, two roundings of numbers twice as large
                slack = 2.0**-22 * abs(exact) if fmt.number.family == "bipolar" else 0.0
                assert abs(run(s, np.full((1, cols), value, np.float32))[0, 0] - exact) <= slack


@pytest.mark.parametrize("level", LEVELS)
def test_tables_that_are_no_integers_are_rounded_to_16_bits(level):
    """NF4 and k-means beside integer inputs: each value is off by at most 2^-16 of the largest, and no more."""
    kernels.set_isa(level)
    for text in ("nf4/row*f32", "kmeans2/tensor", "kmeans3/tensor", "kmeans4/tensor"):
        matrix = Matrix(parse_weight(text), 16, 64)
        weight = make(matrix.packed)
        assert weight.path(input_of(parse_input("int8/token"))) == ("int8", None)
        x = 127 * np.eye(64, dtype=np.float32)  # one column a token
        y = run(site(weight, parse_input("int8/token")), x).T / 127.0
        top = np.abs(matrix.table).max()
        assert (np.abs(y - matrix.exact) <= np.abs(matrix.s) * top * (2.0**-16 + 2.0**-22)).all()
        assert (y != matrix.exact).any()


def test_tables_too_small_or_too_large_for_integers():
    fmt = parse_weight("kmeans4/tensor")
    for size in (1e-44, 1e-36, 1e-30, 1e30):
        matrix = Matrix(fmt, 17, 40, size=size)
        with np.errstate(all="ignore"):
            check(matrix, inputs(3, 40), parse_input("int8/token"))


# ------------------------------------------------------------ the same bits in every batch and on any number of threads

BATCHES = (*range(1, 10), 12, 13, 16, 17, 18, 19, 24, 25, 31, 32)
LONG = (("int4/g32", 4200), ("int5/g48", 4300), ("bf16", 2600), ("f16", 1100), ("nf4/row", 1300), ("int8/row", 3000))
SOME = tuple(map(parse_input, ("f32", "bf16", "int8/token", "uint4/g48-o(3)", "e4m3/g16")))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("fmt", KINDS, ids=str)
def test_a_token_has_the_same_bits_in_every_batch(fmt, level):
    """Alone or among 2 to 33: every tile, codes unpacked in place or before, one, two and four panels at once."""
    kernels.set_isa(level)
    matrix, x = Matrix(fmt, 70, 600, seed=1), inputs(33, 600)
    weight, bias = make(matrix.packed), inputs(1, 70)[0]
    for given in SOME:
        s = site(weight, given, bias)
        kernels.set_threads(1)
        whole = run(s, x)
        assert np.isfinite(whole).all()
        for n in BATCHES if level != "scalar" else (1, 2, 3, 4, 17):
            assert run(s, x[:n]).tobytes() == whole[:n].tobytes(), (str(given), n)
        for first, last in ((32, 33), (5, 6), (30, 33), (7, 11), (10, 33)):
            assert run(s, x[first:last]).tobytes() == whole[first:last].tobytes(), (str(given), first, last)
        for threads in (2, 3, 5, 9):
            kernels.set_threads(threads)
            for n in (1, 2, 4, 17, 33):
                assert run(s, x[:n]).tobytes() == whole[:n].tobytes(), (str(given), n, threads)


@pytest.mark.parametrize("level", LEVELS)
def test_rows_of_several_chunks_have_the_same_bits_in_every_batch(level):
    """Chunks are twice as long for many tokens; panels left over by a step of two or four."""
    kernels.set_isa(level)
    for text, cols in LONG:
        for rows in (16, 48, 103):
            matrix, x = Matrix(parse_weight(text), rows, cols), inputs(33, cols)
            for given in SOME[:3]:
                s = site(make(matrix.packed), given)
                kernels.set_threads(1)
                whole = run(s, x)
                for threads in (1, 2, 5):
                    kernels.set_threads(threads)
                    for n in (1, 2, 3, 4, 7, 16, 20) if level != "scalar" else (1, 3):
                        assert run(s, x[:n]).tobytes() == whole[:n].tobytes(), (text, rows, str(given), n, threads)


@pytest.mark.parametrize("level", LEVELS)
def test_tall_matrices_have_the_same_bits_in_every_batch(level):
    """Many panels in one go for few tokens, and what is left over of four, two and one at once."""
    kernels.set_isa(level)
    for fmt in KINDS:
        matrix, x = Matrix(fmt, 917, 48), inputs(17, 48)
        weight, bias = make(matrix.packed), inputs(1, 917)[0]
        for given in SOME[:4]:
            s = site(weight, given, bias)
            kernels.set_threads(1)
            whole = run(s, x)
            for threads in (1, 2, 5):
                kernels.set_threads(threads)
                for n in (1, 2, 3, 4):
                    assert run(s, x[:n]).tobytes() == whole[:n].tobytes(), (str(fmt), str(given), n, threads)


def test_rows_of_a_matrix_do_not_depend_on_their_neighbours():
    """A row has the same bits in a matrix of any height."""
    x = inputs(4, 100)
    for fmt in KINDS:
        if isinstance(fmt, Coded) and fmt.group.shared:
            continue
        if isinstance(fmt, Coded) and isinstance(fmt.scale, Coded) and fmt.scale.group.shared:
            continue
        if str(fmt).startswith("kmeans") and fmt.per == "tensor":
            continue
        w = inputs(70, 100, seed=3)
        whole = encode(fmt, ArraySource(w))
        for given in SOME[:3]:
            y = run(site(make(whole), given), x)
            for rows in (1, 16, 50):
                part = run(site(make(encode(fmt, ArraySource(w[:rows]))), given), x)
                assert part.tobytes() == np.ascontiguousarray(y[:, :rows]).tobytes(), (str(fmt), str(given), rows)


def test_callers_on_several_python_threads():
    """The interpreter lock is released while a kernel runs; runs take turns."""
    kernels.set_threads(2)
    weights = [make(Matrix(f, 70, 257).packed) for f in KINDS]
    jobs = [(site(w, g), inputs(17, 257, seed=i)) for i, w in enumerate(weights) for g in SOME]
    wanted = [run(*job).tobytes() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            assert [y.tobytes() for y in pool.map(lambda job: run(*job), jobs)] == wanted


# ------------------------------------------------------------ decode


@pytest.mark.parametrize("name", [*FLOATS, *NUMBERS, *FAMOUS, "kmeans2/row", "kmeans3/tensor", "kmeans4/row"])
def test_decoded_rows_are_decode_bit_for_bit(name):
    formats = list(formats_of(name, 5)) if name in NUMBERS else [parse_weight(name)]
    for turn, fmt in enumerate(formats, start=len(name)):
        rows, cols, _ = shape(turn)
        matrix = Matrix(fmt, rows, cols, seed=turn)
        wanted = matrix.packed.decode()
        assert wanted.tobytes() == matrix.exact.astype(np.float32).tobytes()
        ids = np.random.default_rng(turn).integers(0, rows, rows + 3)
        out = np.full((len(ids), cols), np.nan, np.float32)
        weight = make(matrix.packed)
        ops.decode_rows(weight, ids, out)
        assert out.tobytes() == wanted[ids].tobytes()
        out[...] = np.nan
        ops.embed(weight, ids.astype(np.int32), out)
        assert out.tobytes() == wanted[ids].tobytes()


def test_decoded_rows_on_several_threads():
    for fmt in KINDS:
        matrix = Matrix(fmt, 40, 257)
        ids = np.random.default_rng(0).integers(0, 40, 300)  # enough work to wake the team
        for threads in (1, 2, 3):
            kernels.set_threads(threads)
            out = np.full((300, 257), np.nan, np.float32)
            ops.decode_rows(make(matrix.packed), ids, out)
            assert out.tobytes() == matrix.exact[ids].astype(np.float32).tobytes()
