"""Unstructured sparsity: ``mask(P%: F)`` keeps the largest P percent of the entries, wherever they are.

Kept are the round(P/100 * rows * cols) entries (halves up) of largest |w|, those that come first among equal ones;
zeros are not stored. F is f32, f16, bf16 or int8/tensor. Sliced ELLPACK over panels of 16 rows: a panel has as many
slots as its fullest row has entries, and slot by slot each of the 16 lanes holds the next entry of its row.

    starts   U32 [panels + 1]: the first slot of each panel; the last one is the number of slots
    index    U16 [slot][16 rows], U32 where there are more than 65535 columns: the column, ascending along a lane;
             all ones in an empty lane
    values   F32, F16, BF16 or U8 [slot][16 rows]: the entry; 0 in an empty lane (int8: the code c of s * (c - 128),
             128 in an empty lane)
    scales   F32 [1], int8/tensor alone: s, which puts the largest entry on code 0

How many slots there are depends on the matrix. From the shape alone they are estimated: with m = P/100 * cols the mean
of a row, ceil(m + 3 sqrt(m) + 2) slots a panel, at most the columns. Entries that lie at random stay below (the fullest
of 16 rows is about m + 1.8 sqrt(m)); entries heaped in a few rows can take more. Hint ``entries``: bool [rows, cols],
which to keep, no more than P percent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import FormatError
from gossamer.formats import halves
from gossamer.formats.composite import (
    F32,
    MAX_INDEX,
    Arrays,
    Branch,
    Composite,
    Hints,
    padded,
    text,
    weight_of,
)
from gossamer.formats.node import ALIGN, PANEL, Field

__all__ = ["MAX_PERCENT", "PERCENT_DIGITS", "Mask"]

MAX_PERCENT = 5.0  # beyond it other formats are smaller
PERCENT_DIGITS = 4
VALUES = ("f32", "f16", "bf16", "int8/tensor")
UNIT: int = 10**PERCENT_DIGITS
MAX_SHORT = 0xFFFF  # columns that U16 can name beside the mark of an empty lane
_NONE = {"U16": 0xFFFF, "U32": 0xFFFFFFFF}  # that mark


@dataclass(frozen=True)
class Mask(Composite):
    """The largest ``percent`` of the entries in the number format ``inner``."""

    percent: float
    inner: Branch

    hints = ("entries",)

    def __post_init__(self) -> None:
        fine = math.isfinite(self.percent) and round(self.percent * UNIT) / UNIT == self.percent
        if not fine or not 0 < self.percent <= MAX_PERCENT:
            raise FormatError(
                f"mask({self.percent!r}%: ...) cannot be; a mask keeps more than 0 and at most {MAX_PERCENT:g} "
                f"percent, with at most {PERCENT_DIGITS} digits after the point, such as mask(0.5%: f16)."
            )
        if self._number not in VALUES:
            raise FormatError(f"a mask stores its entries as one of {', '.join(VALUES)}, not as '{self._number}'.")
        super().__post_init__()

    def __str__(self) -> str:
        percent = f"{self.percent:.{PERCENT_DIGITS}f}".rstrip("0").rstrip(".")
        return f"mask({percent}%: {text(self.inner)})"

    @property
    def _number(self) -> str:
        return str(weight_of(self.inner))

    @property
    def stored(self) -> str:
        """The number its values are stored as: f32, f16, bf16 or int8."""
        return self._number.partition("/")[0]

    @property
    def parts(self) -> tuple[tuple[str, Branch], ...]:
        return (("0", self.inner),)

    def children(self, rows: int, cols: int) -> list[tuple[str, Branch, int, int]]:
        return []  # the entries lie in arrays of the mask's own

    # ------------------------------------------------------------ shape

    def count(self, rows: int, cols: int) -> int:
        """Entries that are kept: P/100 * rows * cols, halves rounded up."""
        units: int = round(self.percent * UNIT)
        return (units * rows * cols + 50 * UNIT) // (100 * UNIT)

    def check_shape(self, rows: int, cols: int) -> None:
        if cols > MAX_INDEX or self.count(rows, cols) > MAX_INDEX:
            raise FormatError(f"{self} cannot number the entries of a {rows} x {cols} matrix; use fewer.")

    def own_fields(self, rows: int, cols: int) -> dict[str, Field]:
        panels = -(-rows // PANEL)
        mean = self.percent / 100 * cols
        slots = panels * min(cols, math.ceil(mean + 3 * math.sqrt(mean) + 2))
        kinds = {"f32": "F32", "f16": "F16", "bf16": "BF16", "int8/tensor": "U8"}
        fields: dict[str, Field] = {
            "starts": Field("U32", panels + 1),
            "index": Field(_index_type(cols), slots * PANEL, exact=False),
            "values": Field(kinds[self._number], slots * PANEL, exact=False),
        }
        if self._number == "int8/tensor":
            fields["scales"] = Field("F32", 1)
        return fields

    # ------------------------------------------------------------ values

    def encode_matrix(self, w: F32, hints: Hints) -> dict[str, npt.NDArray[Any]]:
        rows, cols = w.shape
        panels = -(-rows // PANEL)
        row, col = np.divmod(self._kept(w, hints), cols)
        per_row = np.bincount(row, minlength=panels * PANEL)
        starts = np.concatenate([[0], np.cumsum(per_row.reshape(panels, PANEL).max(axis=1))])
        place = np.arange(len(row)) - (np.cumsum(per_row) - per_row)[row]  # which of its row's entries each one is
        slot, lane = starts[row // PANEL] + place, row % PANEL
        index = np.full((int(starts[-1]), PANEL), _NONE[_index_type(cols)], np.int64)
        index[slot, lane] = col
        kept, empty, own = self._store(w[row, col])
        values = np.full(index.shape, empty, kept.dtype)
        values[slot, lane] = kept
        return {
            "starts": padded(starts.astype("<u4")),
            "index": padded(index.astype("<u2" if cols <= MAX_SHORT else "<u4")),
            "values": padded(values),
            **own,
        }

    def _kept(self, w: F32, hints: Hints) -> npt.NDArray[np.int64]:
        """Flat positions of the entries to store, ascending."""
        count = self.count(*w.shape)
        if "entries" in hints:
            entries = np.asarray(hints["entries"])
            if entries.shape != w.shape or entries.dtype != bool or np.count_nonzero(entries) > count:
                raise FormatError(
                    f"the hint 'entries' of {self} must be {w.shape[0]} x {w.shape[1]} truth values with at most "
                    f"{count} true ones."
                )
            return np.flatnonzero(entries & (w != 0))
        size = np.abs(w).ravel()
        if count == 0:
            return np.empty(0, np.int64)
        least = np.partition(size, len(size) - count)[len(size) - count]
        above = np.flatnonzero(size > least)
        ties = np.flatnonzero(size == least)[: count - len(above)] if least > 0 else above[:0]
        return np.sort(np.concatenate([above, ties]))

    def _store(self, x: F32) -> tuple[npt.NDArray[Any], int, dict[str, npt.NDArray[Any]]]:
        """Entries [n] as they are stored, what an empty lane holds, and the arrays beside them."""
        if self._number != "int8/tensor":
            return halves.from_float(x, self._number), 0, {}
        extreme = x[np.abs(x).argmax()] if len(x) else np.float32(0)
        s = np.float32(extreme / np.float32(-128))
        codes = np.clip(np.rint(x / s if s else np.zeros_like(x)) + 128, 0, 255).astype(np.uint8)
        return codes, 128, {"scales": padded(np.array([s], "<f4"))}

    def entries(self, arrays: Arrays, rows: int, cols: int, p0: int, p1: int) -> tuple[Any, Any, F32]:
        """Row (from the first one of panel p0), column and float32 value of every entry of the panels p0..p1."""
        starts = arrays["starts"][p0 : p1 + 1].astype(np.int64)
        first, last = int(starts[0]), int(starts[-1])
        index = arrays["index"][first * PANEL : last * PANEL].reshape(-1, PANEL)
        panel = np.repeat(np.arange(p1 - p0), np.diff(starts))
        slot, lane = np.nonzero(index != np.iinfo(index.dtype).max)
        stored = arrays["values"][first * PANEL : last * PANEL].reshape(-1, PANEL)[slot, lane]
        if self._number == "int8/tensor":
            value: F32 = arrays["scales"][0] * (stored.astype(np.float32) - np.float32(128))
        else:
            value = halves.to_float(stored, self._number)
        return panel[slot] * PANEL + lane, index[slot, lane], value

    def decode_rows(self, arrays: Arrays, rows: int, cols: int, r0: int, r1: int) -> F32:
        p0, p1 = r0 // PANEL, -(-r1 // PANEL)
        out = np.zeros((max(p1 - p0, 0) * PANEL, cols), np.float32)
        if r0 < r1:
            row, col, value = self.entries(arrays, rows, cols, p0, p1)
            out[row, col] = value
        return out[r0 - p0 * PANEL : r1 - p0 * PANEL]

    def check_own(self, arrays: Arrays, rows: int, cols: int, where: str) -> None:
        panels = -(-rows // PANEL)
        starts = arrays["starts"][: panels + 1].astype(np.int64)
        slots = int(starts[-1])
        if starts[0] or (np.diff(starts) < 0).any():
            raise FormatError(f"{where}: array 'starts' of {self} must begin with 0 and never fall.")
        for name in ("index", "values"):
            array = arrays[name]
            per = ALIGN // array.dtype.itemsize
            need = max(1, -(-slots * PANEL // per)) * per
            if len(array) != need:
                raise FormatError(
                    f"{where}: array '{name}' of {self} must be {need} long for {slots} slots, but is {len(array)}."
                )
        index = arrays["index"][: slots * PANEL].reshape(-1, PANEL)
        filled = index != np.iinfo(index.dtype).max
        if slots and (index[filled].max(initial=0) >= cols or not self._ascends(index, filled, starts)):
            raise FormatError(
                f"{where}: array 'index' of {self} must name columns below {cols}, ascending along each row, "
                "with empty lanes last."
            )
        lanes = rows - (panels - 1) * PANEL
        if filled[starts[-2] :, lanes:].any():
            raise FormatError(f"{where}: array 'index' of {self} has entries past the last row.")

    @staticmethod
    def _ascends(index: npt.NDArray[Any], filled: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]) -> bool:
        """Whether along each lane of each panel the columns climb; all ones, an empty lane, may repeat at the end."""
        same_panel = np.ones(len(index) - 1, bool)
        borders = starts[1:-1]
        same_panel[borders[(borders > 0) & (borders < len(index))] - 1] = False
        climbs = (index[1:] > index[:-1]) | ~filled[1:]
        return bool(climbs[same_panel].all()) and not bool((filled[1:] & ~filled[:-1])[same_panel].any())


def _index_type(cols: int) -> str:
    return "U16" if cols <= MAX_SHORT else "U32"
