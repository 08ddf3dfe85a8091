"""What an input is rounded to: the definitions element by element, and every edge of a token."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import FormatError
from gossamer.formats import InputFormat, parse, parse_input

F = np.float32
SIGNED = [("int8", 127), ("int4", 7)]
UNSIGNED = [("uint8", 255), ("uint4", 15)]
NUMBERS = ("int8", "int4", "uint8", "uint4", "e4m3")
INPUTS = [parse_input(t) for t in (
    "f32", "bf16", *(f"{n}/{g}{o}" for n in NUMBERS for g in ("token", "g16", "g32", "static(0.02)")
                     for o in ("", "-o(2.5)")))]  # fmt: skip


def tokens(rows=7, cols=50, seed=0):
    rng = np.random.default_rng([seed, rows, cols])
    x = rng.standard_normal((rows, cols)).astype(F)
    x[::3] = np.abs(x[::3])
    x[1::4] -= 3
    x[0, :: max(1, cols // 3)] *= 20
    return x


def one_group(number, x, scale=None):
    """The definition for the elements of one group, written out: (codes, s, z or None)."""
    x = [F(v) for v in x]
    if not all(math.isfinite(v) for v in x):
        return [0] * len(x), F(np.nan), 0
    if number in dict(SIGNED):
        top = dict(SIGNED)[number]
        s = F(max(abs(v) for v in x)) / F(top) if scale is None else F(scale)
        return [0 if s == 0 else int(min(top, max(-top, np.rint(v / s)))) for v in x], s, None
    if number == "e4m3":
        s = F(max(abs(v) for v in x)) / F(448) if scale is None else F(scale)
        near = [F(0) if s == 0 else F(min(F(448), max(F(-448), v / s))) for v in x]
        return [int((np.asarray(v).astype(ml_dtypes.float8_e4m3fn) + 0).view(np.uint8)) for v in near], s, None
    top = dict(UNSIGNED)[number]
    low, high = min(F(0), *x), max(F(0), *x)
    s = (high - low) / F(top) if scale is None else F(scale)
    if s == 0:
        return [0] * len(x), s, 0
    z = int(min(top, max(0, np.rint(-low / s))))
    return [int(min(top, max(0, np.rint(v / s) + z))) for v in x], s, z


@pytest.mark.parametrize("fmt", [f for f in INPUTS if f.quantized], ids=str)
@pytest.mark.parametrize("cols", [1, 15, 16, 17, 50])
def test_codes_follow_the_definition(fmt, cols):
    x = tokens(cols=cols)
    out = fmt.quantize(x)
    inner = x.copy()
    if fmt.outlier is not None:
        big = np.abs(x) >= F(fmt.outlier)
        assert big.any() or cols < 15
        assert np.array_equal(out.outliers, np.where(big, x, 0))
        inner[big] = 0
    width = fmt.group if isinstance(fmt.group, int) else cols
    assert out.codes.shape == x.shape
    assert out.codes.dtype == (np.int8 if fmt.number.startswith("int") else np.uint8)
    assert out.scales.shape == (len(x), -(-cols // width)) == (len(x), fmt.groups(cols))
    assert out.scales.dtype == np.float32
    scale = fmt.group if isinstance(fmt.group, float) else None
    value = fmt.apply(x)
    for t in range(len(x)):
        for g in range(out.scales.shape[1]):
            span = slice(g * width, min(cols, (g + 1) * width))
            codes, s, z = one_group(fmt.number, inner[t, span], scale)
            assert out.codes[t, span].tolist() == [c & 0x7F if c == 0x80 and fmt.number == "e4m3" else c for c in codes]
            assert out.scales[t, g] == s
            assert (out.zeros is None) == (z is None)
            if z is not None:
                assert out.zeros[t, g] == z
            meant = np.array(codes, np.uint8).view(ml_dtypes.float8_e4m3fn) if fmt.number == "e4m3" else codes
            wanted = s * (np.array(meant, F) - F(z or 0))
            kept = np.abs(x[t, span]) >= F(fmt.outlier) if fmt.outlier else np.zeros(len(wanted), bool)
            assert np.array_equal(value[t, span], np.where(kept, x[t, span], wanted))


def test_plain_inputs():
    x = np.array([[1, -0.0, np.nan, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 2.0**-133]], F)
    assert np.array_equal(parse_input("f32").apply(x).view(np.uint32), x.view(np.uint32))
    got = parse_input("bf16").apply(x)
    assert np.array_equal(got, x.astype(ml_dtypes.bfloat16).astype(F), equal_nan=True)
    assert got[0, 5] == 1  # ties to even
    assert got[0, 6] == 1 + 2**-6
    assert got[0, 7] == np.inf  # beyond the largest


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("group", ["token", 16])
def test_a_zero_group_is_zero(number, group):
    fmt = InputFormat(number, group)
    x = np.zeros((2, 32), F)
    x[1, 20] = 1
    out = fmt.quantize(x)
    assert not fmt.apply(x)[0].any()
    assert out.scales[0, 0] == 0
    assert not out.codes[0].any()
    assert out.zeros is None or not out.zeros[0].any()
    if group == 16:
        assert out.scales[1, 0] == 0 < out.scales[1, 1]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", ["token", 16, 0.5])
def test_what_is_no_number_makes_its_group_nan_and_no_other(number, bad, group):
    x = tokens(2, 40)
    x[0, 17] = bad
    fmt = InputFormat(number, group)
    out, value = fmt.quantize(x), fmt.apply(x)
    span = slice(16, 32) if group == 16 else slice(0, 40)
    assert np.isnan(value[0, span]).all()
    rest = np.delete(value[0], np.r_[span])
    assert np.isfinite(rest).all()
    assert np.isfinite(value[1]).all()
    assert np.isnan(out.scales[0]).sum() == 1
    assert not out.codes[0, span].any()


@pytest.mark.parametrize("number", NUMBERS)
def test_subnormal_scales(number):
    top = {"int8": 127, "int4": 7, "uint8": 255, "uint4": 15, "e4m3": 448}[number]
    fmt, tiny = InputFormat(number), 2.0**-149
    one = np.array([[top * tiny, 0, 3 * tiny]], F)  # the scale is the smallest float32
    assert fmt.quantize(one).scales[0, 0] == F(tiny)
    assert np.array_equal(fmt.apply(one), one)
    none = np.array([[tiny, 0, 0]], F)  # the scale underflows: nothing is left
    assert fmt.quantize(none).scales[0, 0] == 0
    assert not fmt.apply(none).any()
    assert not fmt.quantize(none).codes.any()


def test_the_largest_numbers():
    big = np.finfo(F).max
    half = big / 2  # s * 127 is allowed to round beyond the largest number itself
    for number in ("int8", "int4", "e4m3"):
        value = InputFormat(number).apply(np.array([[half, -half, 0]], F))
        assert np.allclose(value[0] / half, [1, -1, 0], rtol=1e-6)
    for number in ("uint8", "uint4"):
        assert np.isnan(InputFormat(number).apply(np.array([[big, -big, 0]], F))).all()  # hi - lo is beyond float32
        assert np.allclose(InputFormat(number).apply(np.array([[half, 0]], F)) / half, [[1, 0]], rtol=1e-6)


def test_static_scales_cut_what_is_beyond():
    x = np.array([[-100, -1, 0.004, 0.006, 1, 100]], F)
    assert np.allclose(parse_input("int8/static(0.01)").apply(x), [[-1.27, -1, 0, 0.01, 1, 1.27]], atol=1e-6)
    assert np.allclose(parse_input("e4m3/static(0.01)").apply(x)[0, [0, 5]], [-4.48, 4.48])
    # The zero point of an unsigned one still follows the token's smallest element.
    out = parse_input("uint4/static(0.5)").quantize(np.array([[-2, 0, 1], [2, 3, 4]], F))
    assert out.zeros.tolist() == [[4], [0]]
    assert out.codes.tolist() == [[0, 4, 6], [4, 6, 8]]


def test_outliers_stay_as_they_are_and_out_of_the_scale():
    x = np.array([[0.1, -8, 0.2, np.inf, 6, 5.99]], F)
    out = parse_input("int8/token-o(6)").quantize(x)
    assert out.scales[0, 0] == F(5.99) / F(127)
    assert out.outliers.tolist() == [[0, -8, 0, np.inf, 6, 0]]
    assert out.codes[0, [1, 3, 4]].tolist() == [0, 0, 0]
    assert np.array_equal(parse_input("int8/token-o(6)").apply(x)[0, [1, 3, 4]], F([-8, np.inf, 6]))
    zeros = parse_input("uint4/token-o(6)").quantize(x)
    assert zeros.codes[0, 1] == zeros.zeros[0, 0]  # what is taken out counts as zero
    assert np.isnan(parse_input("int8/token-o(6)").apply(F([[np.nan, 8]]))[0, 0])
    assert parse_input("int8/token-o(6)").apply(F([[np.nan, 8]]))[0, 1] == 8


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.sampled_from(INPUTS))
def test_tokens_do_not_depend_on_each_other(values, fmt):
    x = np.zeros((3, len(values)), F)
    x[1] = values
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.array_equal(fmt.apply(x)[1], fmt.apply(x[1:2])[0], equal_nan=True)
    assert fmt.apply(x[:0]).shape == (0, len(values))


@pytest.mark.parametrize("fmt", INPUTS, ids=str)
def test_text(fmt):
    assert parse_input(str(fmt)) == fmt
    assert parse(f"int4/g32 @ {fmt}").input == fmt


@pytest.mark.parametrize(("text", "printed"), [
    ("int8 / token", "int8/token"),
    ("int4/g0128", "int4/g128"),
    ("int8/static(1e-05)", "int8/static(1e-05)"),
    ("int8/static(0.050)", "int8/static(0.05)"),
    ("int8/static(3.0)", "int8/static(3)"),
    ("int8/static(1e+30)-o(06.50)", "int8/static(1e+30)-o(6.5)"),
    ("uint8/g64-o(6)", "uint8/g64-o(6)"),
])  # fmt: skip
def test_printing_is_canonical(text, printed):
    assert str(parse_input(text)) == printed
    assert str(parse_input(printed)) == printed


@pytest.mark.parametrize("build", [
    lambda: InputFormat("f16"),
    lambda: InputFormat("bf16", 32),
    lambda: InputFormat("f32", outlier=6.0),
    lambda: InputFormat("int8", 24),
    lambda: InputFormat("int8", 0),
    lambda: InputFormat("int8", True),
    lambda: InputFormat("int8", 1 << 21),
    lambda: InputFormat("int8", "row"),
    lambda: InputFormat("int8", 0.0),
    lambda: InputFormat("int8", -1.0),
    lambda: InputFormat("int8", math.inf),
    lambda: InputFormat("int8", math.nan),
    lambda: InputFormat("int8", 1e39),
    lambda: InputFormat("int8", "token", 0.0),
    lambda: InputFormat("int8", "token", math.nan),
])  # fmt: skip
def test_an_input_that_could_not_be_written_cannot_be_built(build):
    with pytest.raises(FormatError) as caught:
        build()
    assert str(caught.value).endswith(".")


def test_plain_inputs_have_no_codes():
    with pytest.raises(FormatError, match="has no codes"):
        parse_input("bf16").quantize(tokens())
