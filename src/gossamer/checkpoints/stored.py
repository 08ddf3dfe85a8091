"""A site as another program's folder stores it: its expression, its tensors, and its codes and scales by rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.checkpoints.folder import Folder
from gossamer.checkpoints.safetensors import quote
from gossamer.errors import CheckpointError, FormatError, UnsupportedError
from gossamer.formats import halves
from gossamer.formats.coded import Coded, Group, Parts
from gossamer.formats.inputs import InputFormat
from gossamer.formats.numbers import number

__all__ = ["SCALES", "QuantizedTensors", "StoredSite", "coded", "ordered"]

# What scales may be stored in, and how a format calls it.
SCALES = {"F16": "f16", "BF16": "bf16", "F32": "f32"}


@dataclass(frozen=True)
class StoredSite:
    """``weight`` is the format of the codes; with ``order`` it holds the columns order[0], order[1], ... of the site.

    ``parts(r0, r1)`` gives rows [r0, r1), ``tensors`` are the names in the folder.
    """

    weight: Coded
    input: InputFormat
    tensors: tuple[str, ...]
    parts: Callable[[int, int], Parts]
    order: NDArray[np.uint32] | None = None


class QuantizedTensors(ABC):
    """The quantized sites of a folder; ``where`` names its config.json in errors."""

    def __init__(self, folder: Folder, where: str) -> None:
        self.folder, self.where = folder, where

    @abstractmethod
    def site(self, name: str, kind: str, rows: int, cols: int) -> StoredSite | None:
        """How a site is stored; None where it is a plain matrix. ``kind``: "Linear" or "Embedding".

        Raises CheckpointError for tensors that are missing or of another shape, UnsupportedError for what no
        expression says. Reads no more than scales, zero points and orders.
        """

    def surplus(self, name: str) -> tuple[str, ...]:
        """Tensors of a plain site that mean nothing and are passed over."""
        return ()

    # ------------------------------------------------------------ tensors

    def dtype(self, name: str) -> str:
        info = self.folder.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder.path.name} lacks the tensor '{name}', which its quantization needs.")
        return info.dtype

    def expect(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> str:
        """The type of a tensor, once it and the shape are known to be among the given ones."""
        dtype, shape = self.dtype(name), self.folder.tensors[name].shape
        if dtype not in dtypes or shape not in shapes:
            wanted = " or ".join(str(list(s)) for s in shapes)
            raise CheckpointError(
                f"{self.folder.path.name}: tensor '{name}' is {dtype} {quote(list(shape))}, where its quantization "
                f"asks for {' or '.join(dtypes)} {wanted}; check the file."
            )
        return dtype

    def scales(self, name: str, *shapes: tuple[int, ...]) -> str:
        """The format's word for the type of a tensor of scales."""
        return SCALES[self.expect(name, tuple(SCALES), *shapes)]

    def finite(self, stored: NDArray[Any], name: str) -> None:
        """Refuses scales, as ``name`` stores them, with a NaN or an infinity among them."""
        if not np.isfinite(halves.to_float(stored, SCALES[self.dtype(name)])).all():
            raise CheckpointError(
                f"{self.folder.path.name}: tensor '{name}' holds a NaN or an infinity; check the file."
            )

    def raw(self, name: str) -> NDArray[Any]:
        """A tensor as stored; int32 words also where they are unsigned in the file."""
        found = self.folder.raw(name)
        return found.view("<i4") if found.dtype == np.dtype("<u4") else found

    def unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{self.where} {what}, which is not read.")


def coded(where: str, kind: str, rows: int | None, cols: int | None, scale: str, zero: bool) -> Coded:
    """The format of codes of ``kind`` (int4, uint4, e4m3) with a scale for ``rows`` x ``cols`` elements, None for all.

    UnsupportedError: groups that no format has.
    """
    try:
        fmt = Coded(number(kind), Group(rows, cols), scale, zero)
        fmt.check_weight()
    except FormatError as error:
        raise UnsupportedError(f"{where} has groups that are not read: {error}") from None
    return fmt


def ordered(groups: NDArray[Any], group: int) -> NDArray[np.uint32] | str | None:
    """Where columns of each group stand: None when they lie in order, the order to bring them into, or what is wrong.

    ``groups``: the group of each column, as files with activation order list it.
    """
    cols = len(groups)
    wanted = np.arange(cols) // group
    if np.array_equal(groups, wanted):
        return None
    order = np.argsort(groups, kind="stable")
    if not np.array_equal(groups[order], wanted):
        return f"does not give each group {group} columns"
    return order.astype(np.uint32)
