"""Number tables and scales: every code of every number, against the standard's formula and against ml_dtypes."""

from __future__ import annotations

from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest

from gossamer.errors import FormatError
from gossamer.formats import scales
from gossamer.formats.numbers import FLOATS, NUMBERS, SCALES, number

MINIFLOATS = [n for n in NUMBERS.values() if n.family == "minifloat"]
OTHERS = [n for n in NUMBERS.values() if n.family != "minifloat"]
THEIRS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
minifloats = pytest.mark.parametrize("n", MINIFLOATS, ids=lambda n: n.name)


def test_the_names():
    assert {n.name for n in MINIFLOATS} == {f"e{x}m{y}" for x in range(1, 8) for y in range(7) if 3 <= 1 + x + y <= 8}
    assert {n.name for n in OTHERS} == {
        *(f"int{b}" for b in range(2, 9)), *(f"uint{b}" for b in range(2, 9)), *(f"bipolar{b}" for b in range(1, 9)),
        "ternary", "nf4",
    }  # fmt: skip
    assert all(NUMBERS[name] is number(name) for name in NUMBERS)
    assert set(FLOATS) < set(SCALES)


@pytest.mark.parametrize(("name", "hint"), [("int9", "int"), ("e2m2x", "e2m2"), ("NF4", "nf4"), ("q" * 99, "write")])
def test_an_unknown_number_is_named(name, hint):
    with pytest.raises(FormatError, match=f"is not a number format; .*{hint}"):
        number(name)


def by_the_book(n, code):
    """The value of a minifloat code, from its three parts."""
    x, y = int(n.name[1]), int(n.name[3])
    bias = max(1, 2 ** (x - 1) - 1)
    sign, rest = divmod(code, 1 << (n.bits - 1))
    e, m = divmod(rest, 1 << y)
    if (n.name == "e4m3" and rest == 0x7F) or (n.name == "e5m2" and e == 31):
        return float("nan")
    return (-1.0) ** sign * (2.0 ** (e - bias) * (1 + m / 2**y) if e else 2.0 ** (1 - bias) * (m / 2**y))


@minifloats
def test_every_code_of_a_minifloat(n):
    expected = np.array([by_the_book(n, c) for c in range(1 << n.bits)])
    finite = ~np.isnan(expected)
    assert np.array_equal(n.values[finite], expected[finite].astype(np.float32))
    assert not np.isfinite(n.values[~finite]).any()
    assert n.largest == np.nanmax(expected)
    # Monotone, one value a code but for the two zeros, and each is its own nearest.
    positive = n.values[: 1 << (n.bits - 1)]
    positive = positive[np.isfinite(positive)]
    assert (np.diff(positive) > 0).all()
    assert len(np.unique(n.values[finite])) == finite.sum() - 1
    codes = np.flatnonzero(finite).astype(np.uint8)
    back = n.minifloat.encode(n.values[codes])
    assert np.array_equal(back, np.where(n.values[codes] == 0, 0, codes))  # minus zero becomes zero


@pytest.mark.parametrize("name", THEIRS)
def test_values_of_the_standards(name):
    theirs = np.arange(1 << NUMBERS[name].bits, dtype=np.uint8).view(THEIRS[name]).astype(np.float32)
    ours = NUMBERS[name].values
    assert np.array_equal(np.isnan(theirs) | np.isinf(theirs), ~np.isfinite(ours))
    same = np.isfinite(ours)
    assert np.array_equal(ours[same].view(np.uint32), theirs[same].view(np.uint32))


@pytest.mark.parametrize("name", THEIRS)
def test_rounding_of_the_standards(name):
    n = NUMBERS[name]
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(200_000) * 2.0 ** rng.uniform(-30, 20, 200_000)).astype(np.float32)
    x = np.clip(x, -n.largest, n.largest)
    codes = n.minifloat.encode(x)
    assert np.array_equal(n.values[codes], x.astype(THEIRS[name]).astype(np.float32))


def even(n, lower):
    """Which of the codes ``lower`` and ``lower + 1`` a tie goes to: the even multiple of the step between them."""
    low, high = (n.values[lower].astype(np.float64), n.values[lower + 1].astype(np.float64))
    return lower if (low / (high - low)) % 2 == 0 else lower + 1


@minifloats
def test_ties_and_their_neighbours(n):
    positive = n.values[: n.minifloat.largest + 1].astype(np.float64)
    for lower, middle in enumerate((positive[:-1] + positive[1:]) / 2):
        x = np.float32(middle)
        assert x == middle  # exact in float32
        below, above = np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))
        got = n.minifloat.encode(np.array([x, below, above], np.float32))
        assert got.tolist() == [even(n, lower), lower, lower + 1]
        sign = 1 << (n.bits - 1)
        negative = n.minifloat.encode(-np.array([x, below, above], np.float32))
        assert negative.tolist() == [c + sign if c else 0 for c in got.tolist()]
    if n.minifloat.mantissa:
        assert all(even(n, lower) % 2 == 0 for lower in range(len(positive) - 1))  # ties to the even mantissa


@minifloats
def test_saturation_and_underflow(n):
    huge = np.array([n.largest * 1.01, 3e38, np.inf], np.float32)
    top = n.minifloat.largest
    assert n.minifloat.encode(huge).tolist() == [top] * 3
    assert n.minifloat.encode(-huge).tolist() == [top + (1 << (n.bits - 1))] * 3
    tiny = np.array([0.0, -0.0, 1e-45, -1e-45, n.values[1] * 0.499, -n.values[1] * 0.499], np.float32)
    assert n.minifloat.encode(tiny).tolist() == [0] * 6


def test_nf4_follows_the_quantile_rule():
    stated = [-1, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.091050, 0,
              0.079580, 0.160930, 0.246112, 0.337915, 0.440710, 0.562617, 0.722957, 1]  # fmt: skip
    values = NUMBERS["nf4"].values
    assert np.abs(values - np.array(stated)).max() < 1e-6
    # Each positive level is a quantile of the normal distribution: equal probabilities lie between neighbours.
    largest = NormalDist().inv_cdf(0.9677083)
    steps = np.diff([NormalDist().cdf(float(v) * largest) for v in values[7:]])
    assert steps == pytest.approx([steps[0]] * 8, abs=1e-6)


@pytest.mark.parametrize("n", OTHERS, ids=lambda n: n.name)
def test_other_numbers(n):
    values, used = n.values, n.values[: n.levels]
    assert values.shape == (1 << n.bits,)
    assert values.dtype == np.float32
    assert (np.diff(used) > 0).all()
    expected = {
        "int": lambda c: c - 2 ** (n.bits - 1),
        "uint": lambda c: c,
        "ternary": lambda c: c - 1,
        "bipolar": lambda c: sum((2 * (c >> i & 1) - 1) << i for i in range(n.bits)),
    }
    if n.family in expected:
        assert used.tolist() == [expected[n.family](c) for c in range(n.levels)]
        assert used.tolist() == [n.step * c - n.zero for c in range(n.levels)]
        assert n.table is None
    assert n.signed == (values.min() < 0)
    assert n.zero_code == (used.tolist().index(0) if 0 in used else None)
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1


# ------------------------------------------------------------ scales


def test_every_power_of_two_scale():
    stored = np.arange(256, dtype=np.uint8)
    theirs = stored.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    ours = scales.load(stored, "e8m0")
    assert np.isnan(ours[255])
    assert np.array_equal(ours[:255], theirs[:255])
    assert ours[:255].tolist() == [2.0 ** (b - 127) for b in range(255)]


def test_every_e4m3_scale():
    stored = np.arange(256, dtype=np.uint8)
    theirs = stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(scales.load(stored, "e4m3"), theirs, equal_nan=True)


@pytest.mark.parametrize("largest", [6.0, 7.5, 28.0, 448.0, 57344.0])
def test_the_floor_rule_reads_exponents_exactly(largest):
    """X = 2^(floor(log2 absmax) - floor(log2 largest)), also right at and below powers of two."""
    powers = 2.0 ** np.arange(-100, 100)
    absmax = np.concatenate([powers, np.nextafter(powers.astype(np.float32), np.float32(0))]).astype(np.float64)
    stored = scales.store_power_of_two(absmax / largest, largest, mean=False)
    expected = np.frexp(absmax)[1] - np.frexp(largest)[1]
    assert np.array_equal(stored.astype(int) - 127, np.clip(expected, -127, 127))


def test_power_of_two_scales_where_the_largest_code_is_one():
    """Nothing is cut off: the next power of two at or above absmax / largest."""
    s = np.array([1.0, 1.001, 1.999, 2.0, 0.75, 0.0, 1e-45, 3e38])
    stored = scales.store_power_of_two(s, 1.0, mean=False)
    assert scales.load(stored, "e8m0").tolist() == [1, 2, 2, 2, 1, 2.0**-127, 2.0**-127, 2.0**127]
    means = scales.store_power_of_two(np.array([1.0, 1.49, 1.51, 0.74]), 1.0, mean=True)
    assert scales.load(means, "e8m0").tolist() == [1, 1, 2, 0.5]


@pytest.mark.parametrize("kind", [s for s in SCALES if s != "e8m0"])
def test_stored_scales_are_nearest_and_never_vanish(kind):
    smallest = {"f32": 2.0**-149, "f16": 2.0**-24, "bf16": 2.0**-133, "e4m3": 2.0**-9}[kind]
    largest = {"f32": 3.4028234663852886e38, "f16": 65504.0, "bf16": 2.0**128 - 2.0**120, "e4m3": 448.0}[kind]
    got = scales.load(scales.store(np.array([0.0, smallest / 9, -smallest / 9, largest * 0.9999]), kind), kind)
    assert got[:3].tolist() == [0, smallest, -smallest]
    assert abs(got[3]) <= largest
    s = 2.0 ** np.random.default_rng(0).uniform(-5, 8, 1000)
    error = np.abs(scales.load(scales.store(s, kind), kind) - s) / s
    assert error.max() <= {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8, "e4m3": 2.0**-4}[kind]
    if kind == "f32":
        short = scales.load(scales.store(s, kind, short=True), kind)
        assert np.array_equal(np.ldexp(np.frexp(short)[0], 16) % 1, np.zeros(1000))  # 16 significant bits
        assert (np.abs(short - s) / s).max() <= 2.0**-16
