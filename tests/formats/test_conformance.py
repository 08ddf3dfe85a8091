"""What every format promises, for every format and every edge of a shape.

Each element is at its nearest code with the scale as stored, which is checked against what all codes would mean; but
the largest of a zero-point group is on the last code, and some groups were rounded twice (see ``settle`` in fit.py).

How good the scales are is checked for integers with plain scales, whose error is at most half a step of their group,
with these additions (s is the stored scale, e the relative rounding of a scale: 2^-11 for f16, 2^-8 for bf16, 2^-16
for f32, of which 16 bits are kept beside a zero point or a minimum):
    signed        the extreme sits on -2^(B-1), so an opposite one of the same size lies a whole step beyond the last
                  code; the rounded scale moves both ends by 2^(B-1) e steps
    zero point    the rounded zero point shifts the range by half a step at most, and the rounded scale widens or
                  narrows it by (2^B - 1) e steps; the largest element takes the last code whatever it is nearest to
    minimum       the rounded scale as above; a group whose smallest or largest element misses the first or the
                  last code (6 to 8-bit codes beside a scale or a minimum of few bits) is rounded twice
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
    KMeans,
    Packed,
    allocate,
    bits_per_weight,
    encode,
    layout,
    node,
    parse_weight,
    project,
    scales,
)
from gossamer.formats.coded import Group
from gossamer.formats.node import ALIGN, PANEL
from gossamer.formats.numbers import FLOATS, NUMBERS

GROUPS = ("g16", "g32", "g64", "g128", "row")
PLAIN = [parse_weight(text) for text in (
    *(f"int{b}/{g}*{s}" for b in (8, 5, 4, 3) for g in GROUPS for s in FLOATS),
    *(f"uint{b}/{g}*{s}{o}" for b in (8, 5, 4, 2) for g in GROUPS for s in FLOATS
      for o in ("", "-m(f16)", "-m(f32)", "-m(bf16)")),
    *(f"{n}/g32" for n in ("int2", "int6", "int7", "uint3", "uint6", "uint7")),
)]  # fmt: skip
NESTED = ("int8/row", "uint6/g8-z(0)", "e4m3/tensor", "int8/g256", "uint3/g16", "nf4/g16", "int6/g24*bf16",
          "int8/32x16", "uint4/g16*(uint6/g8-z(0))-m(uint6/row-z(0))")  # fmt: skip
FORMATS = [*map(parse_weight, FLOATS), *PLAIN, *(parse_weight(text) for text in (
    *(f"{n}/{g}" for n in NUMBERS for g in ("g32", "row") if n[:3] not in ("int", "uin")),
    *(f"{n}/{g}*{s}" for n in ("int8", "int4", "int2", "uint4", "uint8", "ternary", "bipolar1", "bipolar4", "e2m1",
                               "e4m3", "e3m0", "e5m2", "nf4")
      for g, s in (("g32", "e8m0"), ("16x16", "e8m0"), ("g16", "e4m3"), ("32x48", "f32"), ("tensor", "f32"),
                   ("tensor", "f16"))),
    *(f"uint{b}/{g}-z(0)" for b in (2, 4, 8) for g in ("g16", "row", "16x32")),
    *(f"uint{b}/{g}-m(f16)" for b in (2, 4, 8) for g in ("tensor", "16x32")),
    *(f"{n}/{g}*({s})" for n in ("int8", "int4", "uint4", "e2m1", "nf4", "ternary", "bipolar2")
      for g in ("g16", "16x16") for s in NESTED),
    "uint2/g16*(uint4/g16-z(0))-m(uint4/g16-z(0))", "uint4/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))",
    "uint4/g16-m(int8/tensor)", "uint8/g16*(e4m3/tensor)-m(int8/16x16)",
    *(f"kmeans{b}/{per}" for b in (2, 3, 4) for per in ("row", "tensor")),
))]  # fmt: skip
ROWS = (1, 15, 16, 17, 33)
COLS = (1, 7, 16, 17, 31, 32, 33, 100)
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


def steps(packed):
    """float64 |scale| of each element, as stored; of plain scales of rows."""
    fmt, (rows, cols) = packed.format, packed.shape
    parts = fmt.unpack_parts(packed.arrays, rows, cols, 0, (rows + PANEL - 1) // PANEL)
    s = np.abs(scales.load(parts.scales[:rows], fmt.scale).astype(np.float64))
    return np.repeat(s, fmt.width(cols), axis=1)[:, :cols]


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
        share = s * (0.5 + 0.5 * (fmt.number.bits >= 6 and fmt.scale == "bf16") + (levels - 1) * error)
    else:
        twice = fmt.number.bits >= 6 and (fmt.minimum, fmt.scale) != ("f32", "f32")
        share = s * (0.5 + 0.5 * twice + (levels - 1) * error)
    # A scale too small for its type is itself half a unit off.
    tiny = {"f16": 2.0**-25, "bf16": 2.0**-134, "f32": 2.0**-150}[fmt.scale]
    return share + np.abs(w) * 2.0**-20 + levels * tiny


def extreme(packed, w):
    """The element of largest magnitude of each group, spread over the group; the negative one of a tie."""
    cols = w.shape[1]
    group, groups = packed.format.width(cols), packed.format.groups(cols)
    padded = np.pad(w, ((0, 0), (0, groups * group - cols))).reshape(len(w), groups, group)
    low, high = padded.min(axis=2), padded.max(axis=2)
    return np.repeat(np.where(-low >= high, low, high), group, axis=1)[:, :cols]


@pytest.mark.parametrize("fmt", [*map(Dense, FLOATS), *PLAIN], ids=str)
def test_decode_of_encode_is_near(fmt):
    for rows, cols in shapes(fmt):
        w = weights(rows, cols)
        packed = encode(fmt, ArraySource(w))
        over = np.abs(packed.decode().astype(np.float64) - w) - bound(packed, w)
        assert over.max() <= 0, (rows, cols, np.unravel_index(over.argmax(), w.shape))


@every_format
def test_every_element_is_at_its_nearest_code(fmt):
    if isinstance(fmt, Dense):
        return
    bits = fmt.bits if isinstance(fmt, KMeans) else fmt.number.bits
    levels = 1 << bits if isinstance(fmt, KMeans) else fmt.number.levels
    for rows, cols in shapes(fmt)[:: 8 if bits > 6 else 3]:
        w = weights(rows, cols)
        packed = encode(fmt, ArraySource(w))
        back = packed.decode()
        assert back.dtype == np.float32
        assert back.shape == w.shape
        errors, slack = [], np.abs(back) * 2.0**-22
        for c in range(levels):
            arrays = {name: array.copy() for name, array in packed.arrays.items()}
            layout.pack_codes(np.full(w.shape, c, np.uint8), bits, 0, arrays, 0)
            other = Packed(fmt, w.shape, arrays).decode().astype(np.float64)
            other[~np.isfinite(other)] = np.inf  # the codes of e4m3 and e5m2 that are no numbers
            errors.append(np.abs(other - w))
            slack = np.maximum(slack, np.where(np.isfinite(other), np.abs(other), 0) * 2.0**-22)
        ours, errors = np.abs(back.astype(np.float64) - w), np.sort(errors, axis=0)
        if twice(fmt):
            assert (ours <= errors[0] + slack).mean() > 0.6
            assert (ours <= errors[1] + slack).mean() > 0.95
        else:
            assert (ours <= errors[0] + slack).all(), (rows, cols)


def twice(fmt):
    """Whether some groups are at the nearest codes of what they were at first: those whose values are quantized again,
    or whose largest element is put on the last code."""
    if isinstance(fmt, KMeans):
        return False
    return fmt.zero or fmt.minimum is not None or fmt.number.family == "int" or fmt.scale != "f32"


@every_format
def test_project_is_idempotent(fmt):
    for rows, cols in shapes(fmt):
        once = project(fmt, weights(rows, cols, seed=1))
        again = project(fmt, once)
        if nearly_idempotent(fmt):
            assert np.abs(again - once).max() <= 0.05 * np.abs(once).max()
        else:
            assert same(again, once), (rows, cols)


def nearly_idempotent(fmt):
    """Zero points of rows that share a nested scale: another row than the widest may become it by rounding."""
    return isinstance(fmt, Coded) and fmt.zero and fmt.group.shared and isinstance(fmt.scale, Coded)


def same(a, b):
    """Equal bit for bit, signs of zero included."""
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@every_format
def test_bytes(fmt):
    for rows, cols in shapes(fmt):
        packed = encode(fmt, ArraySource(weights(rows, cols)))
        packed.validate("this matrix")
        if isinstance(fmt, Coded):  # an expression reads back as the same format
            assert parse_weight(str(fmt)) == fmt
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
    for number in ("int8", "int5", "int4", "uint8", "uint5", "uint4"):
        for suffix in ("/g32", "/g32*f32", "/g32*bf16", "/row"):
            yield parse_weight(number + suffix)
            if number.startswith("u"):
                for minimum in FLOATS:
                    yield parse_weight(f"{number}{suffix}-m({minimum})")


@pytest.mark.parametrize("fmt", [*map(Dense, FLOATS), *kinds(), KMeans(3, "row")], ids=str)
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
        other = Coded(NUMBERS[number], Group(1, group), fmt.scale, None, fmt.minimum)
        return float(((project(other, w) - w).astype(np.float64) ** 2).mean())

    names = ["int4", "int5", "int8"] if fmt.number.signed else ["uint4", "uint5", "uint8"]
    # A bit more halves the step, so the squared error falls fourfold: at least threefold is asked for.
    by_bits = [error(name, 64) for name in names]
    assert by_bits[1] < by_bits[0] / 3
    assert by_bits[2] < by_bits[1] / 3**3 * (4 if fmt.scale == "bf16" or fmt.minimum == "bf16" else 1)
    by_group = [error(fmt.number.name, group) for group in (16, 32, 128, None)]
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


@pytest.mark.parametrize(("make", "says"), [
    (lambda: Group.of(12), "multiple of 16 columns"),
    (lambda: Group.of(0), "multiple of 16 columns"),
    (lambda: Group.of(1 << 21), "multiple of 16 columns up to"),
    (lambda: Group.tile(8, 16), "multiple of 16 rows"),
    (lambda: Group(None, 32), "write 'tensor'"),
    (lambda: Coded(NUMBERS["int4"], Group.of(32), "f8"), "scale 'f8' is not known"),
    (lambda: Coded(NUMBERS["int4"], Group.of(32), zero=True), "takes no zero point or minimum"),
    (lambda: Coded(NUMBERS["nf4"], Group.of(32), minimum="f16"), "takes no zero point or minimum"),
    (lambda: Coded(NUMBERS["uint4"], Group.of(32), zero=True, minimum="f16"), "not both"),
    (lambda: Coded(NUMBERS["uint4"], Group.of(32), minimum="e8m0"), "a minimum is stored as f32, f16, bf16"),
    (lambda: nest(nest(nest(Coded(NUMBERS["int4"], Group.row())))), "nests 4 formats in one another; at most 3"),
    (lambda: allocate(Coded(NUMBERS["int4"], Group.of(24)), 4, 4), "only inside a scale.*'g32'"),
    (lambda: allocate(Coded(NUMBERS["int4"], Group.tile(16, 8)), 4, 4), "only inside a scale.*'16x16'"),
    (lambda: KMeans(5, "row"), "write kmeans2, kmeans3 or kmeans4"),
    (lambda: KMeans(4, "g32"), "table per row or tensor"),
])  # fmt: skip
def test_what_cannot_be_is_said_in_one_sentence(make, says):
    with pytest.raises(FormatError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


def nest(scale):
    return Coded(NUMBERS["int4"], Group.row(), scale)


class Counted:
    """A source that counts how it is read."""

    def __init__(self, w):
        self.w, self.most, self.reads = w, 0, 0

    @property
    def shape(self):
        return self.w.shape

    def read(self, r0, r1):
        self.most, self.reads = max(self.most, r1 - r0), self.reads + r1 - r0
        return self.w[r0:r1]


@pytest.mark.parametrize(("text", "passes"), [
    ("int4/g32", 1), ("int4/g32*(int8/row)", 1), ("kmeans4/row", 1), ("e4m3/32x48", 2), ("int8/tensor", 2),
    ("e2m1/g16*(e4m3/tensor)", 2), ("uint4/g16-m(int8/tensor)", 2), ("kmeans4/tensor", 2), ("ternary/tensor", 3),
])  # fmt: skip
def test_a_matrix_is_read_a_few_rows_at_a_time(text, passes, monkeypatch):
    for module in ("node", "shared", "kmeans"):
        monkeypatch.setattr(f"gossamer.formats.{module}.ROWS_PER_STEP", 32)
    source = Counted(weights(200, 48))
    encode(parse_weight(text), source)
    assert source.most == 32
    assert source.reads == passes * 200
