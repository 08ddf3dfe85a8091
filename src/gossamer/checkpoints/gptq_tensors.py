"""The tensors of GPTQ and AWQ folders: codes, zero points and scales of a site, moved as they are.

Both store W^T: inputs are rows. With I inputs, O outputs, B bits and G groups of inputs:

    GPTQ  X.qweight [I B / 32, O]  words along the inputs (words.py)
          X.qzeros  [G, O B / 32]  words along the outputs; version 1 stores z - 1, version 2 z
          X.scales  [G, O]         X.g_idx [I]  the group of each input
    AWQ   X.qweight [I, O / 8]     4 bits; nibble i of a word is output 8 w + (0, 2, 4, 6, 1, 3, 5, 7)[i]
          X.qzeros  [G, O / 8]     likewise;  X.scales [G, O]

W = s (q - z). GPTQ: Frantar et al. 2022 (arXiv 2210.17323), in the layout of AutoGPTQ and GPTQModel; AWQ: Lin et al.
2023 (arXiv 2306.00978), in the layout "gemm" of AutoAWQ.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.checkpoints.folder import Folder
from gossamer.checkpoints.safetensors import quote
from gossamer.checkpoints.stored import QuantizedTensors, StoredSite, coded, ordered
from gossamer.checkpoints.words import unpack_words
from gossamer.errors import CheckpointError
from gossamer.formats.coded import Parts
from gossamer.formats.inputs import DEFAULT_INPUT

__all__ = ["AwqTensors", "GptqTensors"]

U8 = NDArray[np.uint8]
_INTS = ("I32", "U32")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = (2, 3, 4, 8)


class _Transposed(QuantizedTensors):
    """What both have in common. ``bits`` of a code, ``group`` inputs with a scale (-1: all)."""

    bits: int
    group: int

    def __init__(self, folder: Folder, config: Mapping[str, Any], where: str) -> None:
        super().__init__(folder, where)
        self.config = config
        self.bits, self.group = self._size("bits"), self._size("group_size")

    def _size(self, key: str) -> int:
        value = self.config.get(key)
        if type(value) is not int or not (value == -1 or 1 <= value <= 1 << 28):
            raise CheckpointError(
                f"{self.where} has '{key}' = {quote(value)}, which should be a number; check the file."
            )
        return value

    def site(self, name: str, kind: str, rows: int, cols: int) -> StoredSite | None:
        if f"{name}.qweight" not in self.folder.tensors:
            return None
        group = cols if self.group == -1 else self.group
        groups = -(-cols // group)
        for what, size in (("inputs", cols), ("outputs", rows)):
            if size * self.bits % 32:
                raise self.unsupported(f"has {size} {what} of {self.bits} bits in '{name}', which fill no whole words")
        self.expect_words(name, rows, cols, groups)
        scale = self.scales(f"{name}.scales", (groups, rows))
        zeros = self.zeros(name, rows)
        # Zero points in the middle are those of symmetric weights.
        middle = bool((zeros == 1 << (self.bits - 1)).all())
        number = f"{'int' if middle else 'uint'}{self.bits}"
        fmt = coded(self.where, number, 1, None if self.group == -1 else group, scale, not middle)
        order, indices = self._order(name, group, cols)
        kept = None if middle else zeros

        def parts(r0: int, r1: int) -> Parts:
            codes = self.codes(name, cols, r0, r1)
            if order is not None:
                codes = codes[:, order]
            scales = np.ascontiguousarray(self.folder.raw(f"{name}.scales")[:, r0:r1].T)
            self.finite(scales, f"{name}.scales")
            return Parts(codes, scales, None if kept is None else kept[r0:r1])

        tensors = (f"{name}.qweight", f"{name}.qzeros", f"{name}.scales", *indices)
        return StoredSite(fmt, DEFAULT_INPUT, tensors, parts, order)

    def surplus(self, name: str) -> tuple[str, ...]:
        """Biases of zeros, which early programs wrote for layers that have none."""
        bias = f"{name}.bias"
        if bias not in self.folder.tensors or f"{name}.qweight" not in self.folder.tensors:
            return ()
        return () if np.any(self.folder.read(bias)) else (bias,)

    def _order(self, name: str, group: int, cols: int) -> tuple[NDArray[np.uint32] | None, tuple[str, ...]]:
        index = f"{name}.g_idx"
        if index not in self.folder.tensors:
            return None, ()
        self.expect(index, ("I32", "I64"), (cols,))
        found = ordered(self.folder.raw(index), group)
        if isinstance(found, str):
            raise self.unsupported(f"orders the inputs of '{name}' by activations, but '{index}' {found}")
        return found, (index,)

    @abstractmethod
    def expect_words(self, name: str, rows: int, cols: int, groups: int) -> None:
        """Raises CheckpointError unless qweight and qzeros have their shapes."""

    @abstractmethod
    def codes(self, name: str, cols: int, r0: int, r1: int) -> U8:
        """Codes of outputs [r0, r1): uint8 [r1 - r0, cols]."""

    @abstractmethod
    def zeros(self, name: str, rows: int) -> U8:
        """Zero points as codes: uint8 [rows, groups]."""


class GptqTensors(_Transposed):
    def __init__(self, folder: Folder, config: Mapping[str, Any], where: str) -> None:
        super().__init__(folder, config, where)
        if self.bits not in _BITS:
            raise self.unsupported(f"has weights of {self.bits} bits; GPTQ has 2, 3, 4 and 8, so that this is a scheme")
        layout = config.get("checkpoint_format") or "gptq"
        if layout not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
            raise self.unsupported(f"has GPTQ weights in the layout {quote(layout)}, neither 'gptq' nor 'gptq_v2'")
        for key in ("dynamic", "adapter", "rotation"):
            if config.get(key):
                raise self.unsupported(f"quantizes with {quote(key)}")
        if config.get("pack_dtype") not in (None, "int32"):
            raise self.unsupported(f"packs its weights into {quote(config['pack_dtype'])}, not int32")
        self._offset = 1 if layout == "gptq" else 0

    def expect_words(self, name: str, rows: int, cols: int, groups: int) -> None:
        self.expect(f"{name}.qweight", _INTS, (cols * self.bits // 32, rows))
        self.expect(f"{name}.qzeros", _INTS, (groups, rows * self.bits // 32))

    def codes(self, name: str, cols: int, r0: int, r1: int) -> U8:
        lines = np.ascontiguousarray(self.raw(f"{name}.qweight")[:, r0:r1].T)
        return unpack_words(lines, self.bits, cols)

    def zeros(self, name: str, rows: int) -> U8:
        zeros = unpack_words(self.raw(f"{name}.qzeros"), self.bits, rows)
        if self._offset and zeros.size and zeros.max() == (1 << self.bits) - 1:
            # Programs disagree: it may mean 0, or a code more than there is.
            raise self.unsupported(
                f"stores the zero point {(1 << self.bits) - 1} in '{name}.qzeros', about which programs that read "
                "version 1 of the layout differ (write the checkpoint anew as 'gptq_v2')"
            )
        return np.ascontiguousarray((zeros + np.uint8(self._offset)).T)


class AwqTensors(_Transposed):
    def __init__(self, folder: Folder, config: Mapping[str, Any], where: str) -> None:
        super().__init__(folder, config, where)
        version = config.get("version") or "gemm"
        if not isinstance(version, str) or version.lower() != "gemm":
            raise self.unsupported(f"has AWQ weights in the layout {quote(version)}, not 'gemm'")
        if self.bits != 4:
            raise self.unsupported(f"has AWQ weights of {self.bits} bits, not 4")
        if config.get("zero_point") is False:
            raise self.unsupported("has AWQ weights without zero points")

    def expect_words(self, name: str, rows: int, cols: int, groups: int) -> None:
        self.expect(f"{name}.qweight", _INTS, (cols, rows // 8))
        self.expect(f"{name}.qzeros", _INTS, (groups, rows // 8))

    def codes(self, name: str, cols: int, r0: int, r1: int) -> U8:
        w0, w1 = r0 // 8, -(-r1 // 8)
        found = _outputs(self.raw(f"{name}.qweight")[:, w0:w1])
        return np.ascontiguousarray(found[:, r0 - 8 * w0 : r1 - 8 * w0].T)

    def zeros(self, name: str, rows: int) -> U8:
        return np.ascontiguousarray(_outputs(self.raw(f"{name}.qzeros")).T)


def _outputs(found: NDArray[np.int32]) -> U8:
    """Words int32 [n, outputs / 8] -> codes uint8 [n, outputs]."""
    n, count = found.shape
    nibbles = unpack_words(found, 4, 8 * count).reshape(n, count, 8)
    codes = np.empty_like(nibbles)
    codes[:, :, _AWQ_ORDER] = nibbles
    return codes.reshape(n, -1)
