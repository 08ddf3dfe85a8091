"""The GGUF reader against the `gguf` package: metadata, tensors and every type it can decode."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from ggml_rows import SCALES_AT, random_rows, sound_rows
from gguf import GGMLQuantizationType as GGMLType

from gossamer.checkpoints.gguf import LOSSLESS, TYPES, GGUFFile, parts, row_bytes
from gossamer.errors import CheckpointError, FormatError, UnsupportedError, UsageError
from gossamer.formats import Packed, allocate, bits_per_weight, parse_weight

# Types the oldest allowed gguf package decodes; newer ones are compared where the installed one has them.
MUST_DECODE = [
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
]
KNOWN = [name for name in TYPES if name in GGMLType.__members__]
NUMBERS = {"F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


def write(
    path: Path, tensors: dict[str, tuple[np.ndarray, str]], keys: dict[str, Any] | None = None, **options: Any
) -> Path:
    """A file written by the gguf package; tensors hold raw bytes, uint8 [..., row_bytes]."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    for key, value in (keys or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_key_value(key, value[0], value[1])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def oracle(raw: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, GGMLType[kind])


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal bits; where both are NaN the payload is free."""
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    same = ours.view(np.uint32) == theirs.view(np.uint32)
    assert np.all(same | (np.isnan(ours) & np.isnan(theirs)))


def assert_file_equal(path: Path) -> None:
    """All metadata, every tensor's place and raw bytes, and the values of a sample of rows."""
    reader = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        assert file.version == reader.fields["GGUF.version"].contents()
        expected = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert list(file.metadata) == list(expected)
        for key, field in expected.items():
            value = file.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), key

        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        assert file.data_bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
        for theirs in reader.tensors:
            ours = file.tensors[theirs.name]
            assert ours.type == theirs.tensor_type.name
            assert ours.shape == tuple(int(n) for n in theirs.shape[::-1])
            assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
            raw = theirs.data.reshape(-1, theirs.data.shape[-1]).view(np.uint8)
            np.testing.assert_array_equal(file.raw(ours.name), raw)
            for row in {0, 1, len(raw) // 2, len(raw) - 1} & set(range(len(raw))):
                got = file.read(ours.name, row, row + 1)
                assert_same_bits(got.reshape(1, -1), oracle(raw[row : row + 1], ours.type))


def test_smollm2_equals_the_gguf_package(smollm2_gguf: Path) -> None:
    assert_file_equal(smollm2_gguf)


def test_gemma3_equals_the_gguf_package(gemma3_gguf: Path) -> None:
    assert_file_equal(gemma3_gguf)


def test_smollm2_facts(smollm2_gguf: Path) -> None:
    with GGUFFile(smollm2_gguf) as file:
        assert file.version == 3
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["tokenizer.ggml.tokens"][2] == "<|im_end|>"
        assert file.metadata["tokenizer.ggml.token_type"].dtype == np.int32
        assert len(file.tensors) == 272
        down = file.tensors["blk.0.ffn_down.weight"]
        assert (down.type, down.shape) == ("Q4_1", (576, 1536))
        assert file.read("output_norm.weight").shape == (576,)
        assert file.raw("output_norm.weight").shape == (1, 576 * 4)


def test_real_blocks_recompose(smollm2_gguf: Path) -> None:
    with GGUFFile(smollm2_gguf) as file:
        for name in ("blk.7.ffn_up.weight", "blk.29.attn_q.weight", "token_embd.weight"):
            kind = file.tensors[name].type
            assert_same_bits(recompose(kind, file.raw(name)[:300]), file.read(name, 0, 300))


@pytest.mark.parametrize("kind", KNOWN)
def test_type_facts(kind: str) -> None:
    type_id, elems, nbytes = TYPES[kind]
    assert type_id == int(GGMLType[kind])
    assert (elems, nbytes) == gguf.GGML_QUANT_SIZES[GGMLType[kind]]
    assert row_bytes(kind, 3 * elems) == 3 * nbytes


@pytest.mark.parametrize("kind", sorted({*KNOWN, *MUST_DECODE} - {*NUMBERS}))
def test_random_blocks_of_every_type(kind: str, tmp_path: Path) -> None:
    raw = random_rows(kind, 37, 3 * TYPES[kind][1])
    path = write(tmp_path / "t.gguf", {"w": (raw, kind)})
    with GGUFFile(path) as file:
        assert file.tensors["w"].shape == (37, 3 * TYPES[kind][1])
        np.testing.assert_array_equal(file.raw("w"), raw)
        try:
            expected = oracle(raw, kind)
        except NotImplementedError:
            assert kind not in MUST_DECODE
            with pytest.raises(UnsupportedError, match=f"'w' .*{kind}"):
                file.read("w")
            return
        assert_same_bits(file.read("w"), expected)
        for r0, r1 in ((0, 1), (5, 20), (36, 37), (37, 37), (0, 0)):
            assert_same_bits(file.read("w", r0, r1), expected[r0:r1])


@pytest.mark.parametrize(("kind", "dtype"), NUMBERS.items())
def test_plain_numbers(kind: str, dtype: str, tmp_path: Path) -> None:
    raw = random_rows(kind, 5, 7)
    with GGUFFile(write(tmp_path / "t.gguf", {"w": (raw, kind)})) as file, np.errstate(all="ignore"):
        assert_same_bits(file.read("w"), raw.view(dtype).astype(np.float32))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_by_the_gguf_package(kind: str, tmp_path: Path) -> None:
    weights = np.random.default_rng(1).normal(0, 0.02, (64, 256)).astype(np.float32)
    raw = gguf.quants.quantize(weights, GGMLType[kind])
    with GGUFFile(write(tmp_path / "t.gguf", {"w": (raw, kind)})) as file:
        assert_same_bits(file.read("w"), oracle(raw, kind))
        assert np.abs(file.read("w") - weights).max() < 0.02


def recompose(kind: str, raw: np.ndarray) -> np.ndarray:
    """The rows in the format of the type, laid out without computing anything, and decoded."""
    fmt, (rows, _) = parse_weight(LOSSLESS[kind]), raw.shape
    cols = raw.shape[1] // TYPES[kind][2] * TYPES[kind][1]
    arrays = allocate(fmt, rows, cols)
    for r0 in range(0, rows, 16):
        fmt.pack_parts(parts(kind, raw[r0 : r0 + 16]), arrays, r0)
    packed = Packed(fmt, (rows, cols), arrays)
    packed.validate(kind)
    return packed.decode()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_parts_of_blocks_are_lossless(kind: str) -> None:
    if kind not in GGMLType.__members__:
        assert kind not in MUST_DECODE
        pytest.skip(f"the installed gguf package does not know {kind}")
    raw = sound_rows(kind, 19, 5 * TYPES[kind][1])
    if kind not in ("MXFP4", "NVFP4"):
        raw[0, :4] = raw[0, -4:] = 0  # zero scales (and minima): signed zeros must survive
    assert_same_bits(recompose(kind, raw), oracle(raw, kind))
    found = parts(kind, raw)
    bits = parse_weight(LOSSLESS[kind]).number.bits
    assert found.codes.shape == (19, 5 * TYPES[kind][1])
    assert 2 ** (bits - 1) < found.codes.max() < 2**bits
    # At the size of the file, where rows fill whole blocks of the layout.
    rows = 16 * TYPES[kind][1]
    assert bits_per_weight(parse_weight(LOSSLESS[kind]), 64, rows) == 8 * TYPES[kind][2] / TYPES[kind][1]


@pytest.mark.parametrize("kind", sorted(set(LOSSLESS) - {"NVFP4"}))
def test_scales_that_are_not_numbers(kind: str) -> None:
    for at in SCALES_AT.get(kind, (0,)):
        raw = sound_rows(kind, 3, TYPES[kind][1])
        if kind == "MXFP4":
            raw[1, 0] = 255
        else:
            raw[1, at : at + 2] = np.array([np.inf], "<f2").view(np.uint8)
        with pytest.raises(FormatError, match="infinity among its scales"):
            parts(kind, raw)


def test_scales_with_a_sign() -> None:
    raw = sound_rows("NVFP4", 3, 64)
    raw[2, 3] = 200
    with pytest.raises(FormatError, match="with a sign"):
        parts("NVFP4", raw)


def test_the_order_of_elements() -> None:
    raw = np.zeros((1, 18), np.uint8)
    raw[0, :2] = np.array([1.0], "<f2").view(np.uint8)
    raw[0, 2:] = np.arange(16) | (np.arange(15, -1, -1) << 4)
    np.testing.assert_array_equal(parts("Q4_0", raw).codes[0], [*range(16), *range(15, -1, -1)])


@pytest.mark.parametrize("kind", ["F32", "IQ4_XS", "Q9_9"])
def test_parts_of_other_types(kind: str) -> None:
    with pytest.raises(UsageError, match=kind):
        parts(kind, np.zeros((1, 144), np.uint8))


def test_parts_of_partial_rows() -> None:
    with pytest.raises(UsageError, match="18 bytes"):
        parts("Q4_0", np.zeros((2, 20), np.uint8))


def test_row_bytes_errors() -> None:
    with pytest.raises(CheckpointError, match="multiple of 256"):
        row_bytes("Q4_K", 128)
    with pytest.raises(UnsupportedError, match="Q9_9"):
        row_bytes("Q9_9", 128)


def test_metadata_of_every_kind(tmp_path: Path) -> None:
    kind = gguf.GGUFValueType
    keys: dict[str, Any] = {
        "a.u8": (200, kind.UINT8),
        "a.i8": (-100, kind.INT8),
        "a.u16": (60000, kind.UINT16),
        "a.i16": (-30000, kind.INT16),
        "a.u32": (2**32 - 1, kind.UINT32),
        "a.i32": (-(2**31), kind.INT32),
        "a.u64": (2**64 - 1, kind.UINT64),
        "a.i64": (-(2**63), kind.INT64),
        "a.f32": (0.5, kind.FLOAT32),
        "a.f64": (0.1, kind.FLOAT64),
        "a.yes": (True, kind.BOOL),
        "a.text": "snow ☃",
        "a.texts": ["", "a", "☃☃"],
        "a.ints": [1, -2, 3],
        "a.floats": [0.5, -1.25],
        "a.bools": [True, False],
    }
    raw = random_rows("F32", 2, 3)
    with GGUFFile(write(tmp_path / "t.gguf", {"w": (raw, "F32")}, keys)) as file:
        for key, value in keys.items():
            got = file.metadata[key]
            if isinstance(got, np.ndarray):
                assert got.tolist() == value
            else:
                expected = value[0] if isinstance(value, tuple) else value
                assert got == expected
                assert type(got) is type(expected)
        assert file.metadata["a.bools"].dtype == np.bool_
    assert_file_equal(tmp_path / "t.gguf")


def test_nested_arrays(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"a.nested": [[1, 2], [3]], "a.texts": [["x"], ["y", "z"]]}
    path = write(tmp_path / "t.gguf", {"w": (random_rows("F32", 2, 3), "F32")}, keys)
    with GGUFFile(path) as file:
        assert [part.tolist() for part in file.metadata["a.nested"]] == keys["a.nested"]
        assert file.metadata["a.texts"] == keys["a.texts"]


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_alignment_and_version_2(alignment: int, tmp_path: Path) -> None:
    tensors = {f"t{n}": (sound_rows("Q8_0", n, 64, n), "Q8_0") for n in (1, 3)}
    path = tmp_path / "t.gguf"
    key = struct.pack("<Q17sII", 17, b"general.alignment", 4, alignment)
    infos, data = b"", b""
    for name, (raw, _) in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        infos += struct.pack("<Q2sIQQIQ", 2, name.encode(), 2, 64, len(raw), 8, len(data))
        data += raw.tobytes()
    header = struct.pack("<4sIQQ", b"GGUF", 2, 2, 1) + key + infos
    path.write_bytes(header + b"\0" * (-len(header) % alignment) + data)
    with GGUFFile(path) as file:
        assert file.version == 2
        for name, (raw, kind) in tensors.items():
            assert_same_bits(file.read(name), oracle(raw, kind))


def test_three_dimensions_flatten_to_rows(tmp_path: Path) -> None:
    raw = sound_rows("Q5_1", 6, 64)
    with GGUFFile(write(tmp_path / "t.gguf", {"w": (raw.reshape(2, 3, -1), "Q5_1")})) as file:
        assert file.tensors["w"].shape == (2, 3, 64)
        np.testing.assert_array_equal(file.raw("w"), raw)
        assert_same_bits(file.read("w", 2, 5), oracle(raw, "Q5_1")[2:5])


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "F32", "BF16"])
def test_reading_uses_little_beside_the_result(kind: str, tmp_path: Path) -> None:
    raw = np.zeros((1024, row_bytes(kind, 4096)), np.uint8)
    path = write(tmp_path / "t.gguf", {"w": (raw, kind)})
    with GGUFFile(path) as file:
        file.read("w", 0, 1)  # imports what is imported lazily
        tracemalloc.start()
        try:
            result = file.read("w")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak - result.nbytes < 12e6


def test_raw_is_a_view_that_outlives_close(tmp_path: Path) -> None:
    raw = random_rows("Q4_0", 3, 64)
    with GGUFFile(write(tmp_path / "t.gguf", {"w": (raw, "Q4_0")})) as file:
        view = file.raw("w")
        assert not view.flags.owndata
        assert not view.flags.writeable
    np.testing.assert_array_equal(view, raw)
    with pytest.raises(UsageError, match="closed"):
        file.read("w")
    file.close()


@pytest.mark.parametrize(("r0", "r1"), [(-1, 2), (2, 1), (0, 4), (4, None)])
def test_rows_that_do_not_exist(r0: int, r1: int | None, tmp_path: Path) -> None:
    path = write(tmp_path / "t.gguf", {"w": (random_rows("F16", 3, 8), "F16")})
    with GGUFFile(path) as file, pytest.raises(UsageError, match=r"'w' has rows 0\.\.3"):
        file.read("w", r0, r1)


def test_a_tensor_that_does_not_exist(tmp_path: Path) -> None:
    path = write(tmp_path / "t.gguf", {"w": (random_rows("F16", 3, 8), "F16")})
    with GGUFFile(path) as file, pytest.raises(UsageError, match=r"t\.gguf holds no tensor 'v'"):
        file.raw("v")
