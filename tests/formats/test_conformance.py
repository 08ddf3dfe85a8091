"""What every format promises, for every format and every edge of a shape.

The error of a stored weight is at most half a step of its group, with these additions, all from the definition in
``Coded.quantize`` (s is the stored scale, e the relative rounding of a scale: 2^-11 for f16, 2^-8 for bf16,
2^-16 for f32, of which 16 bits are kept beside a zero point or a minimum):
    signed        the extreme sits on -2^(B-1), so an opposite one of the same size lies a whole step beyond the last
                  code; the rounded scale moves both ends by 2^(B-1) e steps
    zero point    the rounded zero point shifts the range by half a step at most, and the rounded scale widens or
                  narrows it by (2^B - 1) e steps; the largest element takes the last code whatever it is nearest to
    minimum       the rounded scale as above; a group whose smallest or largest element misses the first or the
                  last code (8-bit codes beside a scale or a minimum of 16 bits) is rounded twice
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from gossamer.errors import FormatError
from gossamer.formats import (
    ArraySource,
    Coded,
    Dense,
    Packed,
    allocate,
    bits_per_weight,
    encode,
    node,
    parse_weight,
    project,
)
from gossamer.formats.node import ALIGN, PANEL
from gossamer.formats.numbers import FLOATS, INTEGERS

GROUPS = ("g8", "g32", "g64", "g128", "row")
FORMATS = [parse_weight(text) for text in (
    *FLOATS,
    *(f"{n}/{g}*{s}" for n in ("int8", "int5", "int4") for g in GROUPS for s in FLOATS),
    *(f"{n}/{g}*{s}{o}" for n in ("uint8", "uint5", "uint4") for g in GROUPS for s in FLOATS
      for o in ("", "-m(f16)", "-m(f32)", "-m(bf16)")),
)]  # fmt: skip
ROWS = (1, 15, 16, 17, 33)
COLS = (1, 7, 8, 9, 31, 32, 33, 100)
SCALE_ERROR = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-16}

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def shapes(fmt):
    """Every width, with heights that rotate from format to format, so that all pairs occur many times."""
    start = FORMATS.index(fmt)
    return [(ROWS[(start + i) % len(ROWS)], cols) for i, cols in enumerate(COLS)]


def weights(rows, cols, seed=0):
    """Normal weights of a usual size; some groups are zero, constant, one-sided or hold an outlier."""
    rng = np.random.default_rng([seed, rows, cols])
    w = (rng.standard_normal((rows, cols)) * 0.02).astype(np.float32)
    for row in range(0, rows, 7):
        start, stop = sorted(rng.integers(0, cols + 1, 2))
        w[row, start:stop] = (0, 0.013, np.abs(w[row, start:stop]), w[row, start:stop] - 0.1)[row // 7 % 4]
        w[row, rng.integers(cols)] *= 8
    return w


def steps(packed, per_element=True):
    """float64 scales [rows, groups] as stored, or one per element."""
    fmt, (rows, cols) = packed.format, packed.shape
    panels = (rows + PANEL - 1) // PANEL
    scales = fmt.unpack_rows(packed.arrays, cols, 0, panels)[1][:rows]
    wide = {"f32": scales, "f16": scales}.get(fmt.scale, scales.astype("<u4") << 16)
    s = np.abs((wide.view("<f4") if fmt.scale == "bf16" else wide).astype(np.float64))
    group = fmt.group or cols
    return np.repeat(s, group, axis=1)[:, :cols] if per_element else s


def bound(packed, w):
    """How far each element may be from its stored form; see the top of the file."""
    fmt = packed.format
    if isinstance(fmt, Dense):
        unit = {"f32": 0, "f16": 2.0**-11, "bf16": 2.0**-8}[fmt.number]
        return np.abs(w) * unit + (2.0**-25 if fmt.number == "f16" else 0)
    s, levels, error = steps(packed), fmt.number.levels, SCALE_ERROR[fmt.scale]
    if fmt.number.signed:
        # Within the codes half a step; beyond the last one what is missing.
        beyond = np.maximum(0, np.abs(w) - s * (levels // 2 - 1)) * (np.sign(w) != np.sign(extreme(packed, w)))
        share = np.maximum(s / 2, np.maximum(beyond, s * levels // 2 * error))
    elif fmt.minimum is None:
        share = s * (0.5 + (levels - 1) * error)
    else:
        twice = fmt.number.bits == 8 and (fmt.minimum, fmt.scale) != ("f32", "f32")
        share = s * (0.5 + 0.5 * twice + (levels - 1) * error)
    # A scale too small for its type is itself half a unit off.
    tiny = {"f16": 2.0**-25, "bf16": 2.0**-134, "f32": 2.0**-150}[fmt.scale]
    return share + np.abs(w) * 2.0**-20 + levels * tiny


def extreme(packed, w):
    """The element of largest magnitude of each group, spread over the group; the negative one of a tie."""
    cols = w.shape[1]
    group = packed.format.group or cols
    groups = (cols + group - 1) // group
    padded = np.pad(w, ((0, 0), (0, groups * group - cols))).reshape(len(w), groups, group)
    low, high = padded.min(axis=2), padded.max(axis=2)
    return np.repeat(np.where(-low >= high, low, high), group, axis=1)[:, :cols]


@every_format
def test_decode_of_encode_is_near(fmt):
    for rows, cols in shapes(fmt):
        w = weights(rows, cols)
        packed = encode(fmt, ArraySource(w))
        back = packed.decode()
        assert back.dtype == np.float32
        assert back.shape == w.shape
        over = np.abs(back.astype(np.float64) - w) - bound(packed, w)
        assert over.max() <= 0, (rows, cols, np.unravel_index(over.argmax(), w.shape))


@every_format
def test_project_is_idempotent(fmt):
    for rows, cols in shapes(fmt):
        once = project(fmt, weights(rows, cols, seed=1))
        assert same(project(fmt, once), once), (rows, cols)


def same(a, b):
    """Equal bit for bit, signs of zero included."""
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@every_format
def test_bytes(fmt):
    for rows, cols in shapes(fmt):
        packed = encode(fmt, ArraySource(weights(rows, cols)))
        packed.validate("this matrix")
        fields = fmt.fields(rows, cols)
        assert list(packed.arrays) == list(fields)
        for name, array in packed.arrays.items():
            assert array.nbytes == fields[name].nbytes
            assert array.nbytes % ALIGN == 0
            assert fields[name].used <= len(array) < fields[name].used + ALIGN
            assert not array[fields[name].used :].any()  # what pads an array is zero, so files are reproducible
        exact = 8 * sum(a.nbytes for a in packed.arrays.values()) / (rows * cols)
        assert bits_per_weight(fmt, rows, cols) == packed.bits_per_weight == exact


@every_format
def test_encoding_in_steps_gives_the_same_bytes(fmt, monkeypatch):
    cols = COLS[FORMATS.index(fmt) % len(COLS)]
    w = weights(50, cols)
    whole = encode(fmt, ArraySource(w))
    monkeypatch.setattr(node, "ROWS_PER_STEP", 16)
    parts = encode(fmt, ArraySource(w))
    for name, array in whole.arrays.items():
        assert array.tobytes() == parts.arrays[name].tobytes()


@every_format
def test_rows_decode_alone(fmt):
    cols = COLS[FORMATS.index(fmt) % len(COLS)]
    packed = encode(fmt, ArraySource(weights(40, cols)))
    whole = packed.decode()
    for r0, r1 in [(0, 1), (15, 17), (16, 32), (33, 40), (39, 40), (5, 5), (0, 0)]:
        assert same(packed.decode(r0, r1), whole[r0:r1])


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused_with_its_row(fmt, bad, monkeypatch):
    monkeypatch.setattr(node, "ROWS_PER_STEP", 16)
    w = weights(40, 9)
    w[37, 4] = bad
    with pytest.raises(FormatError, match=r"layers\.0\.q holds a NaN or an infinity in row 37"):
        encode(fmt, ArraySource(w), "layers.0.q")


def kinds():
    """One format for each way to find codes, with the defaults and with the coarsest and the finest scale."""
    for number in INTEGERS:
        for suffix in ("/g32", "/g32*f32", "/g32*bf16", "/row"):
            yield parse_weight(number + suffix)
            if number.startswith("u"):
                for minimum in FLOATS:
                    yield parse_weight(f"{number}{suffix}-m({minimum})")


@pytest.mark.parametrize("fmt", [*map(Dense, FLOATS), *kinds()], ids=str)
def test_validate_names_what_is_wrong(fmt):
    packed = encode(fmt, ArraySource(weights(3, 20)))
    name = list(packed.arrays)[-1]
    array = packed.arrays[name]
    other = np.dtype("i8")
    for wrong in (array[:-1], array.astype(other), array.reshape(1, -1)):
        with pytest.raises(FormatError, match=f"layer 3: array '{name}' of"):
            Packed(fmt, (3, 20), {**packed.arrays, name: wrong}).validate("layer 3")
    with pytest.raises(FormatError, match="layer 3 is stored as"):
        Packed(fmt, (3, 20), {**packed.arrays, "extra": array}).validate("layer 3")
    with pytest.raises(FormatError, match="layer 3 is stored as"):
        Packed(fmt, (3, 20), {}).validate("layer 3")


@pytest.mark.parametrize("fmt", list(kinds()), ids=str)
def test_more_bits_and_smaller_groups_help(fmt):
    assert isinstance(fmt, Coded)
    w = weights(32, 512, seed=3)

    def error(number, group):
        other = Coded(INTEGERS[number], group, fmt.scale, fmt.minimum)
        return float(((project(other, w) - w).astype(np.float64) ** 2).mean())

    names = ["int4", "int5", "int8"] if fmt.number.signed else ["uint4", "uint5", "uint8"]
    # A bit more halves the step, so the squared error falls fourfold: at least threefold is asked for.
    by_bits = [error(name, 64) for name in names]
    assert by_bits[1] < by_bits[0] / 3
    assert by_bits[2] < by_bits[1] / 3**3 * (4 if fmt.scale == "bf16" or fmt.minimum == "bf16" else 1)
    by_group = [error(fmt.number.name, group) for group in (8, 32, 128, None)]
    # An 8-bit code in a small group feels the rounding of its bf16 scale and of its signed range's end.
    slack = 1.1 if fmt.number.bits == 8 else 1.0
    assert all(small <= large * slack for small, large in pairwise(by_group))


@pytest.mark.parametrize("rows", [1, 40])
def test_allocate_asks_for_zeroed_arrays(rows):
    for fmt in (Dense("bf16"), parse_weight("uint5/g32")):
        arrays = allocate(fmt, rows, 33)
        assert set(arrays) == set(fmt.fields(rows, 33))
        assert not any(a.any() for a in arrays.values())
    with pytest.raises(FormatError, match="at least one row"):
        allocate(Dense("f32"), 0, 4)
