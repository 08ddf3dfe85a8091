"""The bytes of each format, read one element at a time as docs/formats.md says, and the tables of that page."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.checkpoints.ggml_types import LOSSLESS, TYPES
from gossamer.formats import ArraySource, KMeans, Packed, allocate, bits_per_weight, encode, halves, parse, parse_weight
from gossamer.formats import scales as plain
from gossamer.formats.coded import Parts
from gossamer.formats.node import PANEL
from gossamer.formats.numbers import FLOATS, NUMBERS
from gossamer.models.packed_checkpoint import LAYOUT

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
EXPRESSIONS = [
    *(f"{n}/{g}" for n in NUMBERS for g in ("g16*f16", "row")),
    *(f"int4/{g}*{s}" for g in ("g16", "g32", "g48", "row", "16x16", "32x48", "tensor") for s in plain.NUMPY),
    *(f"uint{b}/{g}{o}" for b in range(2, 9) for g in ("g16", "32x16")
      for o in ("-m(f32)", "-m(bf16)", "-z(0)", "*e8m0", "-m(uint6/g8-z(0))")),
    *(f"{n}/{g}*({s})" for n in ("int5", "uint3", "e2m1", "nf4") for g in ("g16", "row", "16x16", "tensor")
      for s in ("int8/row", "uint6/g8-z(0)", "e4m3/tensor", "uint3/g16", "int4/g16*(e4m3/32x16)")),
    "uint2/g16*(uint4/g16-z(0))-m(uint4/g16-z(0))", "uint4/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))",
    *(f"kmeans{b}/{per}" for b in (2, 3, 4) for per in ("row", "tensor")),
]  # fmt: skip


def code(a, bits, cols, row, col):
    """A stored code from its fields, every index computed as the page says."""
    (p, r), (b, k) = divmod(row, 16), divmod(col, 16)
    h, i = divmod(k, 4)
    start, found, below = p * ((cols + 15) // 16) + b, 0, 0
    for width in {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}[bits]:
        array = a[f"q{width}"]
        if width == 8:
            part = int(array[start * 256 + (h * 16 + r) * 4 + i])
        elif width == 4:
            part = int(array[start * 128 + (h // 2 * 16 + r) * 4 + i]) >> 4 * (h % 2) & 15
        elif width == 2:
            part = int(array[start * 64 + r * 4 + i]) >> 2 * h & 3
        else:
            word = array[start * 32 + h * 8 : start * 32 + h * 8 + 8].tobytes()
            part = int.from_bytes(word, "little") >> (4 * r + i) & 1
        found |= part << below
        below += width
    return found


def element(fmt, a, rows, cols, row, col):
    """One decoded element, straight from the page: no array is reshaped."""
    p, r = divmod(row, 16)
    if str(fmt) == "bf16":
        half, k = divmod(col, 8)
        pair = next(i for i, pair in enumerate([(0, 2), (4, 6), (1, 3), (5, 7)]) if k in pair)
        index = ((p * ((cols + 15) // 16 * 2) + half) * 4 + pair) * 32 + r * 2 + (k // 2) % 2
        return halves.to_float(a["values"][index : index + 1], "bf16")[0]
    if str(fmt) in FLOATS:
        index = (p * cols + col) * 16 + r
        return halves.to_float(a["values"][index : index + 1], fmt.number)[0]
    if isinstance(fmt, KMeans):
        c = code(a, fmt.bits, cols, row, col)
        return a["table"][c if fmt.per == "tensor" else ((p << fmt.bits) + c) * 16 + r]
    c = code(a, fmt.number.bits, cols, row, col)
    width = fmt.group.cols or (cols + 15) // 16 * 16
    groups, g = (cols + width - 1) // width, col // width
    tile = fmt.group.rows or (rows + 15) // 16 * 16
    tiles = (rows + tile - 1) // tile

    def scale(name, kind):
        if not isinstance(kind, str):
            inner = {key.removeprefix(f"{name}."): array for key, array in a.items() if key.startswith(f"{name}.")}
            return element(kind, inner, tiles, groups, row // tile, g)
        index = (p * groups + g) * 16 + r if tile == 1 else row // tile * groups + g
        return plain.load(a[name][index : index + 1], kind)[0]

    s = scale("scales", fmt.scale)
    if fmt.minimum:
        return s * np.float32(c) - scale("mins", fmt.minimum)
    if not fmt.zero:
        return s * fmt.number.values[c]
    if fmt.number.bits > 4:
        z = int(a["zeros"][(p * groups + g) * 16 + r])
    else:
        z = int(a["zeros"][(p * groups + g) * 8 + r % 8]) >> 4 * (r // 8) & 15
    return s * np.float32(c - z)


@pytest.mark.parametrize("text", [*FLOATS, *EXPRESSIONS])
def test_every_element_lies_where_the_page_says(text):
    rng = np.random.default_rng(0)
    for rows, cols in [(1, 1), (18, 21), (35, 70)]:
        packed = encode(parse_weight(text), ArraySource(rng.standard_normal((rows, cols)).astype(np.float32)))
        decoded = packed.decode()
        for row in {0, rows - 1, rows // 2, min(rows - 1, 8)}:
            for col in range(cols):
                one = element(packed.format, packed.arrays, rows, cols, row, col)
                assert decoded[row, col].tobytes() == one.tobytes(), (row, col)


def anything(rng, fmt, rows, cols):
    """Parts of any codes, scales and offsets: what may be stored, whether or not encoding would find it."""
    tiles, groups = fmt.matrix(rows, cols)

    def scale(kind):
        if kind is None:
            return None
        if not isinstance(kind, str):
            return anything(rng, kind, tiles, groups)
        dtype = plain.NUMPY[kind]
        return rng.integers(0, 256, (tiles, groups * dtype.itemsize), np.uint8).view(dtype)

    return Parts(
        rng.integers(0, fmt.number.levels, (rows, cols)).astype(np.uint8),
        scale(fmt.scale),
        rng.integers(0, fmt.number.levels, (rows, groups)).astype(np.uint8) if fmt.zero else None,
        scale(fmt.minimum),
        fmt.group.shared,
    )


def same(one, other):
    """Whether Parts hold the same; ``other`` may have more rows, of padding."""
    if one is None or other is None:
        return one is other
    if isinstance(one, np.ndarray):
        return one.tobytes() == np.ascontiguousarray(other[: len(one)]).tobytes()
    return all(same(getattr(one, name), getattr(other, name)) for name in ("codes", "scales", "zeros", "mins"))


CODED = [text for text in EXPRESSIONS if not text.startswith("kmeans")]


@settings(max_examples=200)
@given(st.sampled_from(CODED), st.integers(1, 40), st.integers(1, 70), st.booleans(), st.integers(0, 2**32 - 1))
def test_unpack_is_the_inverse_of_pack(text, rows, cols, in_parts, seed):
    fmt = parse_weight(text)
    parts = anything(np.random.default_rng(seed), fmt, rows, cols)
    arrays = allocate(fmt, rows, cols)
    for r0, r1 in pairwise([0, PANEL, rows] if in_parts and rows > PANEL else [0, rows]):
        where = (np.arange(rows) >= r0) & (np.arange(rows) < r1)
        # Scales inside scales that rows share are those of the whole matrix.
        fmt.pack_parts(parts.take(where) if r1 - r0 < rows else parts, arrays, r0)
    Packed(fmt, (rows, cols), arrays).validate("this matrix")
    count = (rows + PANEL - 1) // PANEL
    back = fmt.unpack_parts(arrays, rows, cols, 0, count)
    assert same(parts, back)
    assert (back.codes[rows:] == (fmt.number.zero_code or 0)).all()
    last = fmt.unpack_parts(arrays, rows, cols, count - 1, count)
    assert np.array_equal(last.codes, back.codes[PANEL * (count - 1) :])


@pytest.mark.parametrize("text", ["int4/g32", "uint5/g16*f32", "uint3/row", "uint4/g32-m(f16)", "nf4/g64*e8m0"])
def test_rows_with_plain_scales(text):
    """``pack_rows`` and ``unpack_rows`` take codes, scales and one offset."""
    fmt = parse_weight(text)
    parts = anything(np.random.default_rng(3), fmt, 20, 70)
    offset = parts.zeros if fmt.zero else parts.mins
    arrays = allocate(fmt, 20, 70)
    fmt.pack_rows(parts.codes, parts.scales, offset, arrays, 0)
    codes, scales, back = fmt.unpack_rows(arrays, 70, 0, 2)
    assert np.array_equal(codes[:20], parts.codes)
    assert scales[:20].tobytes() == parts.scales.tobytes()
    assert not scales[20:].any()
    assert (back is None) == (offset is None)
    assert back is None or back[:20].tobytes() == offset.tobytes()


@pytest.mark.parametrize("text", [*FLOATS, *EXPRESSIONS])
def test_kernels_are_given_every_array_once(text):
    """The descriptor names each array of the format and says what a code means."""
    fmt = parse_weight(text)
    arrays = allocate(fmt, 40, 100)
    left = dict(arrays)

    def visit(kernel, fmt, rows, cols, prefix):
        for name in ("values", "q8", "q4", "q2", "q1", "zeros"):
            if getattr(kernel, name) is not None:
                assert getattr(kernel, name) is left.pop(prefix + name)
        if str(fmt) in FLOATS:
            assert kernel.code == str(fmt)
            return
        if isinstance(fmt, KMeans):
            assert kernel.table is left.pop("table")
            assert (kernel.table_per_row, kernel.scales) == (fmt.per == "row", None)
            return
        assert kernel.code == f"u{fmt.number.bits}"
        codes = np.arange(fmt.number.levels)
        meaning = kernel.step * codes - kernel.zero if kernel.table is None else kernel.table
        assert np.array_equal(meaning[: len(codes)], fmt.number.values[: len(codes)], equal_nan=True)
        assert kernel.group == (fmt.group.cols or (cols + 15) // 16 * 16)
        assert kernel.tile_rows == (fmt.group.rows or (rows + 15) // 16 * 16)
        assert kernel.zero_bits == (0 if not fmt.zero else 4 if fmt.number.bits <= 4 else 8)
        for name, kind, held in (("scales", fmt.scale, kernel.scales), ("mins", fmt.minimum, kernel.mins)):
            if kind is None:
                assert held is None
            elif isinstance(kind, str):
                assert held.kind == kind
                assert held.values is left.pop(prefix + name)
            else:
                assert held.kind == "nested"
                visit(held.nested, kind, *fmt.matrix(rows, cols), f"{prefix}{name}.")

    visit(fmt.kernel(arrays, 40, 100), fmt, 40, 100, "")
    assert not left


# ------------------------------------------------------------ the page


def tables():
    """The page's tables: header cells and rows of cells, without backquotes."""
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        lines = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        yield lines[0], lines[2:]


def test_correspondence_to_gguf():
    rows = next(r for h, r in tables() if h[0] == "GGUF type")
    assert {**LOSSLESS, **{name.upper(): name for name in FLOATS}} == {row[0]: row[3] for row in rows}
    for kind, block, bits, expression, native in rows:
        _, elements, nbytes = TYPES[kind]
        assert int(block) == elements
        assert float(bits) == 8 * nbytes / elements == bits_per_weight(parse_weight(expression), 64, 512)
        assert str(parse(native).weight) == expression


def test_arrays_of_the_page():
    rows = next(r for h, r in tables() if h[0] == "array")
    stated, used = {}, {}
    for name, _, types, _ in rows:
        stated.setdefault(name, set()).update(types.split(", "))
    for text in [*FLOATS, *EXPRESSIONS, *(f"uint4/g16-m({m})" for m in FLOATS)]:
        for name, field in parse_weight(text).fields(16, 32).items():
            used.setdefault(name.rpartition(".")[2], set()).add(field.dtype)
    assert stated == used


def test_layout_version_of_the_page():
    assert f"layout version {LAYOUT}" in PAGE
    assert f'"layout": {LAYOUT}' in PAGE
