"""What every format offers: its text, its bytes, encode and decode.

A format is a frozen value. ``encode`` finds the stored form of a matrix, ``decode`` is the definition of what
that form means (float32), ``fields`` says which arrays it takes and how many elements each has, padding counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError

if TYPE_CHECKING:
    from gossamer.ops import Kernel

__all__ = ["ALIGN", "PANEL", "ArraySource", "Field", "Format", "Packed", "PackedSource", "RowSource", "allocate"]

F32 = npt.NDArray[np.float32]

PANEL = 16  # output rows that lie side by side in the packed layout
ALIGN = 64  # bytes: every packed array is padded to a multiple of this
ROWS_PER_STEP = 512  # rows encoded at once: temporaries stay small and in the cache


class RowSource(Protocol):
    """A matrix that is read a few rows at a time: ``shape`` is (rows, columns), ``read`` gives float32."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def read(self, r0: int, r1: int) -> F32: ...


@dataclass(frozen=True)
class ArraySource:
    """A matrix already in memory."""

    array: F32

    @property
    def shape(self) -> tuple[int, int]:
        return (int(self.array.shape[0]), int(self.array.shape[1]))

    def read(self, r0: int, r1: int) -> F32:
        return np.ascontiguousarray(self.array[r0:r1], dtype=np.float32)


# How each safetensors type of a packed array lies in memory; bfloat16 as its bits.
_STORAGE: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True)
class Field:
    """One packed array: ``dtype`` as safetensors names it, ``used`` elements, ``length`` with padding.

    ``exact`` is False where the length depends on the matrix, not on its shape alone: ``used`` is then an estimate from
    above, and any length of whole 64 bytes may be right.
    """

    dtype: str
    used: int
    exact: bool = True

    @property
    def numpy(self) -> np.dtype[Any]:
        return _STORAGE[self.dtype]

    @property
    def length(self) -> int:
        per = ALIGN // self.numpy.itemsize
        return (self.used + per - 1) // per * per

    @property
    def nbytes(self) -> int:
        return self.length * self.numpy.itemsize

    def fits(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
        """Whether an array of this type and shape can be the one meant."""
        if dtype != self.numpy or len(shape) != 1:
            return False
        return shape[0] == self.length if self.exact else shape[0] > 0 and shape[0] * dtype.itemsize % ALIGN == 0

    @property
    def wanted(self) -> str:
        """The length in words."""
        return f"{self.length} elements" if self.exact else f"a multiple of {ALIGN} bytes"


class Format(Protocol):
    """A weight expression. ``str(fmt)`` prints it; ``gossamer.formats.parse_weight`` reads it back."""

    def __str__(self) -> str: ...

    def check(self, rows: int, cols: int) -> None:
        """Raises FormatError when a matrix of this shape cannot be stored so."""

    def fields(self, rows: int, cols: int) -> dict[str, Field]:
        """The packed arrays in file order."""

    def prepare(self, source: RowSource) -> Any:
        """What rows share, found in passes over the matrix in bounded memory; None where each row is on its own."""

    def encode_rows(self, w: F32, into: Mapping[str, npt.NDArray[Any]], first_row: int, cols: int, state: Any) -> None:
        """Encodes float32 rows [n, cols] at ``first_row`` (a multiple of 16) into the padded arrays.

        ``state`` is what ``prepare`` gave for the whole matrix.
        """

    def decode_rows(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int, r0: int, r1: int) -> F32:
        """float32 [r1 - r0, cols]: what the arrays mean."""

    def kernel(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int) -> Kernel | None:
        """How the compiled kernels read these arrays, or None when none does."""

    @property
    def integer(self) -> bool:
        """Whether the weight is integer codes, which is what integer inputs multiply with."""


@dataclass(frozen=True)
class Packed:
    """A matrix as it is stored: the format, the logical shape (rows, columns) and the padded arrays."""

    format: Format
    shape: tuple[int, int]
    arrays: Mapping[str, npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())

    @property
    def bits_per_weight(self) -> float:
        """8 x packed array bytes / weights: scales and padding are counted."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def decode(self, r0: int = 0, r1: int | None = None) -> F32:
        """float32 rows [r0, r1): the definition of the format."""
        rows, cols = self.shape
        return self.format.decode_rows(self.arrays, rows, cols, r0, rows if r1 is None else r1)

    def validate(self, where: str) -> None:
        """Raises FormatError when the arrays are not the ones that the format asks for.

        Checked are names, types and lengths, and the contents of arrays of indices: what passes is safe to run.
        """
        wanted = self.format.fields(*self.shape)
        if set(wanted) != set(self.arrays):
            raise FormatError(
                f"{where} is stored as {self.format}, which takes the arrays {sorted(wanted)}, "
                f"but has {sorted(self.arrays)}."
            )
        for name, field in wanted.items():
            array = self.arrays[name]
            if not field.fits(array.dtype, array.shape):
                raise FormatError(
                    f"{where}: array '{name}' of {self.format} must be {field.wanted} of {field.numpy}, "
                    f"but is {array.shape} x {array.dtype}."
                )
        if isinstance(self.format, _Indexed):
            self.format.check_arrays(self.arrays, *self.shape, where)


@runtime_checkable
class _Indexed(Protocol):
    """A format with arrays whose contents can be wrong: indices, lengths."""

    def check_arrays(self, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int, where: str) -> None:
        """Raises FormatError when what the arrays hold makes no sense."""


@dataclass(frozen=True)
class PackedSource:
    """What a stored matrix stands for, decoded a few rows at a time."""

    packed: Packed

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    def read(self, r0: int, r1: int) -> F32:
        return self.packed.decode(r0, r1)


def allocate(fmt: Format, rows: int, cols: int) -> dict[str, npt.NDArray[Any]]:
    """Zeroed arrays of the sizes that ``fmt`` asks for."""
    fmt.check(rows, cols)
    return {name: np.zeros(f.length, f.numpy) for name, f in fmt.fields(rows, cols).items()}


@dataclass(frozen=True)
class _Finite:
    """A source that refuses NaN and infinite weights, with their row."""

    source: RowSource
    fmt: Format
    where: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.source.shape

    def read(self, r0: int, r1: int) -> F32:
        w = self.source.read(r0, r1)
        if not np.isfinite(w).all():
            row = r0 + int(np.argmin(np.isfinite(w).all(axis=1)))
            raise FormatError(
                f"{self.where} holds a NaN or an infinity in row {row}, so it cannot be stored as {self.fmt}; "
                "check the checkpoint."
            )
        return w


def encode(fmt: Format, source: RowSource, where: str = "the matrix") -> Packed:
    """Stores a matrix as ``fmt`` says, a few rows at a time.

    Raises FormatError for a shape the format cannot hold and for NaN or infinite weights.
    """
    rows, cols = source.shape
    arrays = allocate(fmt, rows, cols)
    source = _Finite(source, fmt, where)
    state = fmt.prepare(source)
    for r0 in range(0, rows, ROWS_PER_STEP):
        fmt.encode_rows(source.read(r0, min(rows, r0 + ROWS_PER_STEP)), arrays, r0, cols, state)
    return Packed(fmt, (rows, cols), arrays)


def project(fmt: Format, w: F32) -> F32:
    """The matrix that ``fmt`` keeps of ``w``: decode(encode(w)). Applying it twice changes nothing more."""
    return encode(fmt, ArraySource(w)).decode()


def bits_per_weight(fmt: Format, rows: int, cols: int) -> float:
    """8 x packed array bytes / weights for a matrix of this shape."""
    fmt.check(rows, cols)
    return 8 * sum(f.nbytes for f in fmt.fields(rows, cols).values()) / (rows * cols)
