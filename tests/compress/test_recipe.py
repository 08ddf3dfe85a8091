"""Recipes: what is read from a file, and one sentence for everything that is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossamer.compress.recipe import KEYS, Recipe, load, names, of_format, parse_recipe
from gossamer.errors import UsageError

LEAST = 'name: mine\nformats: {"*": int4/g32}\n'


def refused(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_recipe(text, "mine.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert "mine.yaml" in message
    return message


# ---------------------------------------------------------------- what comes with the program


@pytest.mark.parametrize("name", names())
def test_every_recipe_is_sound(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name
    assert recipe.title
    assert recipe.paper
    assert "*" in recipe.formats
    json.dumps(recipe.as_dict())


def test_gptq_says_what_its_file_says() -> None:
    recipe = load("gptq")
    told = recipe.as_dict()
    assert recipe.needs == ("hessian",)
    assert recipe.calibrated
    assert told["solver"]["name"] == "obs"
    assert (told["solver"]["order"], told["solver"]["damping"]) == ("act", 0.01)
    assert told["tables"] == {"name": "nearest", "then": []}
    assert (recipe.calibration.tokens, recipe.calibration.length, recipe.calibration.text) == (32768, 512, "self")


def test_needs_follow_from_the_steps() -> None:
    assert not load("rtn").calibrated
    assert parse_recipe(LEAST + "solver: obs\n", "m").needs == ("hessian",)
    smooth = parse_recipe(LEAST + "transforms: [smooth]\n", "m")
    assert smooth.needs == ("inputs",)
    assert parse_recipe(LEAST + "allocate: {name: salience}\n", "m").needs == ("fisher",)
    assert parse_recipe(LEAST + "solver: lloyd\nthen: [bias]\n", "m").needs == ("inputs", "fisher")


# ---------------------------------------------------------------- files


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(LEAST + "claims: one\nsolver: {name: obs, search: {steps: 5}}\nthen: [{round: {passes: 3}}]\n")
    recipe = load(str(path))
    told = recipe.as_dict()
    assert (recipe.name, recipe.claims) == ("mine", ("one",))
    assert told["solver"]["search"]["steps"] == 5
    assert told["solver"]["then"][0]["round"]["passes"] == 3


def test_what_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'gtpq', which is not known; did you mean 'gptq'\?.* a \.yaml file"):
        load("gtpq")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load(str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load(str(tmp_path / "folder.yaml"))
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(UsageError, match="is not UTF-8"):
        load(str(tmp_path / "latin.yaml"))
    (tmp_path / "large.yaml").write_bytes(b"#" * ((1 << 18) + 1))
    with pytest.raises(UsageError, match="more than 256 kB"):
        load(str(tmp_path / "large.yaml"))


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("", "holds None, which should be the keys of a recipe"),
        ("- a", "should be the keys of a recipe"),
        ("name: [1", r"line 1 is not sound YAML"),
        ("name: x\nname: y", "the key 'name' stands twice"),
        ("name: &a x\ntitle: *a", r"refers to another place"),
        ("1: x", "the key 1 .* is no text"),
        ("name: !!python/object/apply:os.system [ls]", "is not sound YAML: could not determine a constructor"),
        ("[" * 3000, "is not sound YAML"),
    ],
)
def test_yaml_that_is_not_sound(text: str, needle: str) -> None:
    with pytest.raises(UsageError, match=needle):
        parse_recipe(text, "mine.yaml")


# ---------------------------------------------------------------- what is in them


@pytest.mark.parametrize(
    ("more", "needles"),
    [
        ("solvers: obs", ["the key 'solvers'", "did you mean 'solver'?", *KEYS]),
        ("year: soon", ["year is 'soon'", "whole number"]),
        ("claims: [1]", ["claims is [1]"]),
        ("solver: gtpq", ["'gtpq'", "not known"]),
        ("solver: {name: obs, damping: much}", ["damping", "number", "'much'"]),
        ("solver: {name: obs, dampening: 1}", ["dampening", "damping"]),
        ("solver: {name: obs, damping: -1}", ["damping"]),
        ("transforms: [smoth]", ["'smoth'", "did you mean 'smooth'?"]),
        ("transforms: smooth", ["should be a list"]),
        ("transforms: [{name: smooth, alpha: true}]", ["alpha is True", "a number"]),
        ("transforms: [{name: smooth, places: [norm, input]}]", ["places is 'input'", "norm, values, hidden"]),
        ("transforms: [{alpha: 1}]", ["should be a name"]),
        ("allocate: {name: salience, percent: 101}", ["percent 101", "0 to 100"]),
        ("allocate: {name: wide_groups}", ["lacks 'wide'"]),
        ("allocate: budgett", ["'budgett'", "by_role"]),
        ("needs: [hesian]", ["'hesian'", "did you mean 'hessian'?", "hessian, inputs and fisher"]),
        ("solver: obs\nneeds: [inputs]", ["need hessian", "'needs' does not name"]),
        ("calibration: {tokens: 10}", ["10 tokens do not hold one sequence of 512"]),
        ("calibration: {tokens: 1e4}", ["tokens is", "whole number"]),
        ("calibration: {texts: self}", ["'texts'", "did you mean 'text'?"]),
        ("sequential: group by group", ["it can be layer, group, none"]),
        ("tables: obs", ["tables cannot be solved by obs"]),
        ("tables: {name: clip}", ["importance: none"]),
    ],
)
def test_what_is_wrong_is_named(more: str, needles: list[str]) -> None:
    message = refused(LEAST + more)
    for needle in needles:
        assert needle in message, message


@pytest.mark.parametrize(
    ("formats", "needle"),
    [
        ("{}", ""),
        ("{gates: int4/g32}", "the role 'gates', which is not known; did you mean 'gate'?"),
        ('{embed: int8/g32, "*": int4/g32}', "'*' hides what stands before it"),
        ("int4/g32", "should map roles or patterns"),
        ('{"*": 4}', "should map roles or patterns"),
    ],
)
def test_formats_by_role_or_pattern(formats: str, needle: str) -> None:
    text = f"name: mine\nformats: {formats}"
    if not needle:
        assert parse_recipe(text, "m").formats == {}
    else:
        assert needle in refused(text)


def test_a_recipe_needs_a_name_and_formats() -> None:
    assert "lacks 'formats'" in refused("name: mine")
    assert "lacks 'name'" in refused('formats: {"*": int4/g32}')


# ---------------------------------------------------------------- the order of steps


@pytest.mark.parametrize(
    ("more", "needle"),
    [
        ("transforms: [obs]", "names 'obs', which is a step of 'solver'; the order is transforms, allocate, solver"),
        ("solver: smooth", "names 'smooth', which is a step of 'transforms'"),
        ("solver: {name: salience}", "names 'salience', which is a step of 'allocate'"),
        ("then: [obs]", "names 'obs', which is a step of 'solver'"),
        ("allocate: round", "names 'round', which is a step of 'then'"),
        ("transforms: [smooth, rotate]", "rotate after smooth undoes what smooth did; write rotate before it"),
        ("transforms: [sort_channels, smooth]", "smooth after sort_channels undoes"),
        ("transforms: [equalise, smooth, rotate]", "rotate after equalise"),
        ("then: [bias, round]", "an order that cannot be"),
        ("then: [round, round]", "twice"),
    ],
)
def test_an_order_that_cannot_be(more: str, needle: str) -> None:
    assert needle in refused(LEAST + more)


@pytest.mark.parametrize("steps", ["rotate, smooth, sort_channels", "smooth_attention, smooth", "rotate, awq"])
def test_an_order_that_can_be(steps: str) -> None:
    assert len(parse_recipe(LEAST + f"transforms: [{steps}]", "m").transforms) == steps.count(",") + 1


# ---------------------------------------------------------------- one expression for all


def test_a_format_alone_is_plain_rounding_of_every_site() -> None:
    recipe = of_format("int4/g64")
    assert (recipe.name, recipe.formats) == ("rtn", {"*": "int4/g64"})
    assert of_format(None).formats == {}


def test_a_format_takes_the_place_of_the_recipes_general_one() -> None:
    recipe = of_format("int3/g128", load("gptq"))
    assert recipe.formats == {"*": "int3/g128", "embed": "int8/g32", "head": "int8/g32"}
    assert isinstance(recipe, Recipe)
    with pytest.raises(UsageError, match="cannot stand for the formats of the recipe mixllm, which gives several"):
        of_format("int3/g128", load("mixllm"))
