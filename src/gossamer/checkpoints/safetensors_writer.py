"""Writing one safetensors file, a tensor or a piece of one at a time. The format: safetensors.py."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gossamer.checkpoints.safetensors import DTYPES, HEADER_LIMIT, MAX_RANK, TensorInfo, are_sizes, label, quote
from gossamer.errors import GossamerError, ResourceError, UsageError

__all__ = ["SafetensorsWriter", "write_error"]

_WIDEST = 10**15  # bytes: no file is larger


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


class SafetensorsWriter:
    """Writes a safetensors file whose tensors are known by type and shape beforehand.

    specs    `(name, dtype, shape)` in the order in which the tensors shall lie in the file.
    metadata the header's string table.
    align    the data section starts at a multiple of this many bytes (the header is padded with spaces).
             Tensors lie back to back, as the format demands: a caller who wants each of them aligned
             gives each a multiple of `align` bytes.
    open     names of one-dimensional tensors whose length in `specs` is only expected.

    Tensors come in any order, whole (`write`) or in pieces (`write_at`), every element exactly once. Where some are
    open, all are written whole and in the order of `specs`, since the next one begins where the last one ended; the
    header then follows at the end, into room that was left for it. An existing file is replaced. Use it with `with`: an
    error inside removes the file, otherwise the end closes it. Not for concurrent use.

    Raises UsageError for impossible specs, ResourceError when the place cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Iterable[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        align: int = 64,
        open: Collection[str] = (),
    ) -> None:
        self.path = Path(path)
        self._metadata, self._align, self._open = dict(metadata or {}), align, frozenset(open)
        self.tensors = self._layout(list(specs))
        header = self._header(widest=bool(self._open))
        self._start = len(header)
        self._ahead = list(self.tensors) if self._open else []  # what is still to come, in order
        self._end = 0  # of the data so far, where tensors come in order
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
            if not self._open:
                self._pwrite(memoryview(header), 0)
        except GossamerError:
            self.abort()
            raise

    @property
    def data_bytes(self) -> int:
        """Size of the data section: final once everything is written."""
        return sum(info.nbytes for info in self.tensors.values())

    def write(self, name: str, array: NDArray[Any]) -> None:
        """The whole tensor: `array` has its shape and the element type that DTYPES gives for it."""
        info = self._expect(name, array)
        if name in self._open and name in self._written and array.ndim == 1:
            info = replace(info, shape=array.shape, nbytes=array.nbytes)
        if array.shape != info.shape:
            raise UsageError(f"{self.path}: {label(name)} has shape {info.shape}, not {array.shape}")
        if self._open:
            if self._ahead[:1] != [name]:
                due = f"{label(self._ahead[0])} is next" if self._ahead else "all were written"
                raise UsageError(f"{self.path}: {label(name)} is written out of order; {due}")
            del self._ahead[0]
            self.tensors[name] = info = replace(info, offset=self._end)
            self._end += info.nbytes
            if not info.nbytes:
                self._written.pop(name, None)
        self._put(info, 0, array)

    def write_at(self, name: str, element_offset: int, array: NDArray[Any]) -> None:
        """The piece of a tensor that begins `element_offset` elements into it, row-major."""
        info = self._expect(name, array)
        if self._open:
            raise UsageError(f"{self.path}: tensors are written whole where the length of some is open")
        self._put(info, element_offset, array)

    def _put(self, info: TensorInfo, element_offset: int, array: NDArray[Any]) -> None:
        name = info.name
        if not array.size:
            return
        total = info.nbytes // array.itemsize
        end = element_offset + array.size
        if element_offset < 0 or end > total:
            raise UsageError(f"{self.path}: elements {element_offset} to {end} lie outside {label(name)} of {total}")
        ranges = self._written.get(name, [(0, total)])
        if any(element_offset < stop and start < end for start, stop in ranges):
            raise UsageError(f"{self.path}: elements {element_offset} to {end} of {label(name)} are written twice")
        contiguous = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._pwrite(contiguous.data, self._start + info.offset + element_offset * array.itemsize)
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
                f"{self.path} is not complete: {have} of {total} elements of {label(name)} were written and "
                f"{len(self._written) - 1} more tensors lack some; write them before closing"
            )
        if self._open:
            header = self._header()
            header = (self._start - 8).to_bytes(8, "little") + header[8:].ljust(self._start - 8)
            self._pwrite(memoryview(header), 0)
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

    def _layout(self, specs: list[tuple[str, str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
        """Where every tensor lies, counted from the start of the data."""
        if self._align < 1:
            raise UsageError(f"{self.path}: data cannot be aligned to {self._align} bytes; give 1 or more")
        infos: dict[str, TensorInfo] = {}
        end = 0
        for name, dtype, shape in specs:
            if dtype not in DTYPES:
                raise UsageError(f"{self.path}: {dtype!r} is not one of the types {', '.join(DTYPES)}")
            if name in infos or name == "__metadata__":
                raise UsageError(f"{self.path}: the tensor name {quote(name)} is taken; names must differ")
            if not are_sizes(list(shape)) or len(shape) > MAX_RANK:
                raise UsageError(f"{self.path}: {shape!r} is not a shape for {label(name)}")
            if name in self._open and len(shape) != 1:
                raise UsageError(f"{self.path}: {label(name)} is open, and only a length may be, not {shape!r}")
            infos[name] = TensorInfo(name, dtype, tuple(shape), end, math.prod(shape) * DTYPES[dtype].itemsize)
            end += infos[name].nbytes
        return infos

    def _header(self, widest: bool = False) -> bytes:
        """The padded header with its length in front; `widest`: one that leaves room for any numbers."""
        table: dict[str, object] = {"__metadata__": self._metadata} if self._metadata else {}
        for name, info in self.tensors.items():
            shape, offsets = list(info.shape), [info.offset, info.offset + info.nbytes]
            if widest:
                shape, offsets = [_WIDEST] * len(shape), [_WIDEST, _WIDEST]
            table[name] = {"dtype": info.dtype, "shape": shape, "data_offsets": offsets}
        try:
            text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"{self.path}: a tensor name or metadata text is not valid Unicode") from None
        text += b" " * (-(8 + len(text)) % self._align)
        if len(text) > HEADER_LIMIT:
            raise UsageError(f"{self.path}: {len(table)} tensors do not fit one header; write several files")
        return len(text).to_bytes(8, "little") + text

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
            raise UsageError(f"{self.path}: no {label(name)} was announced")
        if array.dtype != DTYPES[info.dtype]:
            raise UsageError(
                f"{self.path}: {label(name)} of type {info.dtype} takes {DTYPES[info.dtype]} arrays, not {array.dtype}"
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


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint ranges, sorted, with neighbours that touch made one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
