"""Which kernels run a site, as its leaves tell it, and the reasons why no faster one does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from gossamer.formats import ArraySource, Dense, InputFormat, Packed, SiteFormat, encode, parse

pytest.importorskip("gossamer._kernels")
ops = pytest.importorskip("gossamer.ops")
dispatch = pytest.importorskip("gossamer.formats.dispatch")
linear, make_runner = dispatch.linear, dispatch.make_runner

BEST = "avx512bf16"
NO_INTEGERS = "the weight's values are no integers of 16 bits"
NOT_BF16 = "not every value of the weight is a bfloat16"


@pytest.fixture(autouse=True)
def restore():
    level = ops.isa()
    yield
    ops.set_isa(level)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def runner_of(text, rows=20, cols=96, bias=None):
    site = parse(text)
    return make_runner(encode(site.weight, ArraySource(normal(rows, cols))), site, bias)


def run(runner, x):
    out = np.full((len(x), runner.rows), np.nan, np.float32)
    linear([runner], x, [out])
    return out


def close(y, w, x, bias=0.0):
    """A float32 sum of n terms errs by at most n 2^-23 times the sum of their magnitudes; the decoded products add."""
    exact = x.astype(np.float64) @ w.astype(np.float64).T + bias
    size = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T + np.abs(bias)
    return bool((np.abs(y - exact) <= w.shape[1] * 2.0**-22 * size).all())


def told(runner):
    return [(leaf.format, leaf.input, leaf.path, leaf.why) for leaf in runner.leaves]


# ------------------------------------------------------------ one leaf


@pytest.mark.parametrize(
    "weight",
    ["int8/row", "int4/g32", "uint4/g32", "uint5/g16-m(f16)", "ternary/tensor", "bipolar3/g64", "nf4/g64",
     "e2m1/g16*(e4m3/tensor)", "kmeans4/tensor", "int2/32x16", "uint4/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))"],
)  # fmt: skip
@pytest.mark.parametrize(
    "given", ["int8/token", "int8/g32", "int4/g16", "uint4/token", "int8/static(0.1)", "int8/token-o(4)"]
)
def test_integer_inputs_multiply_integers(weight, given):
    runner = runner_of(f"{weight} @ {given}")
    assert told(runner) == [(weight, given, "int8", None)]
    assert runner.refused is None
    assert str(runner.input) == given
    assert (runner.rows, runner.whole) == (20, True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("int4/g32 @ uint8/token", "uint8 inputs less their zero point need nine bits"),
        ("int4/g32 @ e4m3/g16", "e4m3 inputs have no integer form"),
        ("e4m3/g32 @ int8/token", NO_INTEGERS),  # it has a NaN
        ("e5m2/row @ int8/g32", NO_INTEGERS),
        ("e4m2/row @ int8/g32", NO_INTEGERS),  # its values span 2^17
        ("kmeans4/row @ int8/token", NO_INTEGERS),
        ("int4/g48 @ int8/g32", "neither of the groups of weight and input divides the other"),
        ("int8/g32 @ uint4/g48", "neither of the groups of weight and input divides the other"),
    ],
)
def test_integer_inputs_that_run_in_float32(text, why):
    """They are refused as such: the input is rounded as it says, and multiplied in float32."""
    weight, _, given = text.partition(" @ ")
    runner = runner_of(text)
    assert told(runner) == [(weight, given, "f32", why)]
    assert runner.refused == f"{weight} @ {given} runs in float32 on rounded inputs: {why}"
    x = normal(5, 96, seed=1)
    assert close(run(runner, x), runner.packed.decode(), parse(text).input.apply(x))


def test_groups_that_reach_past_the_row_are_one():
    """int4/g48 beside int8/g32 would be refused, but 40 columns are a single group of 48."""
    assert runner_of("int4/g48 @ int8/g32", cols=40).leaves[0].path == "int8"
    assert runner_of("int8/g131072 @ int8/g48", cols=96).leaves[0].path == "int8"


@pytest.mark.parametrize("level", ops.isa_supported())
def test_bfloat16_inputs(level):
    ops.set_isa(level)
    none = "this instruction set has no bfloat16 dot product"
    for text in ("bf16", "int4/g32", "int8/row", "uint8/g16", "bipolar8/row", "e4m3/g32", "uint4/g32-m(f16)"):
        path, why = ("bf16", None) if level == BEST else ("f32", none)
        assert told(runner_of(text)) == [(text, "bf16", path, why)]
    for text in ("f32", "f16", "nf4/g64", "kmeans3/tensor", "kmeans2/row"):
        assert told(runner_of(text)) == [(text, "bf16", "f32", NOT_BF16)]
        assert runner_of(text).refused is None  # it runs as it says


@pytest.mark.parametrize("text", ["f32", "bf16", "int4/g32", "nf4/g64", "kmeans4/row"])
def test_float32_inputs(text):
    runner = runner_of(f"{text} @ f32")
    assert told(runner) == [(text, "f32", "f32", None)]
    assert runner.refused is None


# ------------------------------------------------------------ several


@pytest.mark.parametrize(
    ("text", "leaves"),
    [
        ("int4/g32 + mask(1%: f16) @ int8/token",
         [("int4/g32", "int8/token", "int8"), ("mask(1%: f16)", "int8/token", "sparse")]),
        ("cols(16: bf16 @ f32, int4/row) @ uint4/token",
         [("bf16", "f32", "f32"), ("int4/row", "uint4/token", "int8")]),
        ("rows(4: int8/g32 @ int8/token, 5: f16 @ f32, int4/g32) @ f32",
         [("int8/g32", "int8/token", "int8"), ("f16", "f32", "f32"), ("int4/g32", "f32", "f32")]),
        ("int4/g32 + rank4(int8/row) @ int8/token",
         [("int4/g32", "int8/token", "int8"), ("int8/row", "int8/token", "int8"), ("int8/row", "int8/token", "int8")]),
        ("hadamard(32, 1, permute(scale(int4/g32))) @ int4/token", [("int4/g32", "int4/token", "int8")]),
        ("planes(int4/g64) @ int8/token", [("int4/g64", "int8/token", "int8")]),
    ],
)  # fmt: skip
def test_leaves_of_parts(text, leaves):
    """In the order in which they are added, each with the input format that reaches it."""
    runner = runner_of(text)
    assert [(leaf.format, leaf.input, leaf.path) for leaf in runner.leaves] == leaves
    assert runner.refused is None
    assert runner.whole == (not text.startswith("rows"))
    assert len(runner.first) == text.count("rank")


def test_one_slow_leaf_is_named():
    runner = runner_of("cols(32: kmeans4/row, int4/g32) @ int8/token")
    assert runner.refused == f"kmeans4/row @ int8/token runs in float32 on rounded inputs: {NO_INTEGERS}"
    assert [leaf.path for leaf in runner.leaves] == ["f32", "int8"]


@pytest.mark.parametrize(
    "text", ["rank4(rank2(f16))", "int4/g32 + rows(5: f16, int8/row)", "cols(40: rows(3: f32, bf16), f16)"]
)
def test_nestings_that_are_decoded(text):
    """Rows inside of other parts and products of products: right, and named."""
    runner = runner_of(f"{text} @ f32")
    assert runner.refused is not None
    assert "so it is decoded to float32" in runner.refused
    x = normal(5, 96, seed=1)
    w = runner.packed.decode()
    if text.startswith("int4"):
        first = encode(parse("int4/g32").weight, ArraySource(normal(20, 96))).decode()
        exact = x.astype(np.float64) @ w.astype(np.float64).T
        assert (np.abs(run(runner, x) - exact) <= 96 * 2.0**-21 * np.abs(x) @ (np.abs(w) + np.abs(first)).T).all()
    else:
        assert close(run(runner, x), w, x)


@dataclass(frozen=True)
class Unknown(Dense):
    """A format without a kernel."""

    def kernel(self, arrays, rows, cols):
        return None

    def __str__(self):
        return "unknown"


def test_a_format_without_a_kernel_is_decoded():
    packed = encode(Unknown("bf16"), ArraySource(normal(18, 33)))
    bias = normal(18, seed=2)
    for given in ("f32", "bf16"):
        runner = make_runner(packed, SiteFormat(packed.format, InputFormat(given)), bias)
        assert runner.refused == "no kernel reads unknown here, so it is decoded to float32"
        x = normal(3, 33, seed=1)
        assert close(run(runner, x), packed.decode(), InputFormat(given).apply(x), bias)
        ids = np.array([17, 0, 17])
        assert runner.look_up(ids).tobytes() == packed.decode()[ids].tobytes()


# ------------------------------------------------------------ memory


def test_what_is_kept():
    """One stored matrix is looked up in place; several are decoded at the first look-up; factors share one buffer."""
    assert runner_of("int4/g32").only is not None
    assert runner_of("planes(int4/g32)").only is not None
    for text in ("permute(int4/g32)", "int4/g32 + mask(1%: f16)", "rank4(f16)", "rows(3: f16, bf16)", "mask(1%: f16)"):
        runner = runner_of(text)
        assert runner.only is None
        assert runner.weight is runner.weight
        assert runner.look_up(np.array([19, 3])).tobytes() == runner.packed.decode()[[19, 3]].tobytes()
    runner = runner_of("int4/g32 + rank4(f16)")
    (z,) = runner.extras(9)
    assert z.shape == (9, 4)
    assert runner.extras(9)[0].base is z.base
    (few,) = runner.extras(2)
    assert few.shape == (2, 4)
    assert np.shares_memory(few, z)
    assert runner.extras(10)[0].shape == (10, 4)


def test_a_mapped_array_is_used_in_place():
    """A weight reads the arrays of its file; nothing but what is decoded or merged is copied."""
    packed = encode(parse("int4/g32 @ int8/token").weight, ArraySource(normal(16, 32)))
    runner = make_runner(packed, parse("int4/g32 @ int8/token"))
    x = normal(1, 32, seed=1)
    before = run(runner, x)
    packed.arrays["scales"][:] *= np.float16(2)
    assert np.array_equal(run(runner, x), 2 * before)
    assert isinstance(runner.packed, Packed)
