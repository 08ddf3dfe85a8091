"""``gossamer methods``."""

from __future__ import annotations

from program import gossamer, refused

from gossamer.compress.methods import methods


def test_all_are_listed_with_claim_mechanism_and_cost() -> None:
    done = gossamer("methods")
    assert (done.code, done.err) == (0, "")
    for m in methods():
        assert f"\n{m.name}: {m.title}" in "\n" + done.out
    for label in ("paper", "claim", "mechanism", "cost"):
        assert done.out.count(f"\n  {label} ") >= len(methods())
    assert max(map(len, done.out.splitlines())) <= 110


def test_one_is_shown_in_full() -> None:
    done = gossamer("methods", "zeroquant-fp-lorc")
    assert (done.code, done.err) == (0, "")
    text = " ".join(done.out.split())
    for words in ("arXiv:2307.09782", "steps obs, lowrank", "format *: e2m1/g256*(e3m0/row) + rank8", "measured"):
        assert words in text
    assert "second moments of every input over 65,536 tokens" in text


def test_as_json() -> None:
    assert {m["name"] for m in gossamer("methods", "--json").json} == {m.name for m in methods()}
    one = gossamer("methods", "gptq", "--json").json
    assert one["formats"]["*"] == "int4/g128"
    assert one["needs"] == ["hessian"]


def test_an_unknown_name_is_one_sentence() -> None:
    assert "did you mean 'squeezellm'?" in refused("methods", "squeezelm")
