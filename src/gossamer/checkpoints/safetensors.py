"""Reading one safetensors file, over a memory map and in bounded memory. Writing: safetensors_writer.py.

The file is an 8-byte little-endian header length, a JSON object
`{"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {"k": "v"}}`,
and the tensors' bytes, row-major and little-endian, back to back. Nothing in the header is believed
before it is checked against the file's own size, so a damaged file costs an error and not memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import CheckpointError, UnsupportedError, UsageError

__all__ = [
    "DTYPES",
    "HEADER_LIMIT",
    "MAX_RANK",
    "SafetensorsFile",
    "TensorInfo",
    "are_sizes",
    "json_fault",
    "label",
    "quote",
    "unique_pairs",
]

# The numpy type that holds one element. Types numpy lacks are held as their bits.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}

HEADER_LIMIT = 100_000_000  # the format's own limit
MAX_RANK = 32  # numpy 1.26 holds no more
_MAX_ELEMENTS = 2**60  # keeps shape arithmetic inside what numpy can index, zero-sized axes included
_RELEASE_BYTES = 1 << 20  # smaller reads leave their pages in the map


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` counts bytes from the start of the file, `nbytes` is its length."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def quote(text: object) -> str:
    """`text` for a message: quoted, printable and short, whatever a damaged header holds."""
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's `object_pairs_hook`: the object, or ValueError when a key appears twice in it."""
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{quote(twice)} appears twice")
    return table


def json_fault(error: ValueError) -> str:
    """What is wrong with a JSON text, short and on one line, from the error that parsing it raised."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if "int_max_str_digits" in str(error):
        return "a number in it has thousands of digits"
    return quote(str(error))[1:-1]


def label(name: str) -> str:
    return f"tensor {quote(name)}"


class SafetensorsFile:
    """A safetensors file, checked and memory-mapped.

    `tensors` is in the order of the data (execution order in files of ours), `metadata` is the header's
    string table, `data_bytes` is the size of the data section.

    Raises CheckpointError for a file that is missing or damaged, UnsupportedError for a tensor of a type
    that is not in DTYPES.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            # Non-blocking, so that a pipe under this name is refused and not waited on.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self._damaged(f"cannot be read: {reason}") from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise self._damaged("is not a regular file; give the path of a safetensors file")
            header = self._read_header(fd, status.st_size)
            self.tensors, self.metadata = self._parse(header, status.st_size)
            self.data_bytes = status.st_size - 8 - len(header)
            self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        except RecursionError:
            raise self._damaged("has a header that nests too deeply; fetch it again") from None
        except OSError as error:
            raise self._damaged(f"cannot be read: {error.strerror}") from None
        finally:
            os.close(fd)

    def raw(self, name: str) -> NDArray[Any]:
        """The tensor as stored: a read-only view into the map, shaped, of the type DTYPES gives.

        BF16 comes as uint16 and F8_* as uint8. In a file written elsewhere the view may be unaligned.
        """
        info = self._info(name)
        dtype = DTYPES[info.dtype]
        if not info.nbytes:
            return np.empty(info.shape, dtype)
        flat = np.frombuffer(self._map, dtype, info.nbytes // dtype.itemsize, info.offset)
        return flat.reshape(info.shape)

    def read(self, name: str, r0: int = 0, r1: int | None = None) -> NDArray[np.float32]:
        """Rows r0..r1 (along the first axis, all by default) as a new float32 array.

        Only these rows are copied, and their pages leave the map afterwards, so a walk over a file
        larger than memory stays small. A tensor of rank 0 has no rows and is read whole.
        """
        info = self._info(name)
        stored = self.raw(name)
        if info.shape:
            end = info.shape[0] if r1 is None else r1
            if not 0 <= r0 <= end <= info.shape[0]:
                raise UsageError(
                    f"{self.path}: rows {r0} to {end} do not exist in {label(name)} of {info.shape[0]} rows"
                )
            stored = stored[r0:end]
        elif r0 or r1 is not None:
            raise UsageError(f"{self.path}: {label(name)} is one number, without rows to choose from")
        result = np.asarray(_to_float32(stored, info.dtype))
        if stored.nbytes >= _RELEASE_BYTES:
            row = info.nbytes // info.shape[0] if info.shape else 0
            self._release(info.offset + r0 * row, stored.nbytes)
        return result

    def release(self, name: str) -> None:
        """Lets the pages of a tensor leave this process; they come back when it is read again."""
        info = self._info(name)
        if info.nbytes:
            self._release(info.offset, info.nbytes)

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path} holds no {label(name)} among its {len(self.tensors)}: the checkpoint is of "
                f"another architecture or lacks a part; fetch it again"
            )
        return info

    def _release(self, offset: int, nbytes: int) -> None:
        # The pages stay in the system's cache, they only stop counting as memory of this process.
        if hasattr(mmap, "MADV_DONTNEED"):
            start = offset - offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}")

    def _read_header(self, fd: int, size: int) -> bytes:
        if size < 8:
            raise self._damaged(f"has only {size} bytes, too few for a safetensors file; fetch it again")
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        if length > HEADER_LIMIT or length > size - 8:
            limit = min(HEADER_LIMIT, size - 8)
            raise self._damaged(
                f"claims a header of {length} bytes where {limit} are possible: it is cut short or not a "
                f"safetensors file; fetch it again"
            )
        header = os.pread(fd, length, 8)
        if len(header) != length:
            raise self._damaged("became shorter while it was read; fetch it again")
        return header

    def _parse(self, header: bytes, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        try:
            if header[:1] != b"{":
                raise ValueError("it does not begin with '{'")
            parsed = json.loads(header.decode("utf-8"), object_pairs_hook=unique_pairs, parse_constant=_no_constant)
        except ValueError as error:
            raise self._damaged(f"has a header that is not sound JSON ({json_fault(error)}); fetch it again") from None
        table = parsed.pop("__metadata__", {})
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise self._damaged("has a '__metadata__' that is not a table of strings; fetch it again")
        data_start = 8 + len(header)
        infos = [self._entry(name, entry, data_start, size) for name, entry in parsed.items()]
        infos.sort(key=lambda info: (info.offset, info.nbytes))
        end = data_start
        for info in infos:
            if info.offset != end:
                fault = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
                raise self._damaged(f"is damaged: {label(info.name)} {fault}; fetch it again")
            end += info.nbytes
        if end != size:
            raise self._damaged(f"has {size - end} bytes after its last tensor; fetch it again")
        return {info.name: info for info in infos}, table

    def _entry(self, name: str, entry: object, data_start: int, size: int) -> TensorInfo:
        where = label(name)
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"is damaged: {where} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str):
            raise self._damaged(f"is damaged: {where} has {quote(dtype)} for a dtype")
        if dtype not in DTYPES:
            raise UnsupportedError(
                f"{self.path}: {where} has type {quote(dtype)}, which is not read; convert it to one of "
                f"{', '.join(DTYPES)}"
            )
        if not are_sizes(shape) or len(shape) > MAX_RANK:
            raise self._damaged(f"is damaged: {where} has {quote(shape)} for a shape")
        if not are_sizes(offsets) or len(offsets) != 2:
            raise self._damaged(f"is damaged: {where} has {quote(offsets)} for data_offsets")
        # Dimensions are compared one by one first: their product may have millions of digits.
        extent = 1
        for dim in shape:
            extent = extent * max(dim, 1) if dim <= _MAX_ELEMENTS else _MAX_ELEMENTS + 1
            if extent > _MAX_ELEMENTS:
                raise self._damaged(f"is damaged: {where} has the impossible shape {quote(shape)}")
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        begin, end = offsets
        if not begin <= end <= size - data_start:
            raise self._damaged(
                f"is cut short or damaged: {where} should lie at bytes {quote(begin)} to {quote(end)} "
                f"of the data, which has {size - data_start}; fetch it again"
            )
        if end - begin != nbytes:
            raise self._damaged(
                f"is damaged: {where} of type {dtype} and shape {quote(shape)} needs {nbytes} bytes and "
                f"has {end - begin}"
            )
        return TensorInfo(name, dtype, tuple(shape), data_start + begin, nbytes)


def _to_float32(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        bits = stored.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    if dtype.startswith("F8_"):
        values: NDArray[np.float32] = _f8_table(dtype)[stored]
        return values
    if dtype == "BOOL":  # any byte but 0 is true, and numpy would show the byte itself
        stored = np.not_equal(stored.view(np.uint8), 0)
    with np.errstate(all="ignore"):  # a float64 beyond float32 becomes infinite, as any cast does
        return stored.astype(np.float32)


@cache
def _f8_table(dtype: str) -> NDArray[np.float32]:
    """float32 [256]: the value of each code, by the OCP definitions of E4M3 (finite only), E5M2 and E8M0."""
    codes = np.arange(256)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if dtype == "F8_E8M0":
        values = np.ldexp(1.0, codes - 127)
        values[255] = np.nan
    else:
        exponent, fraction = codes >> 3 & 15, codes & 7
        values = np.where(exponent == 0, np.ldexp(fraction / 8, -6), np.ldexp(1 + fraction / 8, exponent - 7))
        values = np.where(codes & 127 == 127, np.nan, values) * np.where(codes & 128, -1.0, 1.0)
    return values.astype(np.float32)


def are_sizes(values: object) -> bool:
    # `type`, because True is an int to isinstance.
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
