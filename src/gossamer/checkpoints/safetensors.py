"""One safetensors file: a bounded reader over a memory map, and a writer that streams.

The file is an 8-byte little-endian header length, a JSON object
`{"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {"k": "v"}}`,
and the tensors' bytes, row-major and little-endian, back to back. Nothing in the header is believed
before it is checked against the file's own size, so a damaged file costs an error and not memory.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import CheckpointError, GossamerError, ResourceError, UnsupportedError, UsageError

__all__ = [
    "DTYPES",
    "SafetensorsFile",
    "SafetensorsWriter",
    "TensorInfo",
    "json_fault",
    "quote",
    "unique_pairs",
    "write_error",
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

_HEADER_LIMIT = 100_000_000  # the format's own limit
_MAX_RANK = 32  # numpy 1.26 holds no more
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


def write_error(path: Path, error: OSError) -> ResourceError:
    """The ResourceError that tells a person why `path` cannot be written and what to do about it."""
    reasons = {
        errno.ENOSPC: "the disk is full; free some space or choose another place",
        errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
        errno.EFBIG: "the file system does not hold files that large; choose another place",
        errno.EACCES: "permission is denied; choose a place that you may write to",
        errno.EPERM: "permission is denied; choose a place that you may write to",
        errno.EROFS: "the file system is read-only; choose a place that you may write to",
        errno.ENOTDIR: "part of the path is a file and not a folder; choose another place",
        errno.EEXIST: "part of the path is a file and not a folder; choose another place",
        errno.ENOENT: "its folder does not exist or takes no files; choose another place",
        errno.EISDIR: "it is a folder; give the name of a file",
        errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    }
    reason = reasons.get(error.errno or 0) or f"{error.strerror or error}; choose another place"
    return ResourceError(f"{path} cannot be written: {reason}")


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


def _label(name: str) -> str:
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
                    f"{self.path}: rows {r0} to {end} do not exist in {_label(name)} of {info.shape[0]} rows"
                )
            stored = stored[r0:end]
        elif r0 or r1 is not None:
            raise UsageError(f"{self.path}: {_label(name)} is one number, without rows to choose from")
        result = np.asarray(_to_float32(stored, info.dtype))
        if stored.nbytes >= _RELEASE_BYTES:
            row = info.nbytes // info.shape[0] if info.shape else 0
            self._release(info.offset + r0 * row, stored.nbytes)
        return result

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path} holds no {_label(name)} among its {len(self.tensors)}: the checkpoint is of "
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
        if length > _HEADER_LIMIT or length > size - 8:
            limit = min(_HEADER_LIMIT, size - 8)
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
            parsed = json.loads(
                header.decode("utf-8"), object_pairs_hook=unique_pairs, parse_constant=_no_constant
            )
        except ValueError as error:
            raise self._damaged(
                f"has a header that is not sound JSON ({json_fault(error)}); fetch it again"
            ) from None
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
                raise self._damaged(f"is damaged: {_label(info.name)} {fault}; fetch it again")
            end += info.nbytes
        if end != size:
            raise self._damaged(f"has {size - end} bytes after its last tensor; fetch it again")
        return {info.name: info for info in infos}, table

    def _entry(self, name: str, entry: object, data_start: int, size: int) -> TensorInfo:
        where = _label(name)
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
        if not _are_sizes(shape) or len(shape) > _MAX_RANK:
            raise self._damaged(f"is damaged: {where} has {quote(shape)} for a shape")
        if not _are_sizes(offsets) or len(offsets) != 2:
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


class SafetensorsWriter:
    """Writes a safetensors file whose tensors are known by type and shape beforehand.

    specs    `(name, dtype, shape)` in the order in which the tensors shall lie in the file.
    metadata the header's string table.
    align    the data section starts at a multiple of this many bytes (the header is padded with spaces).
             Tensors lie back to back, as the format demands: a caller who wants each of them aligned
             gives each a multiple of `align` bytes.

    The header is written at once; tensors then come in any order, whole (`write`) or in pieces
    (`write_at`), every element exactly once. An existing file is replaced. Use it with `with`: an error
    inside removes the file, otherwise the end closes it. Not for concurrent use.

    Raises UsageError for impossible specs, ResourceError when the place cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Iterable[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        align: int = 64,
    ) -> None:
        self.path = Path(path)
        header, self.tensors = self._layout(list(specs), metadata, align)
        self.data_bytes = sum(info.nbytes for info in self.tensors.values())
        # Written element ranges of each tensor that is not finished, sorted and merged.
        self._written: dict[str, list[tuple[int, int]]] = {
            name: [] for name, info in self.tensors.items() if info.nbytes
        }
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except (OSError, ValueError) as error:
            fault = error if isinstance(error, OSError) else OSError(str(error))
            raise write_error(self.path, fault) from None
        self._fd: int | None = fd
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)
        try:
            self._check_space(len(header) + self.data_bytes)
            self._pwrite(memoryview(header), 0)
        except GossamerError:
            self.abort()
            raise

    def write(self, name: str, array: NDArray[Any]) -> None:
        """The whole tensor: `array` has its shape and the element type that DTYPES gives for it."""
        info = self._expect(name, array)
        if array.shape != info.shape:
            raise UsageError(f"{self.path}: {_label(name)} has shape {info.shape}, not {array.shape}")
        self.write_at(name, 0, array)

    def write_at(self, name: str, element_offset: int, array: NDArray[Any]) -> None:
        """The piece of a tensor that begins `element_offset` elements into it, row-major."""
        info = self._expect(name, array)
        if not array.size:
            return
        total = info.nbytes // array.itemsize
        end = element_offset + array.size
        if element_offset < 0 or end > total:
            raise UsageError(
                f"{self.path}: elements {element_offset} to {end} lie outside {_label(name)} of {total}"
            )
        ranges = self._written.get(name, [(0, total)])
        if any(element_offset < stop and start < end for start, stop in ranges):
            raise UsageError(
                f"{self.path}: elements {element_offset} to {end} of {_label(name)} are written twice"
            )
        contiguous = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._pwrite(contiguous.data, info.offset + element_offset * array.itemsize)
        merged = _merge([*ranges, (element_offset, end)])
        if merged == [(0, total)]:
            del self._written[name]
        else:
            self._written[name] = merged

    def close(self) -> None:
        """Flush to the disk and close. Raises UsageError, and stays open, when elements are missing."""
        if self._fd is None:
            return
        for name, ranges in self._written.items():
            total = math.prod(self.tensors[name].shape)
            have = sum(stop - start for start, stop in ranges)
            raise UsageError(
                f"{self.path} is not complete: {have} of {total} elements of {_label(name)} were written and "
                f"{len(self._written) - 1} more tensors lack some; write them before closing"
            )
        try:
            if self._regular:
                os.fsync(self._fd)
        except OSError as error:
            self.abort()
            raise write_error(self.path, error) from None
        os.close(self._fd)
        self._fd = None

    def abort(self) -> None:
        """Close and remove the unfinished file. Does nothing after `close`."""
        if self._fd is None:
            return
        os.close(self._fd)
        self._fd = None
        if self._regular:  # never a device that was given as the path
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()

    def _layout(
        self, specs: list[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None, align: int
    ) -> tuple[bytes, dict[str, TensorInfo]]:
        """The padded header with its length in front, and where every tensor will lie."""
        if align < 1:
            raise UsageError(f"{self.path}: data cannot be aligned to {align} bytes; give 1 or more")
        table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        infos: dict[str, TensorInfo] = {}
        end = 0
        for name, dtype, shape in specs:
            if dtype not in DTYPES:
                raise UsageError(f"{self.path}: {dtype!r} is not one of the types {', '.join(DTYPES)}")
            if name in infos or name == "__metadata__":
                raise UsageError(f"{self.path}: the tensor name {quote(name)} is taken; names must differ")
            if not _are_sizes(list(shape)) or len(shape) > _MAX_RANK:
                raise UsageError(f"{self.path}: {shape!r} is not a shape for {_label(name)}")
            info = TensorInfo(name, dtype, tuple(shape), end, math.prod(shape) * DTYPES[dtype].itemsize)
            end += info.nbytes
            table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [info.offset, end]}
            infos[name] = info
        try:
            text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"{self.path}: a tensor name or metadata text is not valid Unicode") from None
        text += b" " * (-(8 + len(text)) % align)
        if len(text) > _HEADER_LIMIT:
            raise UsageError(f"{self.path}: {len(specs)} tensors do not fit one header; write several files")
        start = 8 + len(text)
        placed = {name: replace(info, offset=start + info.offset) for name, info in infos.items()}
        return len(text).to_bytes(8, "little") + text, placed

    def _check_space(self, needed: int) -> None:
        """Refuse at the start what the disk cannot hold, rather than after the work is done."""
        if not self._regular or self._fd is None:
            return
        disk = os.fstatvfs(self._fd)
        free = disk.f_bavail * disk.f_frsize
        # Some network file systems report no blocks at all; there only the writing itself can tell.
        if disk.f_blocks and free < needed:
            raise ResourceError(
                f"{self.path} cannot be written: it needs {needed} bytes and the disk has {free} free; "
                f"free some space or choose another place"
            )

    def _expect(self, name: str, array: NDArray[Any]) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise UsageError(f"{self.path}: no {_label(name)} was announced")
        if array.dtype != DTYPES[info.dtype]:
            raise UsageError(
                f"{self.path}: {_label(name)} of type {info.dtype} takes {DTYPES[info.dtype]} arrays, "
                f"not {array.dtype}"
            )
        return info

    def _pwrite(self, view: memoryview, offset: int) -> None:
        if self._fd is None:
            raise UsageError(f"{self.path} is closed and takes no more tensors")
        try:
            while view:
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise write_error(self.path, error) from None


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


def _are_sizes(values: object) -> bool:
    # `type`, because True is an int to isinstance.
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint ranges, sorted, with neighbours that touch made one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
