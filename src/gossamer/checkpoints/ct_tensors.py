"""The tensors of compressed-tensors folders: codes, scales and zero points of a site, moved as they are.

    pack-quantized   X.weight_packed int32, codes q + 2^(B-1) in words along a row; X.weight_shape [rows, columns]
    int-quantized    X.weight int8
    float-quantized  X.weight float8 e4m3
    naive-quantized  X.weight, either of these

X.weight_scale is [1], [rows, 1], [rows, groups] or [row tiles, column tiles], by the strategy. X.weight_zero_point, of
asymmetric weights, is like it; pack-quantized stores it in words along a column, so [words, groups]. X.weight_g_idx,
of old files with activation order, is the group of each column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.checkpoints.ct_scheme import Arguments, Scheme, read_config, scheme_of
from gossamer.checkpoints.folder import Folder
from gossamer.checkpoints.stored import QuantizedTensors, StoredSite, coded, ordered
from gossamer.checkpoints.words import unpack_words, words
from gossamer.errors import CheckpointError
from gossamer.formats.coded import Coded, Parts

__all__ = ["CompressedTensors"]

U8 = NDArray[np.uint8]
_INTS = ("I32", "U32")


class CompressedTensors(QuantizedTensors):
    def __init__(self, folder: Folder, config: Mapping[str, Any], where: str) -> None:
        super().__init__(folder, where)
        self._schemes, self._ignore = read_config(config, where)

    def site(self, name: str, kind: str, rows: int, cols: int) -> StoredSite | None:
        scheme = scheme_of(name, kind, self._schemes, self._ignore)
        if scheme is None:
            return None
        weights, packed = scheme.weights, scheme.format == "pack-quantized"
        codes = f"{name}.weight_packed" if packed else f"{name}.weight"
        tensors = [codes, f"{name}.weight_scale"]
        if packed:
            self.expect(codes, _INTS, (rows, words(cols, weights.bits)))
            tensors += self._shape(name, rows, cols)
        else:
            self.expect(codes, ("I8",) if weights.kind == "int" else ("F8_E4M3",), (rows, cols))
        tile, width = _tile(weights)
        scale, shapes = f"{name}.weight_scale", _shapes(weights, rows, cols)
        number = "e4m3" if weights.kind == "float" else f"{'int' if weights.symmetric else 'uint'}{weights.bits}"
        fmt = coded(self.where, number, tile, width, self.scales(scale, *shapes), not weights.symmetric)
        zeros, more = self._zeros(name, scheme, rows, shapes)
        order, indices = self._order(name, weights, cols)
        static, inputs = self._static(name, scheme)
        tensors += more + indices + inputs

        def parts(r0: int, r1: int) -> Parts:
            found = self._codes(codes, weights, packed, cols, r0, r1)
            if order is not None:
                found = found[:, order]
            stored = self.raw(scale)
            if fmt.group.shared:
                per_group = stored.reshape(fmt.matrix(rows, cols))
            else:
                per_group = stored[r0:r1].reshape(r1 - r0, -1)
            self.finite(per_group, scale)
            zero = None if zeros is None else _per_row(zeros, fmt, rows, cols)[r0:r1]
            return Parts(found, per_group, zero, None, fmt.group.shared)

        return StoredSite(fmt, scheme.input(self.where, static), tuple(tensors), parts, order)

    def _shape(self, name: str, rows: int, cols: int) -> list[str]:
        shape = f"{name}.weight_shape"
        if shape not in self.folder.tensors:
            return []
        self.expect(shape, ("I32", "I64"), (2,))
        if self.folder.raw(shape).tolist() != [rows, cols]:
            raise CheckpointError(
                f"{self.folder.path.name}: tensor '{shape}' says {self.folder.raw(shape).tolist()}, but the "
                f"configuration asks for {[rows, cols]}."
            )
        return [shape]

    def _codes(self, name: str, weights: Arguments, packed: bool, cols: int, r0: int, r1: int) -> U8:
        if packed:
            return unpack_words(self.raw(name)[r0:r1], weights.bits, cols)
        raw = self.raw(name)[r0:r1]
        if weights.kind == "int":
            return raw.view(np.uint8) ^ np.uint8(0x80)
        if ((raw & 0x7F) == 0x7F).any():
            raise CheckpointError(f"{self.folder.path.name}: tensor '{name}' holds a NaN; check the file.")
        return np.ascontiguousarray(raw)

    def _zeros(
        self, name: str, scheme: Scheme, rows: int, shapes: tuple[tuple[int, ...], ...]
    ) -> tuple[U8 | None, list[str]]:
        """Zero points as unsigned codes, [rows or 1, groups]; those that symmetric weights may carry must be 0."""
        zero, weights = f"{name}.weight_zero_point", scheme.weights
        if weights.symmetric:
            if zero not in self.folder.tensors:
                return None, []
            self.expect(zero, ("I8", "I32", "F8_E4M3", "BF16", "F16", "F32"), *shapes)
            if np.any(self.folder.read(zero)):
                raise CheckpointError(
                    f"{self.folder.path.name}: tensor '{zero}' is not zero, though the weights are called symmetric."
                )
            return None, [zero]
        middle, groups = 1 << (weights.bits - 1), shapes[0][-1]
        line = (words(rows, weights.bits), groups)
        packed = scheme.format == "pack-quantized" and weights.strategy != "tensor"
        if packed and self.expect(zero, ("I32", "U32", "I8"), line, *shapes) != "I8":
            self.expect(zero, _INTS, line)
            lines = np.ascontiguousarray(self.raw(zero).T)
            return np.ascontiguousarray(unpack_words(lines, weights.bits, rows).T), [zero]
        self.expect(zero, ("I8",), *shapes)
        codes = self.folder.raw(zero).astype(np.int16) + middle
        if codes.size and not 0 <= codes.min() <= codes.max() < 2 * middle:
            raise CheckpointError(f"{self.folder.path.name}: tensor '{zero}' holds more than {weights.bits} bits.")
        return codes.astype(np.uint8).reshape(-1, groups), [zero]

    def _order(self, name: str, weights: Arguments, cols: int) -> tuple[NDArray[np.uint32] | None, list[str]]:
        index = f"{name}.weight_g_idx"
        if index not in self.folder.tensors:
            return None, []
        self.expect(index, ("I32", "I64"), (cols,))
        groups = self.folder.raw(index)
        if (groups == -1).all():  # what files write that have no order
            return None, [index]
        found = ordered(groups, weights.group or cols)
        if isinstance(found, str):
            raise self.unsupported(f"orders the columns of '{name}' by activations, but '{index}' {found}")
        return found, [index]

    def _static(self, name: str, scheme: Scheme) -> tuple[float | None, list[str]]:
        """The stored scale of inputs, where it is fixed."""
        inputs = scheme.inputs
        if inputs is None or inputs.dynamic:
            return None, []
        scale, zero = f"{name}.input_scale", f"{name}.input_zero_point"
        self.scales(scale, (1,), ())
        value = float(self.folder.read(scale).ravel()[0])
        if not np.finfo(np.float32).tiny <= value:
            raise CheckpointError(f"{self.folder.path.name}: tensor '{scale}' is {value:g}, which must be above 0.")
        if zero not in self.folder.tensors:
            return value, [scale]
        if self.folder.tensors[zero].nbytes > 64 or np.any(self.folder.read(zero)):
            raise self.unsupported(f"has inputs of '{name}' with a zero point though they are called symmetric")
        return value, [scale, zero]


def _tile(a: Arguments) -> tuple[int | None, int | None]:
    """Rows and columns that share a scale."""
    if a.strategy == "block":
        assert a.block is not None
        return a.block
    return {"tensor": (None, None), "channel": (1, None), "group": (1, a.group)}[a.strategy]


def _shapes(a: Arguments, rows: int, cols: int) -> tuple[tuple[int, ...], ...]:
    """The shapes that a tensor of scales may have."""
    if a.strategy == "tensor":
        return ((1,), (1, 1), ())
    if a.strategy == "channel":
        return ((rows, 1), (rows,))
    height, width = (1, a.group) if a.strategy == "group" else (a.block or (1, 1))
    return ((-(-rows // height), -(-cols // (width or cols))),)


def _per_row(zeros: U8, fmt: Coded, rows: int, cols: int) -> U8:
    return np.broadcast_to(zeros, (rows, fmt.groups(cols)))
