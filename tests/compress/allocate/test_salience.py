"""Rows of a whole model ranked by what they would cost in fewer bits."""

from __future__ import annotations

import numpy as np
import pytest
from made_sites import block, site

from gossamer.compress.allocate import Level, row_salience, salience
from gossamer.errors import UsageError
from gossamer.formats import bits_per_weight, encode_with, parse

WIDE, NARROW = parse("int8/g128 @ int8/g128"), "uint4/g128 @ int8/g128"
SITES = block(0) + block(1)


def scores(seed=0, sites=SITES):
    random = np.random.default_rng(seed)
    return {s.name: random.exponential(float(i + 1) ** 2, s.rows) for i, s in enumerate(sites)}


def rows_of(found, name):
    return found.hints.get(name, {"rows": [np.array([], int)]})["rows"][0]


def test_the_best_rows_of_the_model_are_wide():
    given = scores()
    found = salience(SITES, [Level(WIDE, 10, given)], NARROW)
    total = sum(s.rows for s in SITES)
    best = sorted(((v, n, r) for n, x in given.items() for r, v in enumerate(x)), reverse=True)[: round(total / 10)]
    taken = {(n, int(r)) for n in given for r in rows_of(found, n)}
    assert taken == {(n, r) for _, n, r in best}
    for s in SITES:
        count = len(rows_of(found, s.name))
        plain = NARROW if not count else f"rows({count}: int8/g128, uint4/g128) @ int8/g128"
        assert str(found.formats[s.name]) == plain
        assert (s.name in found.hints) == (0 < count < s.rows)
        assert (np.diff(rows_of(found, s.name)) > 0).all()
    assert len({len(rows_of(found, s.name)) / s.rows for s in SITES}) > 5  # very uneven, as the scores are


def test_hints_put_those_rows_where_they_belong():
    a = site(rows=48, cols=128)
    given = {"a": np.arange(48.0)}
    found = salience([a], [Level(WIDE, 25, given)], NARROW)
    w = np.random.default_rng(0).standard_normal((48, 128)).astype(np.float32)
    packed = encode_with(found.formats["a"].weight, w, found.hints["a"])
    error = ((packed.decode() - w) ** 2).mean(axis=1)
    assert error[36:].max() < 0.1 * error[:36].min()


def test_all_rows_or_none_give_plain_formats():
    a, b = site("a"), site("b")
    given = {"a": np.ones(64), "b": np.full(64, 2.0)}
    found = salience([a, b], [Level(WIDE, 50, given)], NARROW)
    assert [str(f) for f in found.formats.values()] == [NARROW, str(WIDE)]
    assert found.hints == {}
    assert {str(f) for f in salience([a, b], [Level(WIDE, 100, given)], NARROW).formats.values()} == {str(WIDE)}
    assert {str(f) for f in salience([a, b], [Level(WIDE, 0, given)], NARROW).formats.values()} == {NARROW}


def test_equal_rows_are_taken_in_order():
    a, b = site("a"), site("b")
    same = {"a": np.ones(64), "b": np.ones(64)}
    found = salience([a, b], [Level(WIDE, 25, same)], NARROW)
    assert list(rows_of(found, "a")) == list(range(32))
    assert "b" not in found.hints


def test_levels_take_what_earlier_ones_left():
    a = site(rows=40)
    first = {"a": np.r_[np.full(4, 9.0), np.zeros(36)]}
    second = {"a": np.r_[np.full(4, 9.0), np.zeros(28), np.full(8, 5.0)]}
    found = salience([a], [Level(WIDE, 10, first), Level(parse("int5/g128 @ int8/g128"), 20, second)], NARROW)
    assert str(found.formats["a"]) == "rows(4: int8/g128, 8: int5/g128, uint4/g128) @ int8/g128"
    assert [list(r) for r in found.hints["a"]["rows"]] == [[0, 1, 2, 3], list(range(32, 40))]
    whole = salience([a], [Level(WIDE, 10, first), Level(parse("int5/g128 @ int8/g128"), 90, second)], NARROW)
    assert str(whole.formats["a"]) == "rows(4: int8/g128, int5/g128) @ int8/g128"
    assert [list(r) for r in whole.hints["a"]["rows"]] == [[0, 1, 2, 3]]


def test_whole_panels_waste_no_bytes():
    given = scores(3)
    found = salience(SITES, [Level(WIDE, 20, given)], NARROW, multiple=16)
    counts = [len(rows_of(found, s.name)) for s in SITES if s.name in found.hints]
    assert len(counts) > 3
    assert all(n % 16 == 0 for n in counts)
    total = sum(s.rows for s in SITES)
    wide = sum(len(rows_of(found, s.name)) for s in SITES)
    wide += sum(s.rows for s in SITES if found.formats[s.name] == WIDE)
    assert total * 0.2 - 16 < wide <= round(total * 0.2)
    for s in SITES:
        # Each site gives its own best rows.
        rows = rows_of(found, s.name)
        assert set(rows) == set(np.argsort(-given[s.name], kind="stable")[: len(rows)].tolist())
        if s.name in found.hints:
            wide_bits, narrow_bits = (bits_per_weight(f.weight, s.rows, s.cols) for f in (WIDE, parse(NARROW)))
            share = len(rows) / s.rows
            bits = bits_per_weight(found.formats[s.name].weight, s.rows, s.cols)
            assert bits <= share * wide_bits + (1 - share) * narrow_bits + 8 * 64 * 3 / (s.rows * s.cols) + 0.5


def test_salience_of_a_row_is_that_of_its_gradient():
    random = np.random.default_rng(1)
    x, dy, delta = (random.standard_normal(s).astype(np.float32) for s in ((10, 24), (10, 6), (6, 24)))
    gradient = dy.astype(np.float64).T @ x
    change = (gradient * delta).sum(axis=1)
    assert row_salience(delta, x, dy) == pytest.approx(np.abs(change + change**2 / 2), rel=1e-4)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "0 levels of salience"),
        ([Level(WIDE, 60, {}), Level(WIDE, 60, {})], "all at most 100"),
        ([Level(WIDE, -1, {})], "each is 0 or more"),
        ([Level(WIDE, 10, {})], "a has 64 rows, but 0 saliences"),
        ([Level(WIDE, 10, {"a": np.ones(63)})], "a has 64 rows, but 63 saliences"),
        ([Level(WIDE, 10, {"a": np.r_[np.ones(63), np.nan]})], "the salience of row 63 of a is not a number"),
        ([Level(parse("int8/g128"), 10, {"a": np.ones(64)})], "the same input format"),
    ],
)
def test_bad_input_is_one_sentence(levels, message):
    with pytest.raises(UsageError) as caught:
        salience([site()], levels, NARROW)
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")


def test_inputs_of_another_matrix_are_refused():
    with pytest.raises(UsageError, match="do not belong to a matrix of shape"):
        row_salience(np.ones((4, 8), np.float32), np.ones((3, 8), np.float32), np.ones((3, 5), np.float32))
