"""Reading GGUF files (versions 2 and 3, little-endian) without trusting them.

    magic "GGUF" | u32 version | u64 tensors | u64 keys
    keys x    { string key | u32 value type | value }
    tensors x { string name | u32 dims | u64 dim, fastest first ... | u32 type | u64 offset in the data }
    padding to general.alignment (32 unless stated) | data

A string is a u64 length and UTF-8 bytes; an array is a u32 element type, a u64 count and the elements.
The file is mapped, not read. Every count, length, offset and size is compared with the bytes that are
there before anything is allocated or sliced, so the memory a damaged header can ask for is bounded
by a small multiple of the size of the header that is really in the file.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gossamer.checkpoints.ggml_blocks import dequantize, parts
from gossamer.checkpoints.ggml_types import LOSSLESS, TYPES, row_bytes
from gossamer.errors import CheckpointError, UnsupportedError, UsageError

__all__ = ["LOSSLESS", "TYPES", "GGUFFile", "GGUFTensor", "parts", "row_bytes"]

_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # ggml's own limit
_MAX_DEPTH = 4  # arrays of arrays
_MAX_HEADER = 256 << 20  # real ones, with a million tokens, stay under a tenth of this
_MIN_KEY = 9 + 4 + 1  # a key of one letter, its type, a value of one byte
_MIN_TENSOR = 9 + 4 + 8 + 4 + 8  # a name of one letter, one dimension
_CHUNK = 1 << 18  # elements decoded at a time: temporaries of a few MB

_STRING, _ARRAY, _BOOL, _UINT32 = 8, 9, 7, 4
_NUMBERS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),  # bool: 0 or 1
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _NUMBERS[4], _NUMBERS[10]
_TYPE_NAMES = {type_id: name for name, (type_id, _, _) in TYPES.items()}
_AGAIN = "it is damaged or was cut short, fetch it again"


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies.

    shape: in numpy order, (out, in) for a matrix. offset, nbytes: in bytes, from the start of the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """A mapped GGUF file.

    metadata: key -> int, float, bool, str; arrays of numbers as numpy arrays, other arrays as lists.
    tensors: name -> GGUFTensor, in file order. data_bytes: the sum of their bytes, padding not counted.

    CheckpointError: missing, damaged or not GGUF; UnsupportedError: a version, byte order or tensor type
    that is not read. Views handed out by `raw` stay valid after `close`.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    data_bytes: int

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._bytes: NDArray[np.uint8] | None = None
        self._map = _map_file(self.path)
        try:
            header = _Header(self.path, self._map)
            self.version, self.metadata, self.tensors = header.parse()
            self._types = header.types
        except BaseException:
            self._map.close()
            raise
        self.data_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self._bytes = np.frombuffer(self._map, np.uint8)

    def typed_metadata(self) -> dict[str, tuple[Any, int, int | None]]:
        """Each key's value (arrays as lists), the number of its type, and for an array that of its elements.

        Arrays of arrays and empty ones are left out: no key that a model needs is one.
        """
        found: dict[str, tuple[Any, int, int | None]] = {}
        for key, value in self.metadata.items():
            kind, inner = self._types[key]
            if inner == _ARRAY or (kind == _ARRAY and not len(value)):
                continue
            found[key] = (value.tolist() if isinstance(value, np.ndarray) else value, kind, inner)
        return found

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes, uint8 [rows, row_bytes], a read-only view into the map.

        A vector is one row; leading dimensions of a tensor with more than two are flattened into rows.
        """
        tensor = self._tensor(name)
        if self._bytes is None:
            raise UsageError(f"{self.path} was closed; open it again to read '{name}'")
        data = self._bytes[tensor.offset : tensor.offset + tensor.nbytes]
        return data.reshape(math.prod(tensor.shape[:-1]), -1)

    def read(self, name: str, r0: int = 0, r1: int | None = None) -> NDArray[np.float32]:
        """Rows r0..r1 (r1 excluded, None for all) as float32 [rows, cols], or [cols] for a vector.

        Beside the result only a few MB are used. UsageError: no such tensor or rows; UnsupportedError:
        a tensor type that cannot be decoded.
        """
        tensor = self._tensor(name)
        raw = self.raw(name)
        stop = len(raw) if r1 is None else r1
        if not 0 <= r0 <= stop <= len(raw):
            raise UsageError(f"{self.path}: {name!r} has rows 0..{len(raw)}; ask within, not {r0}..{stop}")
        _, elems, nbytes = TYPES[tensor.type]
        cols = tensor.shape[-1]
        data = raw[r0:stop].reshape(-1)
        out = np.empty((stop - r0) * cols, np.float32)
        step = max(1, _CHUNK // elems)
        for block in range(0, len(data) // nbytes, step):
            try:
                values = dequantize(tensor.type, data[block * nbytes : (block + step) * nbytes])
            except UnsupportedError as err:
                raise UnsupportedError(f"{self.path}: the tensor {_show(name)} is not read: {err}") from None
            out[block * elems : block * elems + len(values)] = values
        return out if len(tensor.shape) == 1 else out.reshape(stop - r0, cols)

    def release(self, name: str) -> None:
        """Let go of the tensor's mapped pages once it is converted.

        They stay in the system's cache and come back when read again; they only stop counting as this process's
        memory.
        """
        tensor = self._tensor(name)
        if self._bytes is not None and hasattr(mmap, "MADV_DONTNEED"):
            start = tensor.offset - tensor.offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, tensor.offset + tensor.nbytes - start)

    def close(self) -> None:
        """Release the map. Arrays from `raw` keep it alive until they are gone."""
        self._bytes = None
        with suppress(BufferError):  # a view is still in use: the map goes with the last one
            self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensor(self, name: str) -> GGUFTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise UsageError(f"{self.path} holds no tensor {name!r}; `tensors` lists what it holds") from None


def _map_file(path: Path) -> mmap.mmap:
    try:
        # stat before open: opening a pipe would wait for a writer.
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path} is a directory, not a GGUF file; name the .gguf file inside it")
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is not a regular file; a GGUF file must be one to be mapped")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise CheckpointError(f"{path} is empty, not a GGUF file; fetch it again")
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; check the path of the GGUF file") from None
    except (OSError, ValueError) as err:  # ValueError: a NUL in the path, or a file cut while it is mapped
        reason = getattr(err, "strerror", None) or err
        raise CheckpointError(f"{path} cannot be opened as a GGUF file: {reason}") from None


def _show(name: str) -> str:
    """A name from the file, fit for a one-line message."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


class _Header:
    """A cursor over the header. `what` names the thing being read, for messages."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.pos = 0
        self.what = "the header"
        self.types: dict[str, tuple[int, int | None]] = {}  # of each key's value, and of an array's elements

    def parse(self) -> tuple[int, dict[str, Any], dict[str, GGUFTensor]]:
        if self.data[:4] != b"GGUF":
            raise CheckpointError(f"{self.path} is not a GGUF file: it does not begin with the letters GGUF")
        self.pos = 4
        version = self.u32()
        if version not in (2, 3):
            big_endian = version != 0 and version & 0xFFFF == 0
            found = "in big-endian byte order" if big_endian else f"version {version}"
            raise UnsupportedError(
                f"{self.path} is GGUF {found}, and only little-endian versions 2 and 3 are read; "
                "convert the model again"
            )
        n_tensors, n_keys = self.u64(), self.u64()
        self.room(n_keys, _MIN_KEY, "keys")
        self.room(n_tensors, _MIN_TENSOR, "tensors")
        metadata = self.metadata(n_keys)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        return version, metadata, self.tensors(n_tensors, alignment)

    def metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for i in range(count):
            self.what = f"metadata key {i + 1} of {count}"
            key = self.name()
            self.what = f"the metadata key {_show(key)}"
            if key in metadata:
                self.damaged("appears twice")
            kind = self.u32()
            inner = _U32.unpack_from(self.data, self.pos)[0] if kind == _ARRAY and self.size - self.pos >= 4 else None
            self.types[key] = (kind, inner)
            metadata[key] = value = self.value(kind)
            # Two's complement: a power of two shares no bit with the number below it.
            if key == "general.alignment" and (kind != _UINT32 or value == 0 or value & (value - 1)):
                shown = value if kind in _NUMBERS else "of another type"
                self.damaged(f"is {shown}, and must be a power of two stored as uint32")
        return metadata

    def tensors(self, count: int, alignment: int) -> dict[str, GGUFTensor]:
        places: list[tuple[str, str, tuple[int, ...], int, int]] = []
        for i in range(count):
            self.what = f"tensor {i + 1} of {count}"
            name = self.name()
            self.what = f"the tensor {_show(name)}"
            places.append((name, *self.tensor_place(alignment)))
        # Offsets count from the padded end of the header, known only now.
        start = -(-self.pos // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, kind, shape, offset, nbytes in places:
            self.what = f"the tensor {_show(name)}"
            if name in tensors:
                self.damaged("appears twice")
            if start + offset + nbytes > self.size:
                end = start + offset + nbytes
                self.damaged(f"ends at byte {end}, and the file has only {self.size}")
            tensors[name] = GGUFTensor(name, kind, shape, start + offset, nbytes)
        self.disjoint(tensors)
        return tensors

    def tensor_place(self, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
        """Type, shape, offset in the data and bytes of the tensor under the cursor."""
        dims = self.u32()
        if not 1 <= dims <= _MAX_DIMS:
            self.damaged(f"has {dims} dimensions, and 1 to {_MAX_DIMS} are possible")
        shape = tuple(self.u64() for _ in range(dims))[::-1]
        type_id, offset = self.u32(), self.u64()
        kind = _TYPE_NAMES.get(type_id)
        if kind is None:
            raise UnsupportedError(
                f"{self.path}: {self.what} has the type number {type_id}, which is not known; "
                "use a file with another type"
            )
        _, elems, block = TYPES[kind]
        if 0 in shape:
            self.damaged(f"has the shape {shape}, which holds no elements")
        if shape[-1] % elems:
            self.damaged(f"is {kind} with rows of {shape[-1]} elements, not whole blocks of {elems}")
        if offset % alignment:
            self.damaged(f"begins at offset {offset}, not a multiple of the alignment {alignment}")
        # Python integers do not overflow, and a product too large for the file is refused with its end.
        return kind, shape, offset, math.prod(shape) // elems * block

    def disjoint(self, tensors: dict[str, GGUFTensor]) -> None:
        end, before = 0, ""
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if tensor.offset < end:
                self.what = f"the tensor {_show(tensor.name)}"
                self.damaged(f"overlaps the tensor {_show(before)}")
            end, before = tensor.offset + tensor.nbytes, tensor.name

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(depth + 1)
        if kind not in _NUMBERS:
            self.unknown(kind)
        (number,) = self.unpack(_NUMBERS[kind])
        if kind != _BOOL:
            return number
        if number > 1:
            self.damaged(f"is a truth value stored as {number}, and only 0 and 1 are possible")
        return bool(number)

    def array(self, depth: int) -> NDArray[Any] | list[Any]:
        if depth > _MAX_DEPTH:
            self.damaged(f"nests arrays more than {_MAX_DEPTH} deep")
        kind, count = self.u32(), self.u64()
        if kind == _STRING:
            self.room(count, 8, "strings")
            return [self.string() for _ in range(count)]
        if kind == _ARRAY:
            self.room(count, 4 + 8, "arrays")
            return [self.array(depth + 1) for _ in range(count)]
        if kind not in _NUMBERS:
            self.unknown(kind)
        dtype = np.dtype(_NUMBERS[kind].format)
        self.room(count, dtype.itemsize, "numbers")
        # A copy: a view would keep the map from closing.
        numbers = np.frombuffer(self.data[self.pos : self.pos + count * dtype.itemsize], dtype)
        self.pos += count * dtype.itemsize
        if kind != _BOOL:
            return numbers
        if count and numbers.max() > 1:
            self.damaged(f"holds a truth value stored as {numbers.max()}, and only 0 and 1 are possible")
        return numbers.astype(np.bool_)

    def name(self) -> str:
        name = self.string()
        if not name:  # also what zeros after too short a list look like
            self.damaged("has an empty name")
        return name

    def string(self) -> str:
        length = self.u64()
        self.room(length, 1, "bytes of text")
        text = self.data[self.pos : self.pos + length]
        self.pos += length
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            self.damaged("holds text that is not UTF-8")

    def u32(self) -> int:
        return int(self.unpack(_U32)[0])

    def u64(self) -> int:
        return int(self.unpack(_U64)[0])

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        if self.pos + layout.size > self.size:
            self.damaged("is where the file ends")
        self.room(1, layout.size, "values")
        values = layout.unpack_from(self.data, self.pos)
        self.pos += layout.size
        return values

    def room(self, count: int, size: int, noun: str) -> None:
        """Refuse `count` things of at least `size` bytes each that cannot lie after the cursor."""
        end = self.pos + count * size
        if end > self.size:
            left = self.size - self.pos
            self.damaged(f"asks for {count} {noun} where {left} bytes are left in the file")
        if end > _MAX_HEADER:
            raise UnsupportedError(
                f"{self.path}: {self.what} takes the header past the {_MAX_HEADER >> 20} MiB that are read; "
                "use a file with less metadata"
            )

    def damaged(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {self.what} {problem}; {_AGAIN}")

    def unknown(self, kind: int) -> NoReturn:
        self.damaged(f"has the value type {kind}, which GGUF does not define")
