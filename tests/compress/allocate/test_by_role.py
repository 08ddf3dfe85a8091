"""Formats by role and name, and shares that become counts."""

from __future__ import annotations

import pytest
from made_sites import block, site

from gossamer.compress.allocate import by_role, settle, uniform
from gossamer.errors import FormatError, UsageError
from gossamer.formats import parse

SITES = [site("model.embed_tokens", "embed", 96, 64, None), *block(0), *block(1)]


def test_uniform_gives_every_site_the_format():
    found = uniform(SITES, "int4/g32 @ int8/token")
    assert list(found) == [s.name for s in SITES]
    assert {str(f) for f in found.values()} == {"int4/g32 @ int8/token"}


def test_later_rules_win_by_role_and_by_pattern():
    found = by_role(
        SITES,
        {"*": "int4/g32", "embed": parse("int8/g32"), "down": "int6/g32", "*.1.mlp.*": "int5/g32", "head": "bf16"},
    )
    assert str(found["model.embed_tokens"]) == "int8/g32"
    assert str(found["model.layers.0.mlp.down_proj"]) == "int6/g32"
    assert str(found["model.layers.1.mlp.down_proj"]) == "int5/g32"
    assert str(found["model.layers.1.self_attn.q_proj"]) == "int4/g32"
    assert len(found) == len(SITES)


def test_a_role_that_is_none_is_named_with_those_that_are():
    with pytest.raises(
        UsageError, match=r"^'gat' is no role .* its roles are embed, q, k, v, o, gate, up, down, .*\.$"
    ):
        by_role(SITES, {"*": "int4/g32", "gat": "int8/g32"})


def test_a_site_without_a_rule_is_named():
    with pytest.raises(
        UsageError, match=r"no format is given for model\.embed_tokens \(role embed\) and 2 other sites"
    ):
        by_role(SITES, {"q": "int4/g32", "*.k_proj": "bf16", "v": "bf16", "o": "bf16", "*.mlp.[gu]*": "bf16"})


@pytest.mark.parametrize(
    ("text", "rows", "cols", "wanted"),
    [
        (
            "cols(6.25%: bf16 @ bf16, int4/row @ uint4/token)",
            64,
            4096,
            "cols(256: bf16 @ bf16, int4/row @ uint4/token)",
        ),
        ("cols(6.25%: bf16, int4/row)", 64, 576, "cols(32: bf16, int4/row)"),
        ("cols( 1 % : bf16, int4/row)", 64, 128, "cols(16: bf16, int4/row)"),
        ("rows(10%: int8/g128, int4/g128)", 1000, 64, "rows(96: int8/g128, int4/g128)"),
        ("rows(10%: int8/g64, 20 %: int5/g64, int4/g64)", 1600, 64, "rows(160: int8/g64, 320: int5/g64, int4/g64)"),
        ("cols(25%: int4/g16, int2/g16 + mask(0.4%: f16))", 64, 64, "cols(16: int4/g16, int2/g16 + mask(0.4%: f16))"),
        ("rows(50%: cols(25%: bf16, int4/row), int4/row)", 64, 128, "rows(32: cols(32: bf16, int4/row), int4/row)"),
        ("int4/g16 + mask(0.5%: f16)", 64, 64, "int4/g16 + mask(0.5%: f16)"),
        ("hadamard(64, none, cols(25%: bf16, int4/row))", 64, 64, "hadamard(64, none, cols(16: bf16, int4/row))"),
    ],
)
def test_shares_become_counts_of_whole_blocks(text, rows, cols, wanted):
    assert str(settle(text, site(rows=rows, cols=cols))) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cols(100%: bf16, int4/row)", "more than 0 and less than 100 percent"),
        ("cols(0%: bf16, int4/row)", "more than 0 and less than 100 percent"),
        ("rows(50%: bf16, int4/row)", "leaves none of the 16 of a"),
        ("hadamard(96, none, int4/row)", "a (16 x 64) cannot be stored as hadamard(96, none, int4/row): "),
        ("int4/g33", "not a group"),
    ],
)
def test_what_cannot_be_is_one_sentence(text, message):
    with pytest.raises(FormatError) as caught:
        settle(text, site(rows=16, cols=64))
    assert message in str(caught.value)
    assert str(caught.value).count("\n") == 0
