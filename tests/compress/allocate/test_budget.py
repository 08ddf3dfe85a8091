"""The integer programme: against every choice there is, at its limits, and beyond them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from gossamer.compress.allocate import Candidate, budget
from gossamer.errors import UsageError
from gossamer.formats import parse

FORMATS = [parse(f"int{b}/g32") for b in (8, 6, 5, 4, 3, 2)]


def problem(sites, seed=0, seconds=True):
    """Losses that fall with bytes in a way of each site's own; times that do not follow bytes alone."""
    random = np.random.default_rng(seed)
    found = {}
    for i in range(sites):
        size, sense = int(random.integers(100, 4000)) * 64, float(np.exp(random.normal(0, 2)))
        found[f"s{i}"] = [
            Candidate(
                f,
                size * b // 8,
                size * (b + random.uniform(0, 2)) * 1e-12 if seconds else None,
                sense * 4.0**-b * random.uniform(0.5, 2),
            )
            for f, b in zip(FORMATS, (8, 6, 5, 4, 3, 2))
        ]
    return found


def every(candidates):
    """(bytes, seconds, loss, formats) of every choice."""
    for choice in itertools.product(*candidates.values()):
        yield (
            sum(c.nbytes for c in choice),
            math.fsum(c.seconds for c in choice),
            math.fsum(c.loss for c in choice),
            [c.format for c in choice],
        )


def middle(candidates, what, share=0.5):
    values = [[getattr(c, what) for c in options] for options in candidates.values()]
    low, high = math.fsum(map(min, values)), math.fsum(map(max, values))
    return low + share * (high - low)


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_within_the_limits_is_better(seed):
    candidates = problem(5, seed)
    most, longest = int(middle(candidates, "nbytes")), middle(candidates, "seconds", 0.4)
    allowed = [c for c in every(candidates) if c[0] <= most and c[1] <= longest]
    best = min(allowed, key=lambda c: c[2])
    found = budget(candidates, max_bytes=most, max_seconds=longest)
    assert found.loss == pytest.approx(best[2], rel=1e-6)
    assert list(found.formats.values()) == best[3]
    assert (found.nbytes, found.seconds) == (best[0], pytest.approx(best[1]))
    assert found.optimal
    assert found.gap <= 1e-6


def test_bytes_can_be_least_under_a_loss():
    candidates = problem(5, 7)
    worst = middle(candidates, "loss", 0.1)
    best = min((c for c in every(candidates) if c[2] <= worst), key=lambda c: c[0])
    assert budget(candidates, max_loss=worst, minimise="nbytes").nbytes == best[0]


def test_a_limit_that_is_just_met_is_met():
    candidates = problem(40, 3, seconds=False)
    least = sum(min(c.nbytes for c in options) for options in candidates.values())
    found = budget(candidates, max_bytes=least)
    assert found.nbytes == least
    assert {str(f) for f in found.formats.values()} == {"int2/g32"}
    assert found.seconds is None
    for most in (least + 1, least + 64, int(least * 1.5)):
        assert budget(candidates, max_bytes=most).nbytes <= most


def test_a_model_of_two_hundred_sites_is_solved_and_the_same_again():
    candidates = problem(211, 1)
    limits = {"max_bytes": int(middle(candidates, "nbytes", 0.4)), "max_seconds": middle(candidates, "seconds", 0.4)}
    found = budget(candidates, **limits)
    assert found.optimal
    assert found.nbytes <= limits["max_bytes"]
    assert found.seconds <= limits["max_seconds"]
    # No exchange of one site's format for another within the limits improves it.
    for name, options in candidates.items():
        mine = next(c for c in options if c.format == found.formats[name])
        for other in options:
            fits = found.nbytes - mine.nbytes + other.nbytes <= limits["max_bytes"]
            fits &= found.seconds - mine.seconds + other.seconds <= limits["max_seconds"]
            assert not fits or other.loss >= mine.loss - 1e-6 * found.loss
    assert budget(candidates, **limits) == found


def test_equal_candidates_give_the_first():
    twice = [Candidate(FORMATS[0], 100, None, 1.0), Candidate(FORMATS[1], 100, None, 1.0)]
    assert budget({"a": twice}, max_bytes=100).formats["a"] == FORMATS[0]


def test_a_size_that_cannot_be_met_names_the_smallest():
    candidates = problem(3)
    least = sum(min(c.nbytes for c in options) for options in candidates.values())
    with pytest.raises(UsageError, match=f"the smallest that these formats allow is {least:,} bytes; allow that"):
        budget(candidates, max_bytes=least - 1)


def test_limits_that_exclude_each_other_name_what_one_would_have_to_be():
    small = Candidate(FORMATS[0], 100, 2e-3, 1.0)
    fast = Candidate(FORMATS[1], 200, 1e-3, 1.0)
    with pytest.raises(UsageError, match=r"100 bytes beside 0\.001 seconds a token cannot .* allow is 200 bytes;"):
        budget({"a": [small, fast]}, max_bytes=100, max_seconds=1e-3)
    wrong = Candidate(FORMATS[2], 100, 1e-3, 9.0)
    with pytest.raises(UsageError, match=r"100 bytes beside .* and|beside a predicted loss of 1 cannot"):
        budget({"a": [small, fast, wrong]}, max_bytes=100, max_seconds=1e-3, max_loss=1.0)


@pytest.mark.parametrize(
    ("candidates", "limits", "message"),
    [
        ({}, {}, "no site to choose"),
        ({"a": []}, {}, "a has no format to choose from"),
        ({"a": [Candidate(FORMATS[0], 1, None, 1.0)]}, {"max_seconds": 1.0}, "was not timed for a"),
        ({"a": [Candidate(FORMATS[0], 1, None, math.nan)]}, {}, "a size, time or loss that is no number"),
        ({"a": [Candidate(FORMATS[0], 1, None, 1.0)]}, {"max_bytes": 0}, "a limit of 0 bytes cannot be"),
        ({"a": [Candidate(FORMATS[0], 1, None, 1.0)]}, {"max_loss": math.inf}, "cannot be; give a positive"),
        ({"a": [Candidate(FORMATS[0], 1, None, 1.0)]}, {"minimise": "error"}, "'error' cannot be minimised"),
    ],
)
def test_bad_input_is_one_sentence(candidates, limits, message):
    with pytest.raises(UsageError) as caught:
        budget(candidates, **limits)
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")
