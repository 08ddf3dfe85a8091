"""Writing a plain Hugging Face folder: documents beside one ``model.safetensors`` in float32, float16 or bfloat16."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gossamer.checkpoints.folder import publish
from gossamer.checkpoints.safetensors import quote
from gossamer.checkpoints.safetensors_writer import SafetensorsWriter
from gossamer.errors import ResourceError, UsageError

__all__ = ["PlainTensor", "write_plain"]

F32 = NDArray[np.float32]

_ROWS = 512  # of a matrix, read and rounded at once


@dataclass(frozen=True)
class PlainTensor:
    """A tensor to write: its name, "F32", "F16" or "BF16", its shape, and its float32 rows r0..r1 when asked for.

    A vector is read as its elements r0..r1.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], F32]


def write_plain(out: str | os.PathLike[str], documents: Mapping[str, str], tensors: Sequence[PlainTensor]) -> int:
    """Publishes the folder ``out`` with text files and weights; returns the bytes of the weights' data section.

    Values are rounded to nearest, ties to even. Raises UsageError when ``out`` exists or a value does not fit its
    type, ResourceError when the place cannot be written; nothing is left behind then.
    """
    with publish(out) as folder:
        weights = folder / "model.safetensors"
        try:
            specs = [(t.name, t.dtype, t.shape) for t in tensors]
            with SafetensorsWriter(weights, specs, {"format": "pt"}) as writer:
                for tensor in tensors:
                    per_row = int(np.prod(tensor.shape[1:], dtype=np.int64))
                    for r0 in range(0, tensor.shape[0], _ROWS):
                        rows = tensor.read(r0, min(tensor.shape[0], r0 + _ROWS))
                        writer.write_at(tensor.name, r0 * per_row, _rounded(rows, tensor))
        except ResourceError as error:
            raise ResourceError(str(error).replace(str(weights), str(out))) from None
        for name, content in documents.items():
            (folder / name).write_text(content, encoding="utf-8")
        return writer.data_bytes


def _rounded(rows: F32, tensor: PlainTensor) -> NDArray[np.generic]:
    if tensor.dtype == "F32":
        stored: NDArray[np.generic] = rows
        sound = bool(np.isfinite(rows).all())
    elif tensor.dtype == "F16":
        with np.errstate(over="ignore"):
            stored = rows.astype(np.float16)
        sound = bool(np.isfinite(stored.astype(np.float32)).all())
    elif tensor.dtype == "BF16":
        bits = np.ascontiguousarray(rows).view(np.uint32)
        with np.errstate(over="ignore"):  # of NaN bits only
            halves = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        stored, sound = halves, bool(((halves & 0x7F80) != 0x7F80).all())
    else:
        raise UsageError(f"{quote(tensor.name)} was asked for as {tensor.dtype}; a plain folder takes F32, F16 or BF16")
    if not sound:
        raise UsageError(f"{quote(tensor.name)} holds a value that {tensor.dtype} cannot; write it as F32")
    return stored
