"""What formats made of formats share: the branches, their arrays, encoding a whole matrix with hints.

A branch is a format, or a ``SiteFormat`` where an ``@`` inside the expression says what that branch's input is rounded
to; a bare format takes what the site around it says. The arrays of a branch carry its number and a dot: "0.q4".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats.dense import Dense
from gossamer.formats.inputs import DEFAULT_INPUT, InputFormat
from gossamer.formats.layout import under
from gossamer.formats.node import (
    ALIGN,
    ROWS_PER_STEP,
    ArraySource,
    Field,
    Format,
    Packed,
    RowSource,
    encode,
)

if TYPE_CHECKING:
    from gossamer.ops import Kernel

__all__ = [
    "MAX_DEPTH",
    "Branch",
    "Composite",
    "SiteFormat",
    "encode_with",
    "leaves",
    "resolve",
    "weight_of",
]

F32 = npt.NDArray[np.float32]
Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
Hints: TypeAlias = Mapping[str, Any]

MAX_DEPTH = 3  # formats inside formats
MAX_INDEX = (1 << 32) - 1  # what an index array can hold


@dataclass(frozen=True)
class SiteFormat:
    """How a linear site's weight is stored and what its input is rounded to before it is multiplied."""

    weight: Format
    input: InputFormat = DEFAULT_INPUT

    def __post_init__(self) -> None:
        if self.input.quantized and isinstance(self.weight, Dense):
            raise FormatError(
                f"'{self.weight} @ {self.input}' cannot run: integer inputs need an integer weight such as "
                "int8/g32; use @ bf16 or @ f32."
            )

    def __str__(self) -> str:
        return str(self.weight) if self.input == DEFAULT_INPUT else f"{self.weight} @ {self.input}"


Branch: TypeAlias = Format | SiteFormat


def weight_of(branch: Branch) -> Format:
    return branch.weight if isinstance(branch, SiteFormat) else branch


def resolve(branch: Branch, outer: InputFormat) -> tuple[Format, InputFormat]:
    """The weight of a branch and its input format: its own, or the one around it."""
    return (branch.weight, branch.input) if isinstance(branch, SiteFormat) else (branch, outer)


def text(branch: Branch) -> str:
    """A branch inside an expression: an '@' that was written there stays, whatever the one around it is."""
    return f"{branch.weight} @ {branch.input}" if isinstance(branch, SiteFormat) else str(branch)


class Composite(ABC):
    """Base of the formats that are made of formats. The parts are encoded from the whole matrix in memory."""

    # What ``encode_with`` may be told about this node, beside one mapping of hints for each branch ("0", "1", ...).
    hints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if depth(self) > MAX_DEPTH:
            raise FormatError(f"'{shorten(str(self))}' nests formats more than {MAX_DEPTH} deep; write it flatter.")

    @property
    @abstractmethod
    def parts(self) -> tuple[tuple[str, Branch], ...]:
        """The branches with their names, in the order in which they are printed."""

    def children(self, rows: int, cols: int) -> list[tuple[str, Branch, int, int]]:
        """(prefix of its arrays, branch, rows, columns) of every matrix stored inside one of this shape."""
        return [(f"{name}.", branch, rows, cols) for name, branch in self.parts]

    @property
    def integer(self) -> bool:
        return any(weight_of(branch).integer for _, branch in self.parts)

    # ------------------------------------------------------------ shape

    def check(self, rows: int, cols: int) -> None:
        if rows < 1 or cols < 1:
            raise FormatError(f"{self} needs at least one row and one column, not {rows} x {cols}.")
        self.check_shape(rows, cols)
        for _, branch, r, c in self.children(rows, cols):
            weight_of(branch).check(r, c)

    def check_shape(self, rows: int, cols: int) -> None:  # noqa: B027 (most nodes ask nothing)
        """What this node itself asks of the shape."""

    def own_fields(self, rows: int, cols: int) -> dict[str, Field]:
        """The arrays beside those of the branches."""
        return {}

    def fields(self, rows: int, cols: int) -> dict[str, Field]:
        fields = self.own_fields(rows, cols)
        for prefix, branch, r, c in self.children(rows, cols):
            fields.update({prefix + name: field for name, field in weight_of(branch).fields(r, c).items()})
        return fields

    # ------------------------------------------------------------ values

    @abstractmethod
    def encode_matrix(self, w: F32, hints: Hints) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a finite float32 matrix [rows, cols] of a shape that ``check`` allows."""

    def prepare(self, source: RowSource) -> dict[str, npt.NDArray[Any]]:
        """All arrays: the parts are found from the whole matrix, which is read into memory."""
        rows, cols = source.shape
        w = np.empty((rows, cols), np.float32)
        for r in range(0, rows, ROWS_PER_STEP):
            w[r : r + ROWS_PER_STEP] = source.read(r, min(rows, r + ROWS_PER_STEP))
        return self.encode_matrix(w, {})

    def encode_rows(
        self, w: F32, into: Arrays, first_row: int, cols: int, state: dict[str, npt.NDArray[Any]]
    ) -> None:
        """Puts the arrays that ``prepare`` made in the place of the ones allocated, whose lengths may be estimates."""
        assert isinstance(into, dict)
        into.update(state)

    @abstractmethod
    def decode_rows(self, arrays: Arrays, rows: int, cols: int, r0: int, r1: int) -> F32:
        """float32 [r1 - r0, cols]: what the arrays mean."""

    def kernel(self, arrays: Arrays, rows: int, cols: int) -> Kernel | None:
        return None  # a site runs the parts one by one

    def check_arrays(self, arrays: Arrays, rows: int, cols: int, where: str) -> None:
        """Raises FormatError when indices or lengths inside arrays of the right types do not make sense."""
        self.check_own(arrays, rows, cols, where)
        for prefix, branch, r, c in self.children(rows, cols):
            weight = weight_of(branch)
            if isinstance(weight, Composite):
                weight.check_arrays(under(arrays, prefix), r, c, where)

    def check_own(self, arrays: Arrays, rows: int, cols: int, where: str) -> None:  # noqa: B027 (likewise)
        """``check_arrays`` for the arrays of this node itself."""


def depth(branch: Branch) -> int:
    """How many formats a branch nests: 0 for a leaf; the terms of a sum stand beside each other."""
    weight = weight_of(branch)
    if not isinstance(weight, Composite):
        return 0
    deepest = max((depth(b) for _, b in weight.parts), default=0)
    return deepest + (0 if getattr(weight, "flat", False) else 1)


def shorten(words: str, limit: int = 60) -> str:
    return words if len(words) <= limit else words[: limit - 3] + "..."


def leaves(fmt: Format, rows: int, cols: int, prefix: str = "") -> Iterator[tuple[str, Format, int, int]]:
    """Every stored matrix inside a format: (prefix of its arrays, format, rows, columns)."""
    children = fmt.children(rows, cols) if isinstance(fmt, Composite) else []
    if not children:
        yield prefix, fmt, rows, cols
    for inner, branch, r, c in children:
        yield from leaves(weight_of(branch), r, c, prefix + inner)


def refuse_hints(fmt: Format, hints: Hints) -> None:
    """Raises FormatError for a hint that the format does not know."""
    known = fmt.hints if isinstance(fmt, Composite) else ()
    names = {name for name, _ in fmt.parts} if isinstance(fmt, Composite) else set()
    if unknown := sorted(set(hints) - set(known) - names):
        takes = ", ".join(f"'{h}'" for h in known) or "none of its own"
        raise FormatError(f"{fmt} takes no hint '{shorten(str(unknown[0]))}'; its hints: {takes}.")


def encode_branch(branch: Branch, w: F32, hints: Hints) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a branch; ``hints`` are those for this branch."""
    fmt = weight_of(branch)
    w = np.ascontiguousarray(w, np.float32)
    refuse_hints(fmt, hints)
    if isinstance(fmt, Composite):
        return fmt.encode_matrix(w, hints)
    return dict(encode(fmt, ArraySource(w)).arrays)


def encode_parts(
    pieces: Mapping[str, tuple[Branch, F32]], hints: Hints, own: Arrays | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Encodes one matrix for each named branch and puts the arrays together after the node's own."""
    arrays = dict(own or {})
    for name, (branch, w) in pieces.items():
        inner = encode_branch(branch, w, hints.get(name, {}))
        arrays.update({f"{name}.{key}": a for key, a in inner.items()})
    return arrays


def decode_branch(branch: Branch, arrays: Arrays, prefix: str, rows: int, cols: int, r0: int, r1: int) -> F32:
    return weight_of(branch).decode_rows(under(arrays, prefix), rows, cols, r0, r1)


def encode_with(fmt: Format, w: F32, hints: Hints | None = None, where: str = "the matrix") -> Packed:
    """Stores a matrix in memory, float32 [rows, cols], with hints from whoever knows more than the weights.

    ``hints`` maps the names that a node knows (``columns`` and ``rows`` of splits, ``order`` of permute, ``factors``
    of scale and rank, ``entries`` of mask) to values, and the number of a branch ("0", "1", ...) to the hints for it.
    Raises FormatError for a shape the format cannot hold, NaN or infinite weights, and hints that do not fit.
    """
    rows, cols = w.shape
    fmt.check(rows, cols)
    refuse_infinite(w, fmt, where)
    return Packed(fmt, (rows, cols), encode_branch(fmt, w, hints or {}))


def refuse_infinite(w: F32, fmt: Format, where: str) -> None:
    finite = np.isfinite(w).all(axis=1)
    if not finite.all():
        raise FormatError(
            f"{where} holds a NaN or an infinity in row {int(np.argmin(finite))}, so it cannot be stored as {fmt}; "
            "check the checkpoint."
        )


# ---------------------------------------------------------------- arrays of a node's own


def padded(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A flat copy, zero-padded to 64 bytes, and never empty."""
    per = ALIGN // values.dtype.itemsize
    out = np.zeros(max(1, -(-values.size // per)) * per, values.dtype)
    out[: values.size] = values.ravel()
    return out


def chosen(given: Any, count: int, size: int, what: str) -> npt.NDArray[np.uint32]:
    """A hint that lists ``count`` different numbers below ``size``, as they were given."""
    index = np.asarray(given)
    ok = index.ndim == 1 and index.dtype.kind in "iu" and len(index) == count
    if not ok or (count and (index.min() < 0 or index.max() >= size)) or len(np.unique(index)) != count:
        raise FormatError(f"the hint '{what}' must list {count} different numbers from 0 to {size - 1}.")
    return index.astype(np.uint32)


def largest(score: npt.NDArray[Any], count: int) -> npt.NDArray[np.uint32]:
    """Where the ``count`` largest are, ascending; of equal ones those that come first."""
    order = np.argsort(-score, kind="stable")[:count]
    return np.sort(order).astype(np.uint32)
