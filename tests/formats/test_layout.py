"""The bytes of each format, read one element at a time as docs/formats.md says, and the tables of that page."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.checkpoints.ggml_types import LOSSLESS, TYPES, blocks
from gossamer.formats import ArraySource, Packed, allocate, bits_per_weight, encode, halves, parse, parse_weight
from gossamer.formats.node import PANEL
from gossamer.formats.numbers import FLOATS, INTEGERS
from gossamer.models.checkpoint import LAYOUT

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
EXPRESSIONS = [
    *(f"{n}/{g}*{s}" for n in INTEGERS for g, s in (("g8", "f16"), ("g32", "f32"), ("row", "bf16"))),
    *(f"{n}/{g}*{s}-m({m})" for n in ("uint4", "uint5", "uint8")
      for g, s, m in (("g8", "f32", "f16"), ("g32", "f16", "bf16"), ("row", "bf16", "f32"))),
]  # fmt: skip


def element(packed, row, col):
    """One decoded element, straight from the page: no array is reshaped, every index is computed."""
    fmt, (_, cols), a = packed.format, packed.shape, packed.arrays
    p, r = divmod(row, 16)

    def at(name, index, kind):
        return halves.to_float(a[name][index : index + 1], kind)[0]

    if not fmt.integer:
        if fmt.number == "bf16":
            return at("values", ((p * ((cols + 1) // 2) + col // 2) * 16 + r) * 2 + col % 2, "bf16")
        return at("values", (p * cols + col) * 16 + r, fmt.number)
    bits, count = fmt.number.bits, (cols + 7) // 8
    b, k = divmod(col, 8)
    h, i = divmod(k, 4)
    if bits == 8:
        code = int(a["codes"][(((p * count + b) * 2 + h) * 16 + r) * 4 + i])
    else:
        code = int(a["codes"][((p * count + b) * 16 + r) * 4 + i]) >> 4 * h & 15
    if bits == 5:
        start = ((p * count + b) * 2 + h) * 8
        code += (int.from_bytes(a["high"][start : start + 8].tobytes(), "little") >> (4 * r + i) & 1) << 4
    width = fmt.group or 8 * count
    group = p * ((cols + width - 1) // width) + col // width
    s = at("scales", group * 16 + r, fmt.scale)
    if fmt.minimum:
        return s * np.float32(code) - at("mins", group * 16 + r, fmt.minimum)
    if fmt.number.signed:
        return s * np.float32(code - (1 << bits - 1))
    zero = int(a["zeros"][group * 8 + r % 8]) >> 4 * (r // 8) & 15 if bits == 4 else int(a["zeros"][group * 16 + r])
    return s * np.float32(code - zero)


@pytest.mark.parametrize("text", [*FLOATS, *EXPRESSIONS])
def test_every_element_lies_where_the_page_says(text):
    rng = np.random.default_rng(0)
    for rows, cols in [(1, 1), (18, 21), (33, 40)]:
        packed = encode(parse_weight(text), ArraySource(rng.standard_normal((rows, cols)).astype(np.float32)))
        decoded = packed.decode()
        for row in {0, rows - 1, rows // 2, min(rows - 1, 8)}:
            for col in range(cols):
                assert decoded[row, col].tobytes() == element(packed, row, col).tobytes(), (row, col)


@st.composite
def stored(draw):
    """A format, codes, scales and offsets: anything that may be stored."""
    fmt = parse_weight(draw(st.sampled_from(EXPRESSIONS)))
    rows, cols, seed = draw(st.integers(1, 40)), draw(st.integers(1, 70)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    groups = (cols + (fmt.group or cols) - 1) // (fmt.group or cols)

    def anything(kind):
        dtype = halves.NUMPY[kind]
        return rng.integers(0, 256, (rows, groups * dtype.itemsize), np.uint8).view(dtype)

    codes = rng.integers(0, fmt.number.levels, (rows, cols)).astype(np.uint8)
    offset = None
    if fmt.minimum:
        offset = anything(fmt.minimum)
    elif not fmt.number.signed:
        offset = rng.integers(0, fmt.number.levels, (rows, groups)).astype(np.uint8)
    return fmt, codes, anything(fmt.scale), offset


@settings(max_examples=150)
@given(stored(), st.booleans())
def test_unpack_is_the_inverse_of_pack(what, in_parts):
    fmt, codes, scales, offset = what
    rows, cols = codes.shape
    arrays = allocate(fmt, rows, cols)
    cut = [0, PANEL, rows] if in_parts and rows > PANEL else [0, rows]
    for r0, r1 in pairwise(cut):
        fmt.pack_rows(codes[r0:r1], scales[r0:r1], None if offset is None else offset[r0:r1], arrays, r0)
    Packed(fmt, (rows, cols), arrays).validate("this matrix")
    panels = (rows + PANEL - 1) // PANEL
    back = fmt.unpack_rows(arrays, cols, 0, panels)
    assert np.array_equal(back[0][:rows], codes)
    assert back[1][:rows].tobytes() == scales.tobytes()
    assert (back[2] is None) == (offset is None)
    if offset is not None:
        assert back[2][:rows].tobytes() == offset.tobytes()
    # Padding means zero: the code of zero beside a zero scale.
    assert (back[0][rows:] == fmt.number.zero).all()
    assert not any(part[rows:].any() for part in back[1:] if part is not None)
    one = fmt.unpack_rows(arrays, cols, panels - 1, panels)
    assert np.array_equal(one[0], back[0][PANEL * (panels - 1) :])


# ------------------------------------------------------------ the page


def tables():
    """The page's tables: header cells and rows of cells, without backquotes."""
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        lines = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        yield lines[0], lines[2:]


def test_bits_per_weight_of_the_page():
    header, rows = next((h, r) for h, r in tables() if re.fullmatch(r"\d+ x \d+", h[-1]))
    shapes = [tuple(map(int, cell.split(" x "))) for cell in header[1:]]
    assert len(rows) >= 15
    assert {text.partition("/")[0] for text, *_ in rows} == {*FLOATS, *INTEGERS}
    right = []
    for text, *_ in rows:
        fmt = parse_weight(text)
        assert str(fmt) == text
        right.append([text, *(f"{bits_per_weight(fmt, *shape):.4f}" for shape in shapes)])
    lines = [f"| `{text}` | " + " | ".join(bits) + " |" for text, *bits in right]
    assert rows == right, "the table should read:\n" + "\n".join(lines)


def test_correspondence_to_gguf():
    rows = next(r for h, r in tables() if h[0] == "GGUF type")
    assert {**LOSSLESS, **{name.upper(): name for name in FLOATS}} == {row[0]: row[3] for row in rows}
    for kind, block, bits, expression, native in rows:
        _, elements, nbytes = TYPES[kind]
        assert int(block) == elements
        assert float(bits) == 8 * nbytes / elements == bits_per_weight(parse_weight(expression), 64, 256)
        assert str(parse(native).weight) == expression


@pytest.mark.parametrize("kind", sorted(LOSSLESS))
def test_ggml_blocks_are_held_value_for_value(kind):
    import gguf

    _, elements, nbytes = TYPES[kind]
    rng = np.random.default_rng(1)
    rows, per_row = 19, 3
    raw = rng.integers(0, 256, (rows, per_row, nbytes), np.uint8)
    heads = raw[:, :, : 4 if kind.endswith("_1") else 2].view("<f2")  # scale, minimum: any finite number
    heads[~np.isfinite(heads)] = 1
    raw = raw.reshape(rows, -1)
    fmt = parse_weight(LOSSLESS[kind])
    part = blocks(kind, raw)
    arrays = allocate(fmt, rows, per_row * elements)
    fmt.pack_rows(part.codes, part.scales, part.mins, arrays, 0)
    packed = Packed(fmt, (rows, per_row * elements), arrays)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert packed.decode().tobytes() == wanted.tobytes()


def test_arrays_of_the_page():
    rows = next(r for h, r in tables() if h[0] == "array")
    stated, used = {}, {}
    for name, _, types, _ in rows:
        stated.setdefault(name, set()).update(types.split(", "))
    for text in [*FLOATS, *EXPRESSIONS]:
        for name, field in parse_weight(text).fields(16, 32).items():
            used.setdefault(name, set()).add(field.dtype)
    assert stated == used


def test_layout_version_of_the_page():
    assert f"layout version {LAYOUT}" in PAGE
    assert f'"layout": {LAYOUT}' in PAGE
