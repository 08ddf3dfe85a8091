"""Character vectors in an R package's ``Rdata.rdb``, read without R.

The file is a row of records: the size of the content as 4 big-endian bytes, then the content as a zlib stream.
The content is R's serialization, version 2 or 3, in XDR: "X\\n", the format's version, the writer's and the
oldest reader's, in version 3 the name of the native encoding, then the value. A character vector is the type 16,
a count, and for each string a type word whose low byte is 9, a length (-1 for a missing one) and the bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from gossamer.errors import CheckpointError

__all__ = ["records"]

_FILE_BYTES = 256 << 20
_RECORD_BYTES = 256 << 20
_STRINGS, _STRING = 16, 9
_LATIN1 = 1 << 14  # a bit of the type word; other strings are ASCII or UTF-8


def records(path: Path) -> Iterator[list[str]]:
    """The character vectors in file order; records of other types are left out. Raises CheckpointError if damaged."""
    try:
        if path.stat().st_size > _FILE_BYTES:
            raise CheckpointError(f"{path} is larger than {_FILE_BYTES >> 20} MiB, so it is not a package's text.")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    at = 0
    while at < len(raw):
        try:
            (size,) = struct.unpack_from(">I", raw, at)
            if size > _RECORD_BYTES:
                raise ValueError(f"a record of {size} bytes")
            inflate = zlib.decompressobj()
            content = inflate.decompress(raw[at + 4 :], size + 1)
            if len(content) != size or not inflate.eof:
                raise ValueError("a record of another length than it says")
            at = len(raw) - len(inflate.unused_data)
            vector = _vector(content)
        except (struct.error, zlib.error, ValueError) as error:
            raise CheckpointError(f"{path} is damaged at byte {at} ({error}); install its package again.") from None
        if vector is not None:
            yield vector


def _vector(content: bytes) -> list[str] | None:
    if content[:2] != b"X\n":
        raise ValueError("not R's binary serialization")
    (version,) = struct.unpack_from(">I", content, 2)
    at = 14
    if version == 3:
        at += 4 + _length(content, at)
    elif version != 2:
        raise ValueError(f"serialization version {version}")
    kind, count = struct.unpack_from(">II", content, at)
    if kind & 0xFF != _STRINGS:
        return None
    if count > (len(content) - at) // 8:
        raise ValueError(f"{count} strings in {len(content)} bytes")
    at += 8
    strings = []
    for _ in range(count):
        (kind,) = struct.unpack_from(">I", content, at)
        if kind & 0xFF != _STRING:
            raise ValueError(f"type {kind & 0xFF} where a string should be")
        size = _length(content, at + 4)
        at += 8
        strings.append(content[at : at + size].decode("latin-1" if kind & _LATIN1 else "utf-8"))
        at += size
    return strings


def _length(content: bytes, at: int) -> int:
    (size,) = struct.unpack_from(">i", content, at)
    if size == -1:  # a missing string
        return 0
    if not 0 <= size <= len(content) - at - 4:
        raise ValueError(f"a string of {size} bytes")
    return int(size)
