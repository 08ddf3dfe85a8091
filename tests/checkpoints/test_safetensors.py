"""safetensors files: agreement with the safetensors package both ways, and what damage does."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.checkpoints.safetensors import DTYPES, SafetensorsFile
from gossamer.checkpoints.safetensors_writer import SafetensorsWriter
from gossamer.errors import CheckpointError, GossamerError, ResourceError, UnsupportedError, UsageError

TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}


def pack(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def stored_bits(dtype: str) -> np.ndarray[Any, Any]:
    """Every code of the 8-bit types, and random bits of the others: infinities, NaNs, subnormals."""
    if dtype == "BOOL":
        return np.arange(64).reshape(16, 4) % 3 == 0
    size = DTYPES[dtype].itemsize
    codes = np.arange(256) if size == 1 else np.random.default_rng(size).integers(0, 256, 4096 * size)
    return codes.astype(np.uint8).view(DTYPES[dtype]).reshape(32, -1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_the_package_writes_and_writes_what_it_reads(dtype: str, tmp_path: Path) -> None:
    bits = stored_bits(dtype)
    tensor = torch.from_numpy(bits.view(np.uint8)).view(TORCH[dtype]).reshape(bits.shape)
    safetensors.torch.save_file({"x": tensor, "s": tensor[3, 2].clone()}, tmp_path / "theirs", {"k": "v"})
    theirs = SafetensorsFile(tmp_path / "theirs")
    assert theirs.metadata == {"k": "v"}
    assert theirs.tensors["x"].dtype == dtype
    assert theirs.tensors["x"].shape == bits.shape
    assert theirs.tensors["s"].shape == ()
    assert theirs.raw("x").tobytes() == bits.tobytes()

    expected = tensor.to(torch.float32).numpy()
    np.testing.assert_array_equal(theirs.read("x"), expected)
    np.testing.assert_array_equal(theirs.read("x", 3, 9), expected[3:9])
    np.testing.assert_array_equal(theirs.read("s"), expected[3, 2])
    assert theirs.read("x").dtype == np.float32
    assert theirs.read("s").shape == ()

    with SafetensorsWriter(tmp_path / "ours", [("x", dtype, bits.shape)], {"k": "v"}) as writer:
        writer.write("x", bits)
    back = safetensors.torch.load_file(tmp_path / "ours")["x"]
    assert back.dtype == TORCH[dtype]
    assert back.contiguous().view(torch.uint8).numpy().tobytes() == bits.tobytes()
    with safetensors.safe_open(tmp_path / "ours", framework="pt") as file:
        assert file.metadata() == {"k": "v"}


def test_reading_does_not_touch_what_was_read(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    safetensors.numpy.save_file({"x": values}, tmp_path / "f")
    file = SafetensorsFile(tmp_path / "f")
    read, raw = file.read("x"), file.raw("x")
    read += 1
    np.testing.assert_array_equal(file.raw("x"), values)
    assert not raw.flags.writeable
    del file
    np.testing.assert_array_equal(raw, values)  # a view keeps the map alive


def test_large_tensors_read_right_after_their_pages_left(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3000, 1000), dtype=np.float32)
    safetensors.numpy.save_file({"a": values[:7], "x": values}, tmp_path / "f")
    file = SafetensorsFile(tmp_path / "f")
    raw = file.raw("x")
    for r0 in range(0, 3000, 700):
        np.testing.assert_array_equal(file.read("x", r0, min(r0 + 700, 3000)), values[r0 : r0 + 700])
    np.testing.assert_array_equal(raw, values)


def test_order_alignment_and_pieces(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    a = rng.integers(0, 255, (5, 64), np.uint8)
    b = rng.standard_normal((7, 16), np.float32)
    z = np.zeros((0, 3), np.float32)
    specs = [("z last", "U8", a.shape), ("empty", "F32", z.shape), ("a first", "F32", b.shape)]
    with SafetensorsWriter(tmp_path / "f", specs) as writer:
        writer.write_at("a first", 16 * 3, b[3:])
        writer.write("z last", a)
        writer.write_at("a first", 0, b[:3])
    file = SafetensorsFile(tmp_path / "f")
    assert list(file.tensors) == ["z last", "empty", "a first"]
    assert file.tensors["z last"].offset % 64 == 0
    assert file.tensors["a first"].offset == file.tensors["z last"].offset + a.nbytes
    assert file.data_bytes == a.nbytes + b.nbytes
    assert file.data_bytes + file.tensors["z last"].offset == (tmp_path / "f").stat().st_size
    theirs = safetensors.numpy.load_file(tmp_path / "f")
    for name, value in (("z last", a), ("a first", b), ("empty", z)):
        np.testing.assert_array_equal(file.raw(name), value)
        np.testing.assert_array_equal(theirs[name], value)
    assert file.read("empty").shape == (0, 3)


def test_a_transposed_array_is_written_in_row_order(tmp_path: Path) -> None:
    value = np.arange(12, dtype=np.float32).reshape(3, 4).T
    with SafetensorsWriter(tmp_path / "f", [("x", "F32", (4, 3))]) as writer:
        writer.write("x", value)
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "f")["x"], value)


@given(cuts=st.lists(st.integers(0, 40), max_size=8), seed=st.randoms(use_true_random=False))
def test_pieces_in_any_order_make_the_whole(cuts: list[int], seed: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("pieces") / "f"
    value = np.arange(40, dtype=np.int32)
    edges = sorted({0, 40, *cuts})
    pieces = list(pairwise(edges))
    seed.shuffle(pieces)
    with SafetensorsWriter(path, [("x", "I32", (5, 8))]) as writer:
        for start, stop in pieces[:-1]:
            writer.write_at("x", start, value[start:stop])
        with pytest.raises(UsageError, match="not complete"):
            writer.close()
        writer.write_at("x", pieces[-1][0], value[slice(*pieces[-1])])
    np.testing.assert_array_equal(SafetensorsFile(path).raw("x").ravel(), value)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "f", [], {"only": "this"}):
        pass
    file = SafetensorsFile(tmp_path / "f")
    assert (file.tensors, file.metadata, file.data_bytes) == ({}, {"only": "this"}, 0)
    assert safetensors.numpy.load_file(tmp_path / "f") == {}


def test_writer_refuses(tmp_path: Path) -> None:
    path = tmp_path / "f"
    writer = SafetensorsWriter(path, [("x", "F32", (2, 3)), ("y", "BF16", (4,))])
    good = np.zeros((2, 3), np.float32)
    with pytest.raises(UsageError, match="takes float32 arrays, not float64"):
        writer.write("x", good.astype(np.float64))
    with pytest.raises(UsageError, match=r"shape \(2, 3\), not \(3, 2\)"):
        writer.write("x", good.T)
    with pytest.raises(UsageError, match="no tensor 'q' was announced"):
        writer.write("q", good)
    with pytest.raises(UsageError, match="outside"):
        writer.write_at("x", 1, good)
    with pytest.raises(UsageError, match="outside"):
        writer.write_at("x", -1, good[:1])
    writer.write("x", good)
    with pytest.raises(UsageError, match="written twice"):
        writer.write_at("x", 5, good.ravel()[:1])
    with pytest.raises(UsageError, match="0 of 4 elements of tensor 'y'"):
        writer.close()
    writer.abort()
    assert not path.exists()
    with pytest.raises(UsageError, match="closed"):
        writer.write("y", np.zeros(4, np.uint16))
    for specs in (
        [("x", "F33", (1,))],
        [("x", "F32", (-1,))],
        [("x", "F32", (1,))] * 2,
        [("\ud800", "U8", ())],
    ):
        with pytest.raises(UsageError):
            SafetensorsWriter(path, specs)
    assert not path.exists()


def test_an_error_inside_the_block_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), SafetensorsWriter(tmp_path / "f", [("x", "U8", (4,))]):
        raise ZeroDivisionError
    with (
        pytest.raises(UsageError, match="not complete"),
        SafetensorsWriter(tmp_path / "f", [("x", "U8", (4,))]),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_full_disk() -> None:
    with pytest.raises(ResourceError, match="/dev/full cannot be written: the disk is full; free some space"):
        SafetensorsWriter("/dev/full", [("x", "U8", (4,))])
    assert os.path.exists("/dev/full")


def test_a_file_larger_than_the_disk_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="free some space or choose another place"):
        SafetensorsWriter(tmp_path / "f", [("x", "U8", (2**59,))])
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (
        tmp_path / "file" / "f",
        tmp_path / "missing" / "f",
        tmp_path,
        tmp_path / ("n" * 300),
        "a\0b",
    ):
        with pytest.raises(ResourceError, match="cannot be written"):
            SafetensorsWriter(path, [])


TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "short": (b"\1\0\0", "3 bytes"),
    "huge header": (struct.pack("<Q", 2**64 - 1) + b"{}", "claims a header of 18446744073709551615 bytes"),
    "header past the end": (struct.pack("<Q", 3) + b"{}", "claims a header of 3 bytes where 2"),
    "no header": (pack(b""), "does not begin"),
    "space first": (pack(b" {}"), "does not begin"),
    "an array": (pack(b"[]"), "does not begin"),
    "not UTF-8": (pack(b'{"\xff":1}'), "not UTF-8"),
    "not JSON": (pack(b'{"a":}'), "not sound JSON"),
    "two objects": (pack(b"{}{}"), "not sound JSON"),
    "infinity": (pack(b'{"a":Infinity}'), "Infinity is not JSON"),
    "long number": (pack(b'{"a":' + b"9" * 5000 + b"}"), "thousands of digits"),
    "deep": (pack(b'{"a":' + b"[" * 100_000), "nests too deeply"),
    "same name twice": (pack(b'{"a":{},"a":{}}'), "'a' appears twice"),
    "same key twice": (pack(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "'dtype' appears twice"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "table of strings"),
    "metadata as text": (pack({"__metadata__": "a"}), "table of strings"),
    "no description": (pack({"a": 1}), "'a' is not described"),
    "extra key": (pack({"a": entry() | {"more": 1}}, bytes(8)), "'a' is not described"),
    "dtype is a number": (pack({"a": entry() | {"dtype": 3}}, bytes(8)), "3 for a dtype"),
    "negative shape": (pack({"a": entry(shape=(-2,))}, bytes(8)), r"\[-2\] for a shape"),
    "bool shape": (pack({"a": entry("U8", (True,), (0, 1))}, bytes(1)), r"\[True\] for a shape"),
    "float shape": (pack({"a": entry(shape=(2.0,))}, bytes(8)), r"\[2.0\] for a shape"),
    "shape of shapes": (pack({"a": entry(shape=((2,),))}, bytes(8)), "for a shape"),
    "rank 33": (pack({"a": entry("U8", (1,) * 33, (0, 1))}, bytes(1)), "for a shape"),
    "huge product": (pack({"a": entry(shape=(2**40, 2**40))}, bytes(8)), "impossible shape"),
    "wraps to zero": (pack({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}), "impossible shape"),
    "empty and huge": (pack({"a": entry(shape=(0, 2**62), offsets=(0, 0))}), "impossible shape"),
    "huge digits": (pack({"a": entry(shape=(10**4000,) * 30, offsets=(0, 0))}), "impossible shape"),
    "three offsets": (pack({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "for data_offsets"),
    "backwards": (pack({"a": entry(offsets=(8, 0))}, bytes(8)), "should lie at bytes 8 to 0"),
    "past the end": (pack({"a": entry()}, bytes(7)), "should lie at bytes 0 to 8 of the data, which has 7"),
    "wrong size": (pack({"a": entry(shape=(3,))}, bytes(8)), "needs 12 bytes and has 8"),
    "hole": (pack({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "'b' leaves a hole"),
    "hole at the start": (pack({"a": entry(offsets=(4, 12))}, bytes(12)), "'a' leaves a hole"),
    "overlap": (pack({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "'b' overlaps"),
    "same place": (pack({"a": entry(), "b": entry()}, bytes(8)), "'b' overlaps"),
    "trailing bytes": (pack(TWO, bytes(17)), "1 bytes after its last tensor"),
    "long name": (pack({"n" * 10_000: 1}), r"tensor 'n+\.\.\. is not described"),
    "name that is not text": (pack(b'{"\\ud800\\n":1}'), r"'\\ud800\\n' is not described"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_file(case: str, tmp_path: Path) -> None:
    data, message = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < len(str(path)) + 400


def test_unsupported_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(pack({"a": entry("C64", (1,), (0, 8))}, bytes(8)))
    with pytest.raises(UnsupportedError, match=r"tensor 'a' has type 'C64'.*convert"):
        SafetensorsFile(tmp_path / "f")


def test_files_that_are_not_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe", tmp_path / "pipe" / "f", "a\0b"):
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)


def test_wrong_questions(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros((2, 3), np.float32), "s": np.zeros((), np.float32)}, tmp_path / "f")
    file = SafetensorsFile(tmp_path / "f")
    with pytest.raises(CheckpointError, match="holds no tensor 'b' among its 2"):
        file.raw("b")
    for rows in ((0, 3), (-1, 1), (2, 1), (3, None)):
        with pytest.raises(UsageError, match="do not exist"):
            file.read("a", *rows)
    with pytest.raises(UsageError, match="one number"):
        file.read("s", 0, 1)


@pytest.fixture(scope="module")
def real_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file as the package writes it: several types, a scalar, an empty tensor, metadata."""
    tensors = {
        "model.embed_tokens.weight": torch.randn(6, 8).to(torch.bfloat16),
        "model.layers.0.mlp.up_proj.weight": torch.randn(4, 8),
        "model.norm.weight": torch.ones(8, dtype=torch.float16),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }
    return safetensors.torch.save(tensors, {"format": "pt"})


def consume(path: Path) -> bool:
    """Open and read everything. False when the file was refused; any other exception is a failure."""
    try:
        file = SafetensorsFile(path)
        for name, info in file.tensors.items():
            assert file.raw(name).nbytes == info.nbytes
            assert file.read(name).shape == info.shape
    except GossamerError:
        return False
    return True


def test_cut_at_every_byte(real_file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    for length in range(len(real_file)):
        path.write_bytes(real_file[:length])
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
    path.write_bytes(real_file)
    assert consume(path)


def test_every_header_byte_replaced(real_file: bytes, tmp_path: Path) -> None:
    """Refused, or read as the package reads it; and never more memory than the file explains."""
    path = tmp_path / "changed"
    header_end = 8 + struct.unpack("<Q", real_file[:8])[0]
    tracemalloc.start()
    try:
        for at in range(header_end):
            for value in {0, 0xFF, ord("9"), ord('"'), ord(","), ord("["), real_file[at] ^ 1}:
                changed = bytearray(real_file)
                changed[at] = value
                path.write_bytes(changed)
                tracemalloc.reset_peak()
                ours = consume(path)
                assert tracemalloc.get_traced_memory()[1] < 2 << 20
                try:
                    safetensors.torch.load(bytes(changed))
                    theirs = True
                except (safetensors.SafetensorError, KeyError):
                    theirs = False
                # The package admits what we do not hold (other types, other keys), never the reverse.
                assert theirs or not ours
    finally:
        tracemalloc.stop()


numbers = st.integers(-3, 70) | st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, True, None])
values = numbers | st.text(max_size=3) | st.lists(numbers, max_size=4) | st.sampled_from([*DTYPES, "F4", "C64"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(data=st.data())
def test_changed_header_fields(data: st.DataObject, real_file: bytes, tmp_path: Path) -> None:
    header_end = 8 + struct.unpack("<Q", real_file[:8])[0]
    header: dict[str, Any] = json.loads(real_file[8:header_end])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        if data.draw(st.booleans()) and isinstance(header[name], dict):
            header[name] = header[name] | {
                data.draw(st.sampled_from(["dtype", "shape", "data_offsets"])): data.draw(values)
            }
        else:
            header[name] = data.draw(values)
    path = tmp_path / "changed"
    path.write_bytes(pack(header, real_file[header_end:]))
    tracemalloc.start()
    try:
        consume(path)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "random"
    for content in (data, pack(data), pack(b"{" + data)):
        path.write_bytes(content)
        consume(path)


# ---------------------------------------------------------------- lengths that are known late


def test_open_lengths_are_those_of_what_is_written(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype="<f4").reshape(2, 3),
        "b": np.arange(1000, dtype="<u2"),
        "c": np.arange(4, dtype="u1"),
        "d": np.zeros(0, "<u4"),
        "e": np.arange(3, dtype="<u4"),
    }
    kinds = {"f4": "F32", "u2": "U16", "u1": "U8", "u4": "U32"}
    specs = [(n, kinds[a.dtype.str[1:]], a.shape if n in "ac" else (7,)) for n, a in arrays.items()]
    with SafetensorsWriter(tmp_path / "f", specs, {"k": "v"}, 64, {"b", "d", "e"}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    assert writer.data_bytes == sum(a.nbytes for a in arrays.values())
    for opened in (safetensors.numpy.load_file(tmp_path / "f"), None):
        for name, array in arrays.items():
            got = opened[name] if opened is not None else SafetensorsFile(tmp_path / "f").raw(name)
            assert got.dtype == array.dtype
            np.testing.assert_array_equal(got, array)
    file = SafetensorsFile(tmp_path / "f")
    assert (list(file.tensors), file.metadata, file.data_bytes) == (list(arrays), {"k": "v"}, writer.data_bytes)
    assert file.tensors["a"].offset % 64 == 0


def test_open_lengths_need_the_order_of_the_file(tmp_path: Path) -> None:
    specs = [("a", "U8", (4,)), ("b", "U8", (4,)), ("c", "U8", (2,))]
    four = np.zeros(4, np.uint8)
    with SafetensorsWriter(tmp_path / "f", specs, open={"b"}) as writer:
        with pytest.raises(UsageError, match="'b' is written out of order; tensor 'a' is next"):
            writer.write("b", four)
        with pytest.raises(UsageError, match="whole"):
            writer.write_at("a", 0, four)
        writer.write("a", four)
        with pytest.raises(UsageError, match="shape"):
            writer.write("b", four[None])
        with pytest.raises(UsageError, match="takes uint8 arrays"):
            writer.write("b", four.astype(np.float32))
        writer.write("b", np.ones(77, np.uint8))
        with pytest.raises(UsageError, match="not complete"):
            writer.close()
        with pytest.raises(UsageError, match="shape"):
            writer.write("c", four)
        writer.write("c", four[:2])
        with pytest.raises(UsageError):
            writer.write("c", four[:2])
    assert SafetensorsFile(tmp_path / "f").raw("b").sum() == 77
    with pytest.raises(UsageError, match="only a length"):
        SafetensorsWriter(tmp_path / "g", [("a", "U8", (4, 4))], open={"a"})
    assert not (tmp_path / "g").exists()


def test_an_unfinished_file_of_open_lengths_goes(tmp_path: Path) -> None:
    def fail() -> None:
        with SafetensorsWriter(tmp_path / "f", [("a", "U8", (4,)), ("b", "U8", (4,))], open={"a"}) as writer:
            writer.write("a", np.zeros(9, np.uint8))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not (tmp_path / "f").exists()
