"""Damaged and hostile GGUF files: one sentence, no other exception, bounded memory."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.checkpoints.gguf import TYPES, GGUFFile
from gossamer.errors import CheckpointError, GossamerError, UnsupportedError

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def string(text: str | bytes, length: int | None = None) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data) if length is None else length) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(
    name: str = "w", dims: tuple[int, ...] = (8, 2), kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    """A tensor's entry; dims in file order, F32 unless stated."""
    count = len(dims) if n_dims is None else n_dims
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def gguf_bytes(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = bytes(64),
    n_keys: int | None = None,
    n_tensors: int | None = None,
    version: int = 3,
    magic: bytes = b"GGUF",
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + elements


def nested(depth: int) -> bytes:
    return array(ARRAY, 1) * (depth - 1) + array(U8, 1, b"\1")


def test_the_builder_makes_a_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    data = np.arange(32, dtype="<f4").tobytes()
    keys = (key("a", ARRAY, nested(4)), key("b", BOOL, b"\1"))
    path.write_bytes(gguf_bytes(keys, (tensor(), tensor("v", (16,), offset=64)), data))
    with GGUFFile(path) as file:
        assert file.metadata["a"][0][0][0].tolist() == [1]
        assert file.metadata["b"] is True
        np.testing.assert_array_equal(file.read("w"), np.arange(16, dtype=np.float32).reshape(2, 8))
        np.testing.assert_array_equal(file.read("v"), np.arange(16, 32, dtype=np.float32))


HUGE = 2**60
DAMAGED: dict[str, tuple[bytes, str]] = {
    "magic": (gguf_bytes(magic=b"GGML"), "does not begin with the letters GGUF"),
    "three bytes": (b"GGU", "does not begin with the letters GGUF"),
    "magic only": (b"GGUF", "the header is where the file ends"),
    "tensor count": (gguf_bytes(n_tensors=HUGE), f"asks for {HUGE} tensors"),
    "key count": (gguf_bytes(n_keys=2**64 - 1), f"asks for {2**64 - 1} keys"),
    "key count by one": (
        gguf_bytes((key("a", U8, b"\1"),), data=b"", n_keys=2),
        "key 2 of 2 has an empty name",
    ),
    "empty key": (gguf_bytes((key("", U8, b"\1"),)), "metadata key 1 of 1 has an empty name"),
    "key length": (
        gguf_bytes((string("a", HUGE) + bytes(32),)),
        f"metadata key 1 of 1 asks for {HUGE} bytes of text",
    ),
    "value length": (
        gguf_bytes((key("a.b", STRING, string("x", HUGE)),)),
        f"key 'a.b' asks for {HUGE} bytes",
    ),
    "strings": (gguf_bytes((key("a.b", ARRAY, array(STRING, HUGE)),)), f"'a.b' asks for {HUGE} strings"),
    "a string of an array": (
        gguf_bytes((key("a.b", ARRAY, array(STRING, 2, string("x") + string("y", HUGE))),)),
        f"'a.b' asks for {HUGE} bytes of text",
    ),
    "numbers": (gguf_bytes((key("a.b", ARRAY, array(U64, HUGE)),)), f"'a.b' asks for {HUGE} numbers"),
    "arrays": (gguf_bytes((key("a.b", ARRAY, array(ARRAY, HUGE)),)), f"'a.b' asks for {HUGE} arrays"),
    "nesting": (gguf_bytes((key("a.b", ARRAY, nested(5)),)), "'a.b' nests arrays more than 4 deep"),
    "deep nesting": (gguf_bytes((key("a.b", ARRAY, nested(5000)),)), "nests arrays more than 4 deep"),
    "value type": (gguf_bytes((key("a.b", 13, bytes(8)),)), "'a.b' has the value type 13"),
    "element type": (gguf_bytes((key("a.b", ARRAY, array(99, 0)),)), "'a.b' has the value type 99"),
    "truth": (gguf_bytes((key("a.b", BOOL, b"\2"),)), "'a.b' is a truth value stored as 2"),
    "truths": (gguf_bytes((key("a.b", ARRAY, array(BOOL, 2, b"\1\7")),)), "truth value stored as 7"),
    "duplicate key": (gguf_bytes((key("a", U8, b"\1"), key("a", U8, b"\2"))), "key 'a' appears twice"),
    "key not UTF-8": (
        gguf_bytes((key(b"\xff\xfe", U8, b"\1"),)),
        "metadata key 1 of 1 holds text that is not",
    ),
    "value not UTF-8": (
        gguf_bytes((key("a.b", STRING, string(b"\xff")),)),
        "'a.b' holds text that is not UTF-8",
    ),
    "alignment 0": (
        gguf_bytes((key("general.alignment", U32, bytes(4)),)),
        "alignment' is 0, and must be a power",
    ),
    "alignment 24": (
        gguf_bytes((key("general.alignment", U32, b"\x18\0\0\0"),)),
        "is 24, and must be a power",
    ),
    "alignment text": (
        gguf_bytes((key("general.alignment", STRING, string("32")),)),
        "must be a power of two",
    ),
    "alignment float": (gguf_bytes((key("general.alignment", F32, bytes(4)),)), "must be a power of two"),
    "alignment huge": (
        gguf_bytes((key("general.alignment", U32, struct.pack("<I", 2**31)),), (tensor(),)),
        f"'w' ends at byte {2**31 + 64}",
    ),
    "tensor count by one": (gguf_bytes(tensors=(tensor(),), n_tensors=2), "tensor 2 of 2 has an empty name"),
    "tensor name": (gguf_bytes(tensors=(string("w", HUGE) + bytes(32),)), "tensor 1 of 1 asks for"),
    "duplicate tensor": (
        gguf_bytes(tensors=(tensor(), tensor(offset=64)), data=bytes(128)),
        "'w' appears twice",
    ),
    "no dimensions": (gguf_bytes(tensors=(tensor(dims=(), n_dims=0),)), "'w' has 0 dimensions"),
    "five dimensions": (gguf_bytes(tensors=(tensor(dims=(1,) * 5),)), "'w' has 5 dimensions"),
    "2^32 - 1 dimensions": (
        gguf_bytes(tensors=(tensor(n_dims=2**32 - 1),)),
        f"'w' has {2**32 - 1} dimensions",
    ),
    "an empty dimension": (gguf_bytes(tensors=(tensor(dims=(HUGE, 0)),)), "'w' has the shape .* no elements"),
    "overflowing to 0": (
        gguf_bytes(tensors=(tensor(dims=(2**32, 2**32)),)),
        "'w' ends at byte 73786976294838206",
    ),
    "overflowing to 16": (gguf_bytes(tensors=(tensor(dims=(2**60 + 1, 16)),)), "'w' ends at byte"),
    "part of a block": (
        gguf_bytes(tensors=(tensor(dims=(48, 2), kind=2),)),
        "'w' is Q4_0 with rows of 48 elements",
    ),
    "part of a super-block": (
        gguf_bytes(tensors=(tensor(dims=(128, 2), kind=12),)),
        "'w' is Q4_K with rows of 128",
    ),
    "misaligned": (
        gguf_bytes(tensors=(tensor(offset=16),), data=bytes(128)),
        "'w' begins at offset 16, not a",
    ),
    "beyond the end": (
        gguf_bytes(tensors=(tensor(offset=32),)),
        r"'w' ends at byte 192, and the file has only 160",
    ),
    "offset overflow": (
        gguf_bytes(tensors=(tensor(offset=2**64 - 32),)),
        "'w' ends at byte 18446744073709551",
    ),
    "overlap": (
        gguf_bytes(tensors=(tensor("v", offset=32), tensor("w")), data=bytes(128)),
        "'v' overlaps the tensor 'w'",
    ),
    "inside another": (
        gguf_bytes(tensors=(tensor("w"), tensor("v", (1,), offset=32))),
        "'v' overlaps the tensor 'w'",
    ),
}
UNSUPPORTED: dict[str, tuple[bytes, str]] = {
    "version 1": (gguf_bytes(version=1), "is GGUF version 1, and only"),
    "version 0": (gguf_bytes(version=0), "is GGUF version 0, and only"),
    "version 4": (gguf_bytes(version=4), "is GGUF version 4, and only"),
    "big-endian": (gguf_bytes(version=3 << 24), "is GGUF in big-endian byte order"),
    "tensor type": (gguf_bytes(tensors=(tensor(kind=4),)), "'w' has the type number 4, which is not known"),
    "tensor type 2^32 - 1": (
        gguf_bytes(tensors=(tensor(kind=2**32 - 1),)),
        "'w' has the type number 4294967295",
    ),
}


def peak_of_refusal(path: Path, error: type[GossamerError], match: str) -> int:
    """Peak bytes while opening fails with a one-sentence error of exactly this class that names the file."""
    tracemalloc.start()
    try:
        with pytest.raises(error, match=match) as caught:
            GGUFFile(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.type is error
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 400 + len(str(path))
    return peak


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(name: str, tmp_path: Path) -> None:
    content, match = DAMAGED[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert peak_of_refusal(path, CheckpointError, match) < 1e6


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name: str, tmp_path: Path) -> None:
    content, match = UNSUPPORTED[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert peak_of_refusal(path, UnsupportedError, match) < 1e6


def test_names_are_shown_short_and_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_bytes((key("line\nline" * 5000, 99, b""),)))
    peak_of_refusal(path, CheckpointError, r"'line\\nline")


def test_a_header_without_end(tmp_path: Path) -> None:
    """A sparse file may really hold gigabytes of zeros: the header has a limit of its own."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_bytes((key("a.b", ARRAY, array(U8, 2**40)),)))
    os.truncate(path, 2**40 + 4096)
    assert peak_of_refusal(path, UnsupportedError, "'a.b' takes the header past the 256 MiB") < 1e6


def test_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, match in (
        (tmp_path, "is a directory"),
        (tmp_path / "missing.gguf", "does not exist"),
        (tmp_path / "empty.gguf", "is empty"),
        (tmp_path / "empty.gguf" / "inner.gguf", "cannot be opened"),
        (tmp_path / "pipe.gguf", "is not a regular file"),
        (tmp_path / ("x" * 300), "cannot be opened"),
    ):
        peak_of_refusal(path, CheckpointError, match)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        GGUFFile("nul\0.gguf")


@pytest.fixture(scope="module")
def real_header(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The real file cut down to about 20 KB: all its keys, lists of 120, a few tensors of 4 rows."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    with GGUFFile(smollm2_gguf) as file:
        writer = gguf.GGUFWriter(path, file.metadata["general.architecture"])
        reader = gguf.GGUFReader(smollm2_gguf)
        for name, field in reader.fields.items():
            if name.startswith("GGUF.") or name == "general.architecture":
                continue
            value = field.contents()
            if isinstance(value, list):
                writer.add_key_value(name, value[:120], field.types[0], field.types[-1])
            else:
                writer.add_key_value(name, value, field.types[0])
        for name in ("blk.0.attn_norm.weight", "blk.0.attn_q.weight", "token_embd.weight"):
            kind = gguf.GGMLQuantizationType[file.tensors[name].type]
            raw = file.raw(name)[:4]
            writer.add_tensor(name, raw[0] if len(raw) == 1 else raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    assert 10_000 < len(content) < 40_000
    return content


def end_of_data(path: Path) -> int:
    with GGUFFile(path) as file:
        return max(tensor.offset + tensor.nbytes for tensor in file.tensors.values())


def test_cut_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    keys = (
        key("general.architecture", STRING, string("llama")),
        key("tokens", ARRAY, array(STRING, 3, string("a") + string("☃") + string(""))),
        key("scores", ARRAY, array(F32, 3, bytes(12))),
        key("nested", ARRAY, nested(3)),
        key("flag", BOOL, b"\1"),
    )
    tensors = (tensor("w", (8, 2)), tensor("q", (32, 3), 2, 64), tensor("k", (256,), 12, 128))
    path.write_bytes(gguf_bytes(keys, tensors, bytes(128 + 144)))
    size = end_of_data(path)
    assert size == path.stat().st_size
    for length in range(size - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GGUFFile(path)


def test_real_header_cut(real_header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(real_header)
    for length in range(end_of_data(path) - 1, -1, -13):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GGUFFile(path)


def open_and_read(path: Path, content: bytes) -> None:
    """Open and read everything: only GossamerError may be raised, in a few MB."""
    path.write_bytes(content)
    error = ""
    tracemalloc.start()
    try:
        try:
            with GGUFFile(path) as file:
                end = 0
                for name, entry in sorted(file.tensors.items(), key=lambda item: item[1].offset):
                    assert end <= entry.offset
                    end = entry.offset + entry.nbytes
                    assert file.raw(name).size == entry.nbytes
                    assert file.read(name).size == np.prod(entry.shape)
                assert end <= len(content)
        except GossamerError as err:
            error = str(err)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4e6
    assert not error or str(path) in error
    assert "\n" not in error


NASTY = [0, 1, 2, 4, 8, 9, 12, 13, 16, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40]
NASTY += [2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
MUTATION = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.one_of(
        st.binary(min_size=1, max_size=12),
        st.sampled_from(NASTY).map(lambda value: struct.pack("<Q", value)),
        st.sampled_from(NASTY[:16]).map(lambda value: struct.pack("<I", value)),
    ),
)
TYPE_ID = st.sampled_from([type_id for type_id, _, _ in TYPES.values()])
FUZZ = settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def mutate(content: bytes, mutations: list[tuple[float, bytes]], length: int) -> bytes:
    changed = bytearray(content)
    for place, value in mutations:
        at = int(place * length)
        changed[at : at + len(value)] = value
    return bytes(changed)


@FUZZ
@given(mutations=st.lists(MUTATION, min_size=1, max_size=4), keep=st.floats(0, 1))
def test_mutated_real_header(
    real_header: bytes, tmp_path: Path, mutations: list[tuple[float, bytes]], keep: float
) -> None:
    content = mutate(real_header, mutations, len(real_header))
    # Half of the files are cut as well.
    open_and_read(tmp_path / "mutated.gguf", content[: int(len(content) * min(1.0, keep * 2))])


@FUZZ
@given(mutations=st.lists(MUTATION, min_size=1, max_size=4), kinds=st.tuples(*[TYPE_ID] * 4))
def test_mutated_fields(tmp_path: Path, mutations: list[tuple[float, bytes]], kinds: tuple[int, ...]) -> None:
    """A header of fields only, so that nearly every mutation hits a count, type, length or offset."""
    keys = (
        key("a", ARRAY, array(STRING, 2, string("x") + string("y"))),
        key("b", ARRAY, nested(3)),
        key("general.alignment", U32, struct.pack("<I", 32)),
    )
    tensors = tuple(
        tensor(name, (256, 2), kind, i * 4096) for i, (name, kind) in enumerate(zip("pqrs", kinds))
    )
    data = np.random.default_rng(0).integers(0, 256, 4 * 4096, dtype=np.uint8).tobytes()
    content = gguf_bytes(keys, tensors, data)
    open_and_read(tmp_path / "mutated.gguf", mutate(content, mutations, len(content) - len(data)))


@FUZZ
@given(content=st.binary(max_size=400))
def test_random_bytes_behind_the_magic(tmp_path: Path, content: bytes) -> None:
    open_and_read(tmp_path / "random.gguf", b"GGUF\3\0\0\0" + content)
