"""Format expressions as text: printing and parsing are inverse, and a typo is named with what would be right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import FormatError
from gossamer.formats import INPUTS, Coded, Dense, SiteFormat, parse, parse_weight
from gossamer.formats.coded import MAX_GROUP
from gossamer.formats.numbers import FLOATS, INTEGERS

floats = st.sampled_from(sorted(FLOATS))
groups = st.none() | st.integers(1, MAX_GROUP // 8).map(lambda n: 8 * n) | st.sampled_from([8, 32, 128])


@st.composite
def coded(draw):
    number = INTEGERS[draw(st.sampled_from(sorted(INTEGERS)))]
    minimum = None if number.signed else draw(st.none() | floats)
    return Coded(number, draw(groups), draw(floats), minimum)


@st.composite
def sites(draw):
    weight = draw(floats.map(Dense) | coded())
    return SiteFormat(weight, draw(st.sampled_from([i for i in INPUTS if weight.integer or i != "int8/token"])))


@given(sites(), st.lists(st.sampled_from(["", "", " ", "\t", "\n ", " "]), min_size=40, max_size=40))
def test_what_is_printed_reads_back(site, spaces):
    text = str(site)
    assert parse(text) == site
    assert str(parse(text)) == text
    assert parse("".join(s + c for s, c in zip(spaces * (len(text) // 40 + 1), text))) == site
    assert parse_weight(str(site.weight)) == site.weight


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("int4/g32*f16 @ bf16", "int4/g32"),
        ("int8/row*f32", "int8/row"),
        ("int8/row*f16", "int8/row*f16"),
        ("uint4/g128-z(uint4)", "uint4/g128"),
        ("uint4/g32*f16-m(f16)", "uint4/g32-m(f16)"),
        (" uint5 / g64 * f32 - m( bf16 )@int8 / token", "uint5/g64*f32-m(bf16) @ int8/token"),
        ("bf16@bf16", "bf16"),
        ("f16@f32", "f16 @ f32"),
        ("int4/g032", "int4/g32"),
    ],
)
def test_printing_is_the_shortest_form(text, printed):
    assert str(parse(text)) == printed


def test_defaults():
    assert parse("int4/g32") == SiteFormat(Coded(INTEGERS["int4"], 32, "f16"), "bf16")
    assert parse_weight("int8/row") == Coded(INTEGERS["int8"], None, "f32")
    assert parse_weight("uint4/row-m(f16)") == Coded(INTEGERS["uint4"], None, "f32", "f16")


TYPOS = [
    # text, what the message names, what it offers
    ("int5/q32", "'q32'", "did you mean 'g32'"),
    ("int4/G64", "'G64'", "did you mean 'g64'"),
    ("int4/128", "'128'", "did you mean 'g128'"),
    ("int4/g7", "'g7'", "did you mean 'g8'"),
    ("int4/g0", "'g0'", "did you mean 'g8'"),
    ("int4/g33", "'g33'", "did you mean 'g40'"),
    (f"int4/g{MAX_GROUP + 8}", f"'g{MAX_GROUP + 8}'", f"did you mean 'g{MAX_GROUP}'"),
    ("int4/g99999999999999999999", "'g99999999999999999999'", "g32"),
    ("int8/token", "'token'", "'row'"),
    ("int4", "'int4' needs a group", "int4/g32"),
    ("int4/", "'int4' needs a group", "int4/g32"),
    ("int9/g32", "'int9'", "did you mean 'int8'"),
    ("INT4/g32", "'INT4'", "did you mean 'int4'"),
    ("fp16", "'fp16'", "did you mean 'f16'"),
    ("/g32", "''", "int4"),
    ("bf16/g32", "'/g32'", "write 'bf16'"),
    ("int4/g32*f8", "'f8'", "f32, f16, bf16"),
    ("int4/g32*bf61", "'bf61'", "did you mean 'bf16'"),
    ("int4/g32*", "'g32*'", "g128*bf16"),
    ("int4/g64*(int8/g256)", "'g64*(int8/g256)'", "GROUP[*SCALE]"),
    ("int4/g32-m(f16)", "'-m(f16)'", "uint4"),
    ("int4/g32-z(int4)", "'-z(int4)'", "uint4"),
    ("uint4/g32-m(int8)", "'-m(int8)'", "f32, f16, bf16"),
    ("uint4/g32-m()", "'-m()'", "f32, f16, bf16"),
    ("uint4/g32-z(uint8)", "'-z(uint8)'", "-z(uint4)"),
    ("uint4/g32-q(f16)", "'g32-q(f16)'", "-m(SCALE)"),
    ("uint4/g32-m(f16)-m(f16)", "'g32-m(f16)-m(f16)'", "GROUP"),
    ("f16 @ int8/token", "'f16 @ int8/token'", "int8/g32"),
    ("int4/g32 @ int8", "'int8'", "did you mean 'int8/token'"),
    ("int4/g32 @ bf17", "'bf17'", "did you mean 'bf16'"),
    ("int4/g32 @", "after the '@'", "int8/token"),
    ("int4/g32 @ bf16 @ f32", "'bf16@f32'", "bf16"),
    ("@ bf16", "before the '@'", "int4/g32"),
    ("@", "before the '@'", "int4/g32"),
    ("", "empty", "int4/g32"),
    (" \t\n", "empty", "int4/g32"),
    ("int4/g٣٢", "'g٣٢'", "g32"),  # Arabic digits
    ("ínt4/g32", "'ínt4'", "did you mean 'int4'"),
    ("int4/g32\x1b[31m", "'g32\\u001b[31m'", "g32"),
    ("((((int4/g32))))", "'((((int4'", "int4"),
    ("int4/g32;drop", "'g32;drop'", "g32"),
]


def message(text):
    with pytest.raises(FormatError) as caught:
        parse(text)
    return str(caught.value)


@pytest.mark.parametrize(("text", "names", "offers"), TYPOS)
def test_a_typo_is_named_with_what_would_be_right(text, names, offers):
    said = message(text)
    assert names in said
    assert offers in said
    assert said.isprintable()  # one line, and nothing that a terminal would obey
    assert said.endswith((".", "?"))


LONG = ("{}", "int4/{}", "int4/g32*{}", "int4/g32 @ {}", "uint4/g32-z({})", "uint4/g32-m({})", "{} @ bf16")


@pytest.mark.parametrize("template", LONG)
@pytest.mark.parametrize("character", ["x", "4", "(", "\x00", "é"])
def test_long_text_gives_a_short_message(template, character):
    assert len(message(template.format(character * 10_000))) < 700


@given(st.text(max_size=60) | st.text("intu458f16bg32/row*-zm() @", max_size=30))
def test_any_text_parses_or_is_refused_in_one_line(text):
    try:
        site = parse(text)
    except FormatError:
        assert message(text).isprintable()
        return
    assert parse(str(site)) == site


@pytest.mark.parametrize("build", [
    lambda: Dense("int4"),
    lambda: Coded(INTEGERS["int4"], 12, "f16"),
    lambda: Coded(INTEGERS["int4"], 0, "f16"),
    lambda: Coded(INTEGERS["int4"], MAX_GROUP + 8, "f16"),
    lambda: Coded(INTEGERS["int4"], 32, "int8"),
    lambda: Coded(INTEGERS["int4"], 32, "f16", "f16"),
    lambda: Coded(INTEGERS["uint4"], 32, "f16", "int8"),
    lambda: SiteFormat(Dense("f32"), "int8/token"),
    lambda: SiteFormat(Dense("f32"), "int4/token"),
])  # fmt: skip
def test_a_format_that_could_not_be_written_cannot_be_built(build):
    with pytest.raises(FormatError):
        build()


def test_shapes_without_elements_are_refused():
    for text in ("f32", "int4/g32"):
        for shape in ((0, 4), (4, 0)):
            with pytest.raises(FormatError, match="at least one row"):
                parse_weight(text).check(*shape)
