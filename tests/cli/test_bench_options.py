"""Lists on the command line of ``bench``."""

from __future__ import annotations

import pytest

from gossamer.cli import bench_verb
from gossamer.cli.bench_verb import batch_sizes, split_formats
from gossamer.errors import FormatError, UsageError


def test_formats_are_parted_outside_of_parentheses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_formats("int4/g32") == ["int4/g32"]
    assert split_formats("int4/g32@int8/token ; uint4/g32-m(f16), bf16") == [
        "int4/g32 @ int8/token",
        "uint4/g32-m(f16)",
        "bf16",
    ]
    monkeypatch.setattr(bench_verb, "parse", lambda text: text.strip())
    text = "cols(8: bf16 @ bf16, int4/row) @ uint4/token, hadamard(64, none, int4/row);mask(1%: f16) + int3/g16"
    assert split_formats(text) == [
        "cols(8: bf16 @ bf16, int4/row) @ uint4/token",
        "hadamard(64, none, int4/row)",
        "mask(1%: f16) + int3/g16",
    ]
    assert split_formats("a(b(c,d),e),f") == ["a(b(c,d),e)", "f"]


@pytest.mark.parametrize("text", ["", ",", "int4/g32,", "int4/g32;;bf16", "int4/g32)", "uint4/g32-m(f16,bf16"])
def test_lists_with_something_that_is_no_format(text: str) -> None:
    with pytest.raises(FormatError):
        split_formats(text)


def test_batch_sizes() -> None:
    assert batch_sizes("1") == [1]
    assert batch_sizes("16, 1,4") == [16, 1, 4]


@pytest.mark.parametrize("text", ["", "1,", "0", "-1", "1.5", "65", "9" * 5000, "²", "one", "1 2"])
def test_lists_that_hold_no_batch_sizes(text: str) -> None:
    with pytest.raises(UsageError, match=r"must list whole numbers from 1 to 64, for example 1,4,8,16\."):
        batch_sizes(text)


def test_a_size_named_twice() -> None:
    with pytest.raises(UsageError, match="twice"):
        batch_sizes("1,4,01")
