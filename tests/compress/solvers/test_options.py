"""Solvers as recipes write them."""

from __future__ import annotations

from typing import Any

import pytest

from gossamer.compress.solvers import Obs, Search
from gossamer.compress.solvers.options import (
    SOLVERS,
    Bias,
    Clip,
    Dual,
    Lloyd,
    LowRank,
    Nearest,
    Nested,
    Outliers,
    Progressive,
    Round,
    Solver,
)
from gossamer.errors import UsageError


def test_nothing_said_is_round_to_nearest() -> None:
    assert Solver.parse() == Solver.parse("nearest") == Solver() == Solver(Nearest())
    assert Solver.parse().name == "nearest"
    assert not Solver.parse().needs


def test_options_and_steps() -> None:
    how = Solver.parse(
        {"name": "obs", "order": "act", "damping": 0.05, "search": {"steps": 10, "norm": 2.4}, "outliers": "loop"},
        ["round", {"lowrank": {"scaling": "whiten"}}, "bias"],
    )
    assert how.options == Obs(order="act", damping=0.05, search=Search(steps=10, norm=2.4))
    assert how.outliers == Outliers("loop")
    assert how.then == (Round(), LowRank("whiten"), Bias())
    assert how.needs == {"hessian", "inputs"}
    assert Solver.parse("clip", "round").then == (Round(),)
    assert Solver.parse({"name": "progressive", "obs": {}}).options == Progressive(obs=Obs())
    assert Solver.parse({"name": "nested", "search": None}).options == Nested(search=None)
    assert Solver.parse("lloyd", {"lowrank": None}).then == (LowRank(),)


def test_solvers_are_values() -> None:
    a, b = (Solver.parse({"name": "clip", "steps": 12}, ["round"]) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert {Solver.parse(name).name for name in SOLVERS} == set(SOLVERS)


@pytest.mark.parametrize(
    ("solver", "then", "needs"),
    [
        ("hqq", None, set()),
        ("clip", None, {"inputs"}),
        ({"name": "clip", "importance": "block"}, None, {"hessian"}),
        ({"name": "clip", "importance": "none"}, None, set()),
        ("obs", None, {"hessian"}),
        ("lloyd", None, {"fisher"}),
        ({"name": "lloyd", "importance": "input", "outliers": "fisher"}, None, {"fisher", "inputs"}),
        ("nested", None, {"hessian"}),
        ("dual", None, {"inputs"}),
        ({"name": "progressive", "importance": "none", "obs": {"damping": 0.1}}, None, {"hessian"}),
        ("nearest", {"lowrank": {"scaling": "rms"}}, {"inputs"}),
        ("nearest", "round", {"hessian"}),
    ],
)
def test_what_calibration_must_give(solver: Any, then: Any, needs: set[str]) -> None:
    assert Solver.parse(solver, then).needs == needs


@pytest.mark.parametrize(
    ("solver", "then", "says"),
    [
        ("obz", None, r"solver 'obz' of the recipe is not known; did you mean 'obs'\?"),
        ("gptq-pro-max", None, "there are nearest, clip, hqq, obs, lloyd, progressive, dual, nested"),
        (
            {"name": "clip", "speed": 3},
            None,
            "solver 'clip' of the recipe has no option 'speed'; its options: by, steps",
        ),
        ({"name": "nearest", "steps": 3}, None, "its options: none"),
        ({"name": "clip", "steps": "many"}, None, "option 'steps', of the recipe must be a whole number, not 'many'"),
        ({"name": "clip", "steps": 2.5}, None, "a whole number"),
        ({"name": "clip", "steps": True}, None, "a whole number"),
        ({"name": "clip", "steps": 0}, None, "1 to 1000 ranges"),
        ({"name": "clip", "importance": "vibes"}, None, "is 'vibes'; write input, block, fisher, none"),
        ({"name": "obs", "damping": -1}, None, "damping -1"),
        ({"name": "obs", "damping": float("nan")}, None, "damping nan"),
        ({"name": "obs", "search": {"step": 1}}, None, "has no option 'step'"),
        ({"name": "obs", "search": 5}, None, "must be a mapping"),
        ({"name": "obs", "outliers": {"rule": "luck"}}, None, "is 'luck'; write fisher, loop, error"),
        ({"name": "clip", "outliers": "loop"}, None, "go with the solver 'obs' alone"),
        ({"name": "dual", "tokens": 0}, None, "option 'tokens' must be 1 to"),
        ({"name": "progressive", "lowest": 2}, None, "option 'lowest' must be 0.05 to 1"),
        (17, None, "must be a mapping of options to values, not 17"),
        (None, "polish", "step 'polish' of the recipe is not known; there are round, lowrank, bias"),
        (None, 3, "must be a list of steps"),
        (None, [{"round": {}, "bias": {}}], "a name or one name with its options"),
        (None, ["bias", "round"], "write them as round, lowrank, bias"),
        (None, ["round", "round"], "names a step twice"),
        (None, [{"lowrank": {"scaling": "white"}}], "write plain, rms, whiten"),
        ("lloyd", "round", "cannot follow 'lloyd'"),
        ("nested", "round", "cannot follow 'nested'"),
    ],
)
def test_mistakes_are_one_sentence(solver: Any, then: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        Solver.parse(solver, then)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(("?", "."))


def test_classes_are_what_they_say() -> None:
    assert isinstance(Clip(), Search)
    assert Dual().tokens == 128
    assert Lloyd().importance == "fisher"
