"""Codes and scales back into the blocks they came from."""

from __future__ import annotations

import numpy as np
import pytest
from ggml_rows import sound_rows

from gossamer.checkpoints.ggml_blocks import dequantize, parts
from gossamer.checkpoints.ggml_pack import as_type, blocks, type_of
from gossamer.checkpoints.ggml_types import LOSSLESS, TYPES
from gossamer.errors import FormatError, UsageError
from gossamer.formats import ArraySource, Coded, allocate, encode, parse_weight
from gossamer.formats.coded import Parts


def _positive_zeros(kind: str, raw: np.ndarray) -> np.ndarray:
    """The rows as ``parts`` keeps them: the sign of a zero is lost in the four-bit floats."""
    at = {"MXFP4": 1, "NVFP4": 4}.get(kind)
    if at is None:
        return raw
    block = raw.reshape(-1, TYPES[kind][2]).copy()
    codes = block[:, at:]
    codes[codes & 0x0F == 0x08] &= 0xF0
    codes[codes & 0xF0 == 0x80] &= 0x0F
    if kind == "NVFP4":
        block[:, :4][block[:, :4] == 127] = 0
    return block.reshape(raw.shape)


@pytest.mark.parametrize("rows", [1, 16, 35])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_bit_comes_back(kind: str, rows: int) -> None:
    cols = 3 * 256
    raw = _positive_zeros(kind, sound_rows(kind, rows, cols, seed=rows))
    assert np.array_equal(blocks(kind, parts(kind, raw)), raw)
    # And by way of the packed arrays, whose panels are filled up.
    fmt = parse_weight(LOSSLESS[kind])
    assert isinstance(fmt, Coded)
    arrays = allocate(fmt, rows, cols)
    fmt.pack_parts(parts(kind, raw), arrays, 0)
    back = blocks(kind, fmt.unpack_parts(arrays, rows, cols, 0, -(-rows // 16)))
    assert np.array_equal(back[:rows], raw)
    assert type_of(fmt) == kind


WIDER = {
    "int4/g64": "Q4_0",
    "int4/g96": "Q4_0",
    "int4/row*f16": "Q4_0",
    "int3/g32": "Q4_0",
    "ternary/g64": "Q4_0",
    "bipolar2/g32": "Q4_0",
    "bipolar4/g64": "Q5_0",
    "uint4/g64-z(0)": "Q5_0",
    "int5/g128": "Q5_0",
    "int6/g32": "Q8_0",
    "int8/row*f16": "Q8_0",
    "uint3/g64-m(f16)": "Q4_1",
    "uint5/g64-m(f16)": "Q5_1",
}


@pytest.mark.parametrize(("expression", "kind"), WIDER.items())
def test_larger_groups_and_fewer_bits_keep_their_values(expression: str, kind: str) -> None:
    fmt = parse_weight(expression)
    assert isinstance(fmt, Coded)
    assert type_of(fmt) == kind
    w = np.random.default_rng(7).standard_normal((20, 320)).astype(np.float32)
    packed = encode(fmt, ArraySource(w))
    rows = blocks(kind, as_type(fmt, kind, fmt.unpack_parts(packed.arrays, 20, 320, 0, 2)))[:20]
    assert np.array_equal(dequantize(kind, rows.reshape(-1)).reshape(20, 320), packed.decode())


@pytest.mark.parametrize(
    "expression",
    ["int4/g48", "int4/g64*bf16", "int4/row", "uint4/g64", "uint6/g32-m(f16)", "nf4/g64", "int4/32x32*f16",
     "kmeans4/row", "int4/g32 + mask(1%: f16)", "int4/g128*(int8/row)"],
)  # fmt: skip
def test_what_no_type_holds(expression: str) -> None:
    assert type_of(parse_weight(expression)) is None


def test_what_a_block_cannot_hold_is_refused() -> None:
    codes = np.zeros((1, 64), np.uint8)
    with pytest.raises(FormatError, match="NVFP4 has no negative scales"):
        blocks("NVFP4", Parts(codes, np.full((1, 4), 200, np.uint8)))
    with pytest.raises(UsageError, match="do not divide rows of 48"):
        blocks("Q4_0", Parts(codes[:, :48], np.zeros((1, 2), np.float16)))
    with pytest.raises(UsageError, match="not made of codes"):
        blocks("F16", Parts(codes, np.zeros((1, 2), np.float16)))
