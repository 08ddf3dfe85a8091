"""Format expressions as text: printing and parsing are inverse, and a typo is named with what would be right."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import FormatError
from gossamer.formats import (
    ArraySource,
    Coded,
    Cols,
    Dense,
    Group,
    Hadamard,
    InputFormat,
    KMeans,
    Mask,
    Permute,
    Planes,
    Rank,
    Rows,
    Scale,
    SiteFormat,
    Sum,
    bits_per_weight,
    encode,
    parse,
    parse_input,
    parse_weight,
    weight_of,
)
from gossamer.formats.composite import MAX_DEPTH, depth
from gossamer.formats.group import MAX_GROUP
from gossamer.formats.numbers import FLOATS, NUMBERS, SCALES
from gossamer.formats.transforms import hadamard_factors

# ---------------------------------------------------------------- any expression

positive = st.floats(2**-126, 2.0**120, width=32, allow_subnormal=False)
sizes = st.sampled_from([16, 32, 64, 128, MAX_GROUP]) | st.integers(1, MAX_GROUP // 16).map(lambda n: 16 * n)
groups = st.one_of(
    sizes.map(Group.of), st.just(Group.row()), st.just(Group.tensor()), st.builds(Group.tile, sizes, sizes)
)
inner_groups = groups | st.integers(1, MAX_GROUP // 8).map(lambda n: Group.of(8 * n))
inputs = st.one_of(
    st.sampled_from([InputFormat("f32"), InputFormat("bf16")]),
    st.builds(
        InputFormat, st.sampled_from(["int8", "int4", "uint8", "uint4", "e4m3"]),
        st.just("token") | sizes | positive, st.none() | positive,
    ),
)  # fmt: skip


@st.composite
def coded(draw, level=0):
    number = NUMBERS[draw(st.sampled_from(sorted(NUMBERS)))]
    inside = coded(level + 1) if level < 2 else st.nothing()
    scale = draw(st.none() | st.sampled_from(SCALES) | inside)
    zero = minimum = None
    if number.family == "uint":
        offset = draw(st.sampled_from(["z", "0", "m"]))
        zero = offset == "z"
        minimum = draw(st.sampled_from(sorted(FLOATS)) | inside) if offset == "m" else None
    return Coded(number, draw(groups if level == 0 else inner_groups), scale, zero, minimum)


def is_planes(fmt):
    return isinstance(fmt, Coded) and fmt.number.family in ("int", "uint", "bipolar")


leaves = st.one_of(
    st.sampled_from(sorted(FLOATS)).map(Dense),
    coded(),
    st.builds(KMeans, st.sampled_from([2, 3, 4]), st.sampled_from(["row", "tensor"])),
)
blocks = st.none() | st.integers(2, 1 << 20).filter(hadamard_factors) | st.sampled_from([2, 12, 64, 128, 1536])
counts = st.integers(1, 9999)


@st.composite
def splits(draw, kind, branch):
    taken = draw(st.lists(counts, min_size=1, max_size=3))
    return kind(tuple(taken), tuple(draw(branch) for _ in range(len(taken) + 1)))


def sites_of(weight):
    return st.builds(SiteFormat, weight.filter(lambda w: not isinstance(w, Dense)), inputs) | weight.map(SiteFormat)


def wider(weight):
    """One more level around a weight."""
    branch = weight | sites_of(weight)
    values = st.sampled_from([*map(Dense, FLOATS), parse_weight("int8/tensor")])
    return st.one_of(
        coded().filter(is_planes).map(Planes),
        st.builds(Mask, st.integers(1, 50_000).map(lambda n: n / 10_000), values | values.map(SiteFormat)),
        st.builds(Rank, st.integers(1, 4096), branch),
        splits(Cols, branch),
        splits(Rows, branch),
        st.builds(Hadamard, blocks, st.none() | st.integers(0, (1 << 32) - 1), branch),
        branch.map(Permute),
        branch.map(Scale),
        st.lists(weight.filter(lambda w: not isinstance(w, Sum)), min_size=2, max_size=4).map(tuple).map(Sum),
    )


weights = leaves | wider(leaves) | wider(leaves | wider(leaves)).filter(lambda w: depth(w) <= MAX_DEPTH)
sites = st.builds(SiteFormat, weights.filter(lambda w: not isinstance(w, Dense)), inputs) | weights.map(SiteFormat)


@settings(deadline=None)
@given(sites, st.lists(st.sampled_from(["", "", " ", "\t", "\n ", "\u2003"]), min_size=40, max_size=40))
def test_what_is_printed_reads_back(site, spaces):
    text = str(site)
    if len(text) > 2000:
        return
    assert parse(text) == site
    assert str(parse(text)) == text
    spaced = "".join(s + c for s, c in zip(spaces * (len(text) // 40 + 1), text))
    assert len(spaced) > 2000 or parse(spaced) == site
    assert parse_weight(str(site.weight)) == site.weight
    assert parse_input(str(site.input)) == site.input


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("int4/g32*f16 @ bf16", "int4/g32"),
        ("int8/row*f32", "int8/row"),
        ("int8/row*f16", "int8/row*f16"),
        ("int8/tensor*f32", "int8/tensor"),
        ("int8/128x128*f32", "int8/128x128"),
        ("uint4/g128-z(uint4)", "uint4/g128"),
        ("uint4/g128-z(0)", "uint4/g128-z(0)"),
        ("uint4/g32*f16-m(f16)", "uint4/g32-m(f16)"),
        (" uint5 / g64 * f32 - m( bf16 )@int8 / token", "uint5/g64*f32-m(bf16) @ int8/token"),
        ("uint2/g16-m((uint4/g16-z(0)))", "uint2/g16-m(uint4/g16-z(0))"),
        ("bf16@bf16", "bf16"),
        ("f16@f32", "f16 @ f32"),
        ("int4/g032", "int4/g32"),
        ("mask(01.50%:f16)", "mask(1.5%: f16)"),
        ("mask(5.0000%:int8/tensor*f32)", "mask(5%: int8/tensor)"),
        ("int4/g32+rank032(bf16)", "int4/g32 + rank32(bf16)"),
        ("cols(0256:bf16@bf16,int4/row)@uint4/token", "cols(256: bf16 @ bf16, int4/row) @ uint4/token"),
        ("hadamard(0128,007,int4/row)", "hadamard(128, 7, int4/row)"),
        ("permute(scale(int4/g32*f16))", "permute(scale(int4/g32))"),
    ],
)
def test_printing_is_the_shortest_form(text, printed):
    assert str(parse(text)) == printed
    assert parse(printed) == parse(text)


def test_defaults():
    assert parse("int4/g32") == SiteFormat(Coded(NUMBERS["int4"], Group.of(32), "f16"), InputFormat("bf16"))
    assert parse_weight("int8/row") == Coded(NUMBERS["int8"], Group.row(), "f32")
    assert parse_weight("uint4/row-m(f16)") == Coded(NUMBERS["uint4"], Group.row(), "f32", False, "f16")
    assert parse_weight("uint4/g32") == Coded(NUMBERS["uint4"], Group.of(32), "f16", True)
    assert parse_weight("e4m3/128x128") == Coded(NUMBERS["e4m3"], Group.tile(128, 128), "f32")


def test_an_input_inside_a_branch_belongs_to_the_branch():
    site = parse("cols(256: bf16 @ bf16, int4/row) @ uint4/token")
    assert site.input == InputFormat("uint4")
    assert site.weight.branches == (SiteFormat(Dense("bf16")), parse_weight("int4/row"))
    assert parse_weight("cols(256: bf16 @ bf16, int4/row)") == site.weight  # a weight may hold inputs, but has none
    assert weight_of(site.weight.branches[0]) == Dense("bf16")


# Storage that others define, each written as an expression, with its bits for a matrix of 256 x 512 where groups divide
# the shape: codes + scales.
KNOWN = {
    "int4/g32": 4.5,  # Q4_0
    "uint4/g32-m(f16)": 5,  # Q4_1
    "int8/g32": 8.5,  # Q8_0
    "uint2/g16*(uint4/g16-z(0))-m(uint4/g16-z(0))": 2.625,  # Q2_K: 2 + 2 * (4 + 16/16) / 16
    "int3/g16*(int6/g16)": 3 + 7 / 16,  # Q3_K
    "uint4/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))": 4.5,  # Q4_K: 4 + 2 * (6 + 16/8) / 32
    "uint5/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))": 5.5,  # Q5_K
    "int6/g16*(int8/g16)": 6.5625,  # Q6_K
    "e2m1/g32*e8m0": 4.25,  # MXFP4
    "e2m3/g32*e8m0": 6.25,  # MXFP6
    "e3m2/g32*e8m0": 6.25,
    "e4m3/g32*e8m0": 8.25,  # MXFP8
    "e5m2/g32*e8m0": 8.25,
    "e2m1/g16*(e4m3/tensor)": 4.5,  # NVFP4
    "nf4/g64*(int8/g256)": None,  # QLoRA
    "uint4/g128*(int8/row)": None,  # DGQ
    "uint4/g128*(uint8/row-z(0))": None,  # QoQ
    "uint3/g16*(uint3/g16) + mask(1%: f16)": None,  # SpQR
    "e4m3/128x128": 8,  # FP8 in tiles
    "cols(256: bf16 @ bf16, int4/row) @ uint4/token": None,  # QUIK
    "int4/g128 + rank32(bf16)": None,  # error correction
    "hadamard(128, none, int4/row) @ int4/token": None,  # as QuaRot
    "kmeans4/row": None,
    "ternary/row": None,
    "planes(int4/g64)": 4.25,
}


@pytest.mark.parametrize("text", KNOWN)
@pytest.mark.parametrize("shape", [(256, 512), (37, 384), (33, 640)])
def test_known_storage_is_an_expression(text, shape):
    site = parse(text)
    assert str(site) == text
    rows, cols = shape
    w = (np.random.default_rng(shape).standard_normal(shape) * 0.02).astype(np.float32)
    packed = encode(site.weight, ArraySource(w))
    packed.validate("this matrix")
    # Two bits with a minimum leave about a third of the deviation, all others less.
    assert np.sqrt(((packed.decode() - w) ** 2).mean()) / 0.02 < (0.55 if "ternary" in text else 0.36)
    if shape == (256, 512) and KNOWN[text]:
        assert packed.bits_per_weight == pytest.approx(KNOWN[text], rel=0.02)
        assert bits_per_weight(site.weight, rows, cols) == packed.bits_per_weight


def test_zero_points_may_be_written_out():
    assert str(parse("uint3/g16*(uint3/g16)-z(uint3) + mask(1%: f16)")) == "uint3/g16*(uint3/g16) + mask(1%: f16)"


# ---------------------------------------------------------------- typos

TYPOS = [
    # text, what the message names, what it offers
    ("int5/q32", "'q32'", "did you mean 'g32'"),
    ("int4/G64", "'G64'", "did you mean 'g64'"),
    ("int4/128", "'128'", "did you mean 'g128'"),
    ("int4/g7", "'g7'", "did you mean 'g16'"),
    ("int4/g8", "'g8'", "did you mean 'g16'"),
    ("int4/g0", "'g0'", "did you mean 'g16'"),
    ("int4/g33", "'g33'", "did you mean 'g48'"),
    (f"int4/g{MAX_GROUP + 8}", f"'g{MAX_GROUP + 8}'", f"did you mean 'g{MAX_GROUP}'"),
    ("int4/g99999999999999999999", "'g99999999999999999999'", "g32"),
    ("int4/17x128", "'17x128'", "did you mean '32x128'"),
    ("int4/16x8", "'16x8'", "did you mean '16x16'"),
    ("int8/token", "'token'", "'row'"),
    ("int4", "'int4' needs a group", "int4/g32"),
    ("int4/", "'int4' needs a group", "int4/g32"),
    ("int4+bf16", "'int4' needs a group", "'+'"),
    ("int9/g32", "'int9'", "did you mean 'int8'"),
    ("INT4/g32", "'INT4'", "did you mean 'int4'"),
    ("fp16", "'fp16'", "did you mean 'f16'"),
    ("/g32", "'/'", "int4"),
    ("bf16/g32", "'/g32'", "write 'bf16'"),
    ("int4/g32*f8", "'f8'", "f32, f16, bf16"),
    ("int4/g32*bf61", "'bf61'", "did you mean 'bf16'"),
    ("int4/g32*", "nothing more", "f32, f16, bf16"),
    ("int4/g64*int8/g256", "'int8'", "stands in parentheses"),
    ("int4/g64*(int8/g257)", "'g257'", "did you mean 'g264'"),
    ("int4/g64*(int8)", "'int8' needs a group", "')'"),
    ("int4/g64*(f16)", "parentheses", "'*f16'"),
    ("int4/g64*(int8/g256", "nothing more", "')'"),
    ("int4/g64*(int8/g16*(int8/g16*(int8/g16)))", "at character 1", "at most 3"),
    ("int4/g32-m(f16)", "'-m(f16)'", "uint4"),
    ("int4/g32-z(int4)", "'-z(int4)'", "uint4"),
    ("uint4/g32-m(int8)", "'-m(int8)'", "f32, f16, bf16"),
    ("uint4/g32-m()", "'-m())'", "f32, f16, bf16"),
    ("uint4/g32-m(e8m0)", "'e8m0'", "f32, f16, bf16"),
    ("uint4/g32-z(uint8)", "'-z(uint8)'", "-z(uint4)"),
    ("uint4/g32-q(f16)", "'-q'", "-m(SCALE)"),
    ("uint4/g32-m(f16)-m(f16)", "'-m(f16)'", "left over"),
    ("kmeans4/g32", "'kmeans4'", "kmeans4/row"),
    ("kmeans5/row", "'kmeans5'", "did you mean 'kmeans"),
    ("f16 @ int8/token", "'f16 @ int8/token'", "int8/g32"),
    ("int4/g32 @ int8", "'int8'", "did you mean 'int8/token'"),
    ("int4/g32 @ bf17", "'bf17'", "did you mean 'bf16'"),
    ("int4/g32 @ int8/tokn", "'tokn'", "did you mean 'token'"),
    ("int4/g32 @ int8/g20", "'g20'", "multiple of 16"),
    ("int4/g32 @ int8/static", "'static'", "int8/static(0.05)"),
    ("int4/g32 @ int8/static()", "a static scale", "int8/static(0.05)"),
    ("int4/g32 @ int8/static(0)", "static scale", "positive"),
    ("int4/g32 @ int8/static(1e99)", "static scale", "float32"),
    ("int4/g32 @ int8/token-p(6)", "'-p'", "-o(6)"),
    ("int4/g32 @ int8/token-o(x)", "outlier threshold", "-o(6)"),
    ("int4/g32 @", "after the '@'", "int8/token"),
    ("int4/g32 @ bf16 @ f32", "second '@'", "one input"),
    ("@ bf16", "before the '@'", "int4/g32"),
    ("@", "before the '@'", "int4/g32"),
    ("", "empty", "int4/g32"),
    (" \t\n", "empty", "int4/g32"),
    ("int4/g٣٢", "'g٣٢'", "g32"),  # Arabic digits
    ("ínt4/g32", "'ínt4'", "did you mean 'int4'"),
    ("int4/g32\x1b[31m", "'g32\\u001b[31m'", "g32"),
    ("((((int4/g32))))", "'('", "int4"),
    ("int4/g32;drop", "'g32;drop'", "g32"),
    ("int4/g32)", "')' closes nothing", "remove"),
    ("int4/g32 int4/g32", "'g32int4'", "g32"),
    ("int4/g32 +", "nothing more", "int4/g32"),
    ("+ int4/g32", "'+'", "int4/g32"),
    ("plane(int4/g64)", "'plane'", "did you mean 'planes'"),
    ("planes(bf16)", "'bf16'", "known:"),
    ("planes(nf4/g64)", "planes(nf4/g64)", "planes(int4/g64)"),
    ("planes int4/g64", "'planesint4'", "did you mean 'planes'"),
    ("planes", "'planes'", "planes(int4/g64)"),
    ("mask(f16)", "percentage", "mask(1%: f16)"),
    ("mask(1: f16)", "'%'", "mask(1%: f16)"),
    ("mask(1% f16)", "':'", "mask(1%: f16)"),
    ("mask(6%: f16)", "mask(6.0%", "at most 5 percent"),
    ("mask(0%: f16)", "mask(0.0%", "at most 5 percent"),
    ("mask(0.00001%: f16)", "mask(1e-05%", "4 digits"),
    ("mask(1%: int4/g32)", "'int4/g32'", "int8/tensor"),
    ("rank(bf16)", "'rank'", "rank32(bf16)"),
    ("rank0(bf16)", "rank0", "rank32(bf16)"),
    ("rank32", "'rank32'", "rank32(bf16)"),
    ("rank32(bf16", "')'", "rank32(bf16)"),
    ("rank32(bf16, bf16)", "','", "rank32(bf16)"),
    ("cols(bf16, int4/row)", "first part", "cols(256: bf16, int4/row)"),
    ("cols(x: bf16, int4/row)", "'x'", "whole number"),
    ("cols(256: bf16)", "last part", "cols(256: bf16, int4/row)"),
    ("cols(256: bf16, int4/row, bf16)", "before the last", "cols(256: bf16, int4/row)"),
    ("cols(0: bf16, int4/row)", "0 columns", "1 or more"),
    ("rows(99999999999: bf16, int4/row)", "'99999999999'", "whole number"),
    ("hadamard(int4/row)", "'int4'", "hadamard(128, none, int4/row)"),
    ("hadamard(128, int4/row)", "'int4'", "hadamard(128, none, int4/row)"),
    ("hadamard(100, none, int4/row)", "hadamard(100", "96 or 104"),
    ("hadamard(128, 4294967296, int4/row)", "4294967296", "none"),
    ("hadamard(128; none; int4/row)", "';none;int4'", "','"),
    ("permute(permute(permute(permute(bf16))))", "'permute'", "3 deep"),
    ("permute()", "before ')'", "int4/g32"),
    ("permute(bf16, bf16)", "','", "permute(int4/g128)"),
    ("scale(bf16 @)", "after the '@'", "int8/token"),
    ("int4/g32" + " + bf16" * 8, "2 to 8 terms", "9"),
]  # fmt: skip


def message(text):
    with pytest.raises(FormatError) as caught:
        parse(text)
    return str(caught.value)


@pytest.mark.parametrize(("text", "names", "offers"), TYPOS)
def test_a_typo_is_named_with_what_would_be_right(text, names, offers):
    said = message(text)
    assert names in said, said
    assert offers in said, said
    assert said.isprintable()  # one line, and nothing that a terminal would obey
    assert said.endswith((".", "?")), said


@pytest.mark.parametrize(("text", "place"), [
    ("int4/q32", "at character 6"),
    ("  int4 / g32 @ bf17", "at character 16"),
    ("int4/g32 + rank32(bf61)", "at character 19"),
    ("cols(256: bf16, int4/row", "at the end"),
    ("hadamard(100, none, int4/row)", "at character 1:"),
])  # fmt: skip
def test_the_place_is_named(text, place):
    assert place in message(text)


LONG = (
    "{}", "int4/{}", "int4/g32*{}", "int4/g32 @ {}", "int4/g32 @ int8/static({})", "uint4/g32-z({})", "uint4/g32-m({})",
    "{} @ bf16", "mask({}%: f16)", "rank{}(bf16)", "cols({}: bf16, bf16)", "hadamard({}, none, bf16)",
)  # fmt: skip


@pytest.mark.parametrize("template", LONG)
@pytest.mark.parametrize("character", ["x", "4", "(", "\x00", "é", "9", "-", "1e"])
@pytest.mark.parametrize("count", [300, 10_000])
def test_long_text_gives_a_short_message(template, character, count):
    assert len(message(template.format(character * count))) < 700


@pytest.mark.parametrize("text", [
    "(" * 10_000_000, "int4/g32+" * 1_000_000, " " * 10_000_000, "permute(" * 1_000_000 + "bf16" + ")" * 1_000_000,
    "\x00" * 10_000_000, "int4/g16*(" * 200, "permute(" * 240, "+" * 2000, "cols(1:" * 285, "bf16@" * 400,
])  # fmt: skip
def test_hostile_text_is_refused_at_once(text):
    start = time.monotonic()
    assert len(message(text)) < 700
    assert time.monotonic() - start < 2


@given(st.text(max_size=60) | st.text("intu458f16bg32/row*-zm() @", max_size=30) | st.lists(st.sampled_from([
    "int4", "/g32", "/row", "uint4", "(", ")", ",", ":", "+", "@", "bf16", "cols(2:", "mask(1%:", "rank4(", "permute(",
    "scale(", "hadamard(8,none,", "planes(", "-z(", "-m(", "*", "e8m0", "int8/token", "-o(6)", "kmeans4"]),
    max_size=12).map("".join))  # fmt: skip
def test_any_text_parses_or_is_refused_in_one_line(text):
    try:
        site = parse(text)
    except FormatError:
        assert message(text).isprintable()
        return
    assert parse(str(site)) == site


# ---------------------------------------------------------------- values


INT4 = parse_weight("int4/g32")


@pytest.mark.parametrize("build", [
    lambda: Dense("int4"),
    lambda: Coded(NUMBERS["int4"], Group.of(12), "f16"),
    lambda: Coded(NUMBERS["int4"], Group.of(32), "int8"),
    lambda: Coded(NUMBERS["int4"], Group.of(32), "f16", False, "f16"),
    lambda: Coded(NUMBERS["uint4"], Group.of(32), "f16", False, "int8"),
    lambda: SiteFormat(Dense("f32"), InputFormat("int8")),
    lambda: SiteFormat(Dense("f32"), InputFormat("e4m3", 32)),
    lambda: Sum((INT4,)),
    lambda: Sum((INT4,) * 9),
    lambda: Sum((Sum((INT4, INT4)), INT4)),
    lambda: Sum((SiteFormat(INT4), INT4)),
    lambda: Cols((), (INT4,)),
    lambda: Cols((4, 4), (INT4, INT4)),
    lambda: Rows((-1,), (INT4, INT4)),
    lambda: Rows((1,) * 8, (INT4,) * 9),
    lambda: Mask(float("nan"), Dense("f16")),
    lambda: Mask(-1.0, Dense("f16")),
    lambda: Mask(0.12345, Dense("f16")),
    lambda: Mask(1.0, INT4),
    lambda: Rank(0, INT4),
    lambda: Rank(1 << 20, INT4),
    lambda: Hadamard(0, None, INT4),
    lambda: Hadamard(1 << 21, None, INT4),
    lambda: Hadamard(64, -1, INT4),
    lambda: Planes(Dense("bf16")),
    lambda: Planes(parse_weight("ternary/row")),
    lambda: Permute(Permute(Permute(Permute(INT4)))),
    lambda: Permute(Sum((INT4, Scale(SiteFormat(Permute(Mask(1.0, Dense("f16")))))))),
])  # fmt: skip
def test_a_format_that_could_not_be_written_cannot_be_built(build):
    with pytest.raises(FormatError) as caught:
        build()
    assert str(caught.value).isprintable()


def test_shapes_without_elements_are_refused():
    for text in ("f32", "int4/g32", "kmeans4/row", "permute(f32)", "planes(int4/g32)", "f32 + mask(1%: f16)"):
        for shape in ((0, 4), (4, 0)):
            with pytest.raises(FormatError, match="at least one row"):
                parse_weight(text).check(*shape)
