"""Random matrices stored in any format, made about as fast as memory is filled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.formats import (
    ArraySource,
    Coded,
    Cols,
    Composite,
    Format,
    KMeans,
    Mask,
    Packed,
    Permute,
    Planes,
    Rows,
    Scale,
    encode,
    weight_of,
)
from gossamer.formats.composite import padded
from gossamer.formats.layout import under
from gossamer.formats.node import PANEL

__all__ = ["RandomMatrices", "random_matrix"]

F32 = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]

_SAMPLE = 1 << 18  # weights that are encoded; a matrix repeats them


def random_matrix(fmt: Format, rows: int, cols: int) -> Packed:
    """A matrix of random weights stored as ``fmt``. Raises FormatError for a shape that the format cannot hold.

    A quarter of a million normal weights of deviation 1/sqrt(cols) are encoded, and their codes and scales repeated.
    The parts of a composite format are made one by one, so that they do not add up to anything; columns and rows of
    splits are chosen at random.
    """
    return RandomMatrices().make(fmt, rows, cols)


class RandomMatrices:
    """Makes packed random matrices; what is encoded for one is kept for the next."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.blocks: dict[tuple[str, int], tuple[F32, Packed]] = {}

    def make(self, fmt: Format, rows: int, cols: int) -> Packed:
        """As ``random_matrix``, with memory of its own."""
        fmt.check(rows, cols)
        return Packed(fmt, (rows, cols), self._arrays(fmt, rows, cols))

    def _arrays(self, fmt: Format, rows: int, cols: int) -> Arrays:
        if isinstance(fmt, Mask):
            return self._mask(fmt, rows, cols)
        if isinstance(fmt, Composite) and not isinstance(fmt, Planes):
            arrays = self._own(fmt, rows, cols)
            for prefix, branch, r, c in fmt.children(rows, cols):
                inner = self._arrays(weight_of(branch), r, c)
                arrays |= {prefix + name: array for name, array in inner.items()}
            return arrays
        return self._leaf(fmt, rows, cols)

    def _own(self, fmt: Composite, rows: int, cols: int) -> Arrays:
        """What a composite format stores beside its parts."""
        if isinstance(fmt, (Cols, Rows)):
            order = self.random.permutation(cols if isinstance(fmt, Cols) else rows).astype("<u4")
            ends = np.cumsum(fmt.counts)
            return {"index": padded(np.concatenate([np.sort(part) for part in np.split(order, ends)[:-1]]))}
        if isinstance(fmt, Permute):
            return {"index": padded(self.random.permutation(cols).astype("<u4"))}
        if isinstance(fmt, Scale):
            return {"factors": padded(np.ones(cols, "<f4"))}
        return {}

    def _block(self, fmt: Format, cols: int) -> tuple[F32, Packed]:
        """Some whole panels of weights, and what they are stored as."""
        key = (str(fmt), cols)
        if key not in self.blocks:
            rows = PANEL * max(1, _SAMPLE // (PANEL * cols))
            values = self.random.standard_normal((rows, cols), np.float32) / np.float32(math.sqrt(cols))
            self.blocks[key] = values, encode(fmt, ArraySource(values))
        return self.blocks[key]

    def _leaf(self, fmt: Format, rows: int, cols: int) -> Arrays:
        values, block = self._block(fmt, cols)
        panel = {name: field.used for name, field in fmt.fields(PANEL, cols).items()}
        used = {name: field.used for name, field in fmt.fields(rows, cols).items()}
        by_panel = used == {name: size * -(-rows // PANEL) for name, size in panel.items()}
        if not by_panel and not isinstance(fmt, (Coded, KMeans, Planes)):
            return dict(encode(fmt, _Repeated(values, rows)).arrays)
        arrays = {name: np.zeros(f.length, f.numpy) for name, f in fmt.fields(rows, cols).items()}
        stored = {name: block.arrays[name][: field.used] for name, field in fmt.fields(*values.shape).items()}
        for name, size in used.items():
            # Scales that rows share are fewer than panels; those of the block fit any other rows like these.
            _repeat(stored[name], arrays[name][:size])
        if isinstance(fmt, Coded) and fmt.group.shared:
            self._shared(fmt, block, arrays, rows, cols)
        if rows % PANEL and by_panel:  # the rows past the end are zeros
            end = encode(fmt, ArraySource(values[: rows % PANEL]))
            for name, size in panel.items():
                arrays[name][rows // PANEL * size : used[name]] = end.arrays[name][:size]
        return arrays

    def _shared(self, fmt: Coded, block: Packed, arrays: Arrays, rows: int, cols: int) -> None:
        """Nested scales of tiles: those of the block may not fill a panel, so their values are stored anew."""
        for name, inner in (("scales.", fmt.scale), ("mins.", fmt.minimum)):
            if isinstance(inner, Coded):
                found = inner.decode_rows(under(block.arrays, name), *(shape := fmt.matrix(*block.shape)), 0, shape[0])
                values = np.resize(found, fmt.matrix(rows, cols))
                arrays |= {name + key: array for key, array in encode(inner, ArraySource(values)).arrays.items()}

    def _mask(self, fmt: Mask, rows: int, cols: int) -> Arrays:
        """The slots of some panels, over and over."""
        values, block = self._block(fmt, cols)
        panels, per = -(-rows // PANEL), len(values) // PANEL
        starts = block.arrays["starts"][: per + 1].astype(np.int64)
        counts = np.resize(np.diff(starts), panels)
        ends = np.concatenate([[0], np.cumsum(counts)])
        arrays: Arrays = {"starts": padded(ends.astype("<u4"))}
        for name in ("index", "values"):
            filled = np.empty(int(ends[-1]) * PANEL, block.arrays[name].dtype)
            _repeat(block.arrays[name][: int(starts[-1]) * PANEL], filled)
            arrays[name] = padded(filled)
        if rows % PANEL:  # lanes past the last row are empty
            last = arrays["index"][int(ends[-2]) * PANEL : int(ends[-1]) * PANEL].reshape(-1, PANEL)
            last[:, rows % PANEL :] = np.iinfo(last.dtype).max
            tail = arrays["values"][int(ends[-2]) * PANEL : int(ends[-1]) * PANEL].reshape(-1, PANEL)
            tail[:, rows % PANEL :] = 128 if fmt.stored == "int8" else 0
        if "scales" in block.arrays:
            arrays["scales"] = block.arrays["scales"].copy()
        return arrays


def _repeat(source: npt.NDArray[Any], into: npt.NDArray[Any]) -> None:
    for start in range(0, len(into) if len(source) else 0, len(source) or 1):
        count = min(len(source), len(into) - start)
        into[start : start + count] = source[:count]


class _Repeated:
    """A few rows over and over, as a matrix of ``rows`` rows that is never in memory as a whole."""

    def __init__(self, values: F32, rows: int) -> None:
        self.values, self.shape = values, (rows, int(values.shape[1]))

    def read(self, r0: int, r1: int) -> F32:
        return self.values[np.arange(r0, r1) % len(self.values)]
