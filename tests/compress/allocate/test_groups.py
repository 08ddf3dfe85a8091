"""Group sizes of matrices, and wide groups of columns."""

from __future__ import annotations

import numpy as np
import pytest
from made_sites import block, site

from gossamer.compress.allocate import aligned, finequant, group_scores, group_size, output_error, wide_groups
from gossamer.errors import UsageError
from gossamer.formats import bits_per_weight, encode_with, parse, project

WIDE, NARROW = "uint4/g16*(uint4/g16-m(f16))", "uint2/g16*(uint4/g16-m(f16))"


def weights(rows=64, cols=1024, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def bumpy(cols, every=256):
    """Magnitudes of 0.1 but for one column in ``every`` of 1: larger groups are all alike, smaller ones gain."""
    w = np.full((16, cols), 0.1, np.float32)
    w[:, ::every] = 1
    return w


# ------------------------------------------------------------ group sizes


def ranges(w, width):
    return np.abs(w).reshape(len(w), -1, width).max(axis=2).mean()


def test_a_matrix_without_outliers_keeps_whole_rows():
    assert group_size(weights()) is None
    assert group_size(np.ones((16, 512), np.float32)) is None
    assert group_size(np.zeros((16, 512), np.float32)) is None


def test_each_step_is_worth_it():
    w = np.concatenate([weights(32, 512) * 8, weights(32, 512, 1)], axis=1)
    assert ranges(w, 512) < 0.9 * ranges(w, 1024)
    assert ranges(w, 256) > 0.9 * ranges(w, 512)
    assert ranges(w, 128) > 0.9 * ranges(w, 256)
    assert group_size(w) == 512
    assert group_size(w, alpha=0.5) is None
    assert group_size(w, alpha=0.99) == 64


def test_one_step_without_gain_is_passed_over():
    assert ranges(bumpy(512), 256) == ranges(bumpy(512), 512) > 2 / 3 * ranges(bumpy(512), 128)
    assert group_size(bumpy(512)) == 64
    assert group_size(bumpy(512), least=128) == 128
    assert group_size(bumpy(512), least=256) is None
    assert group_size(bumpy(1024)) is None  # 512 and 256 gain nothing, and two such steps end it


def test_an_outlier_forces_small_groups():
    w = weights(400, 2048)
    assert group_size(w) is None
    w[5, 7] = 60  # of one row: the mean over all hardly moves
    assert np.abs(w[5]).max() / np.sqrt((w[5] ** 2).mean()) > 30
    assert group_size(w) == 128
    assert group_size(w, least=256) is None  # no size that small is left to choose


def test_an_outlying_column_makes_rows_useless_and_groups_good():
    w = weights(64, 1024)
    w[:, 7] *= 100
    size = group_size(w)
    assert size <= 128

    def worst(fmt):
        """The largest relative squared error of what is not the outlier, over rows."""
        error = (project(parse(fmt).weight, w) - w)[:, 8:] ** 2
        return float((error.sum(axis=1) / (w[:, 8:] ** 2).sum(axis=1)).max())

    assert worst("int4/row") > 0.5
    assert worst(f"int4/g{size}") < 0.1


def test_sizes_divide_the_columns():
    assert group_size(weights(16, 576), alpha=0.99) == 64
    assert group_size(weights(16, 100), alpha=0.99) is None
    assert group_size(weights(16, 1536), alpha=0.99) == 64
    assert group_size(weights(16, 1536), alpha=0.99, least=16) == 16


def test_sizes_are_chosen_matrix_by_matrix():
    sites = block(0, 256, 512)
    made = {s.name: weights(s.rows, s.cols, i) for i, s in enumerate(sites)}
    down = sites[-1]
    made[down.name][:, :256] *= 8
    found = finequant(sites, lambda s: made[s.name])
    assert {str(f) for n, f in found.items() if n != down.name} == {"int4/row"}
    assert str(found[down.name]) == "int4/g256"
    assert finequant(sites, lambda s: made[s.name]) == found
    assert str(finequant([down], lambda s: made[s.name], number="int8", input="int8/token")[down.name]) == (
        "int8/g256 @ int8/token"
    )


def test_alpha_out_of_range_is_refused():
    with pytest.raises(UsageError, match="alpha 1 is out of range"):
        group_size(weights(), alpha=1)


# ------------------------------------------------------------ wide groups


def test_every_block_gives_its_best():
    scores = np.array([1, 4, 2, 3, 9, 9, 9, 9, 5, 6.0])
    assert list(aligned(scores, 4, 1)) == [1, 4]  # of equal ones the first; the short block's share is half a group: 0
    assert list(aligned(scores, 4, 2)) == [1, 3, 4, 5, 9]
    assert list(aligned(scores, 4, 0)) == []
    assert list(aligned(scores, 4, 4)) == list(range(10))
    with pytest.raises(UsageError, match="5 wide groups in a block of 4"):
        aligned(scores, 4, 5)


def test_groups_that_matter_are_wide():
    a = site(rows=32, cols=256)
    w, inverse = weights(32, 256), np.ones(256, np.float32)
    inverse[[20, 100, 150, 200]] = 1e-3  # one column each that must not change
    found = wide_groups([a], lambda s: w, wide=WIDE, narrow=NARROW, inverse=lambda s: inverse)
    assert str(found.formats["a"]) == f"cols(64: {WIDE}, {NARROW})"
    (columns,) = found.hints["a"]["columns"]
    assert sorted({int(c) // 16 for c in columns}) == [20 // 16, 100 // 16, 150 // 16, 200 // 16]
    assert len(columns) == 64


def test_a_split_keeps_the_groups_and_lowers_the_error():
    """Blocks of four groups with one wide: less error than narrow alone, and than the worst choice of one in four."""
    a = site(rows=32, cols=256)
    w = weights(32, 256)
    w[:, 16 * np.arange(0, 16, 4)[:, None] + np.arange(16)] *= 6
    hessian = np.diag(np.random.default_rng(1).uniform(0.5, 2, 256)).astype(np.float32)
    inverse = (1 / np.diag(hessian)).astype(np.float32)
    found = wide_groups([a], lambda s: w, wide=WIDE, narrow=NARROW, inverse=lambda s: inverse)

    def error(columns):
        packed = encode_with(found.formats["a"].weight, w, {"columns": [columns]})
        return output_error(packed.decode() - w, hessian).sum()

    chosen = found.hints["a"]["columns"][0]
    assert error(chosen) < 0.5 * error(np.sort((chosen + 16) % 256))
    assert error(chosen) < 0.5 * output_error(project(parse(NARROW).weight, w) - w, hessian).sum()
    wide = encode_with(found.formats["a"].weight, w, found.hints["a"]).decode()[:, chosen]
    alone = project(parse(WIDE).weight, np.ascontiguousarray(w[:, chosen]))
    assert wide.tobytes() == alone.tobytes()


def test_none_or_all_wide_give_plain_formats():
    a = site(rows=16, cols=256)
    for count, text in ((0, NARROW), (4, WIDE)):
        found = wide_groups([a], lambda s: weights(16, 256), wide=WIDE, narrow=NARROW, count=count)
        assert str(found.formats["a"]) == text
        assert found.hints == {}


def test_widths_that_are_no_whole_blocks():
    for cols in (16, 72, 100, 130):
        a = site(rows=16, cols=cols)
        w = weights(16, cols)
        found = wide_groups([a], lambda s, w=w: w, wide="uint4/g16", narrow="uint2/g16")
        packed = encode_with(found.formats["a"].weight, w, found.hints.get("a"))
        packed.validate("a")
        assert bits_per_weight(found.formats["a"].weight, 16, cols) > 2


def test_scores_of_groups():
    w = weights(8, 40)
    w[:, 16:32] *= 5
    inverse = np.r_[np.ones(32), np.full(8, 0.5)].astype(np.float32)
    narrow = parse("uint2/g16")
    square = (project(narrow.weight, w) - w) ** 2
    plain = [square[:, :16].sum(), square[:, 16:32].sum(), square[:, 32:].sum()]
    assert group_scores(w, narrow, 16) == pytest.approx(plain)
    assert group_scores(w, narrow, 16, inverse) == pytest.approx([*plain[:2], 2 * plain[2]])
    spread = group_scores(w, narrow, 16, score="range")
    assert spread[1] == pytest.approx(float(np.ptp(w[:, 16:32], axis=1).mean()))
    assert group_scores(w, narrow, 16, inverse, "hessian-range") == pytest.approx([*spread[:2], 2 * spread[2]])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"score": "size"}, "'size' scores no groups"),
        ({"inverse": np.ones(3)}, "must be 40 positive numbers"),
        ({"inverse": np.zeros(40)}, "must be 40 positive numbers"),
    ],
)
def test_bad_scores_are_refused(how, message):
    with pytest.raises(UsageError, match=message), np.errstate(divide="ignore"):
        group_scores(weights(8, 40), parse("uint2/g16"), 16, **how)


def test_parts_that_read_other_inputs_are_refused():
    with pytest.raises(UsageError, match="must name the same input"):
        wide_groups([site()], lambda s: weights(64, 128), wide="uint4/g16 @ int8/token", narrow="uint2/g16")
