"""Formats added: ``A + B + ...``.

Each part encodes what the parts before it leave of the matrix, so a mask or a low-rank part holds corrections.
decode adds the parts from the first to the last in float32. Arrays: those of each part, "0.", "1.", ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats.composite import (
    F32,
    Arrays,
    Branch,
    Composite,
    Hints,
    SiteFormat,
    decode_branch,
    encode_branch,
    refuse_infinite,
)
from gossamer.formats.node import Format

__all__ = ["MAX_TERMS", "Sum"]

MAX_TERMS = 8


@dataclass(frozen=True)
class Sum(Composite):
    """Two or more formats whose decoded matrices are added."""

    terms: tuple[Format, ...]

    flat = True  # terms stand beside each other, so a sum adds nothing to the depth

    def __post_init__(self) -> None:
        if not 2 <= len(self.terms) <= MAX_TERMS:
            raise FormatError(f"a sum has 2 to {MAX_TERMS} terms, not {len(self.terms)}.")
        if any(isinstance(t, (Sum, SiteFormat)) for t in self.terms):
            raise FormatError("a term of a sum is no sum itself and has no '@' of its own.")
        super().__post_init__()

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms))

    @property
    def parts(self) -> tuple[tuple[str, Branch], ...]:
        return tuple((str(i), term) for i, term in enumerate(self.terms))

    def encode_matrix(self, w: F32, hints: Hints) -> dict[str, npt.NDArray[Any]]:
        arrays: dict[str, npt.NDArray[Any]] = {}
        rest = w
        for i, term in enumerate(self.terms):
            name = str(i)
            inner = encode_branch(term, rest, hints.get(name, {}))
            arrays.update({f"{name}.{key}": a for key, a in inner.items()})
            if i < len(self.terms) - 1:
                with np.errstate(over="ignore"):
                    rest = rest - term.decode_rows(inner, len(w), w.shape[1], 0, len(w))
                refuse_infinite(rest, self, "what the first parts leave")
        return arrays

    def decode_rows(self, arrays: Arrays, rows: int, cols: int, r0: int, r1: int) -> F32:
        total: F32 = np.zeros((r1 - r0, cols), np.float32)
        for i, (name, term) in enumerate(self.parts):
            part = decode_branch(term, arrays, f"{name}.", rows, cols, r0, r1)
            if i:
                total += part
            else:
                total = part
        return total
