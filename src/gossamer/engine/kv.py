"""The store of keys and values: one pool of blocks per layer, and the blocks that each sequence uses.

A block holds 32 tokens of every layer, in the layout of kernels/attention.h: keys transposed inside a block so that
16 or 32 keys are multiplied at once. KV pages take format expressions: ``f32``, ``f16`` (the default), ``bf16``,
``int8/row`` or ``uint4/row``, where a row is one token's key or value of one head.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from gossamer.errors import FormatError, ResourceError
from gossamer.models.config import Config
from gossamer.models.transformer import KVLayer

__all__ = ["BLOCK", "KV_FORMATS", "SEQUENCES", "KVFormat", "KVPool", "Sequence", "kv_bytes"]

BLOCK = 32
SEQUENCES = 64  # sequences in one pool, unless it is made for more


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are stored.

    A unit of ``unit`` elements of ``dtype`` holds ``pack`` consecutive dimensions of a key, or positions of a value.
    ``scales``: what else a row has, by dtype and count: a float32 scale (int8/row: value = scale * (code - 128), scale
    max|x| / 127), or a float16 scale and minimum (uint4/row: value = scale * code + minimum, scale (max - min) / 15,
    both rounded outwards so that nothing is clipped).
    """

    dtype: np.dtype[Any]
    pack: int = 1
    unit: int = 1
    scales: tuple[np.dtype[Any], int] | None = None

    def shapes(self, blocks: int, heads: int, dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the keys and of the values of a layer."""
        unit = (self.unit,) if self.unit > 1 else ()
        return (blocks, heads, -(-dim // self.pack), BLOCK, *unit), (blocks, heads, BLOCK // self.pack, dim, *unit)

    def scale_shape(self, blocks: int, heads: int) -> tuple[int, ...]:
        count = self.scales[1] if self.scales else 0
        return (blocks, heads, count, BLOCK) if count > 1 else (blocks, heads, BLOCK)

    def bytes(self, blocks: int, heads: int, dim: int) -> int:
        """Of the keys, values and scales of ``blocks`` blocks of one layer."""
        elements = sum(int(np.prod(shape, dtype=object)) for shape in self.shapes(blocks, heads, dim))
        scales = 2 * blocks * heads * BLOCK * self.scales[1] * self.scales[0].itemsize if self.scales else 0
        return elements * self.dtype.itemsize + scales


KV_FORMATS: dict[str, KVFormat] = {
    "f32": KVFormat(np.dtype("<f4")),
    "f16": KVFormat(np.dtype("<f2")),
    "bf16": KVFormat(np.dtype("<u2"), pack=2, unit=2),
    "int8/row": KVFormat(np.dtype("u1"), pack=4, unit=4, scales=(np.dtype("<f4"), 1)),
    "uint4/row": KVFormat(np.dtype("u1"), pack=8, unit=4, scales=(np.dtype("<f2"), 2)),
}


def kv_format(text: str) -> str:
    """Checks a ``--kv`` expression. Raises FormatError listing what can be stored."""
    name = re.sub(r"\s+", "", text)
    if name not in KV_FORMATS:
        raise FormatError(f"keys and values cannot be stored as '{text}'; choose {', '.join(KV_FORMATS)}.")
    return name


def kv_bytes(config: Config, tokens: int, fmt: str = "f16") -> int:
    """Bytes that the keys and values of ``tokens`` tokens take, whole blocks, scales and padding counted."""
    blocks = (tokens + BLOCK - 1) // BLOCK
    return config.layers * KV_FORMATS[kv_format(fmt)].bytes(blocks, config.kv_heads, config.head_dim)


class KVPool:
    """``tokens`` tokens of room (rounded up to whole blocks) for the layers of ``config``, for several sequences.

    ``tables`` is int32 [sequences, blocks]: row i lists the blocks of the sequence that has this row, -1 where it
    has none. It stays where it is, and so do the layers' arrays: programs are recorded over them.
    """

    def __init__(self, config: Config, tokens: int, fmt: str = "f16", sequences: int = SEQUENCES) -> None:
        self.format = kv_format(fmt)
        self.blocks = max(1, (tokens + BLOCK - 1) // BLOCK)
        heads, d = config.kv_heads, config.head_dim
        try:
            self._layers = [self._layer(heads, d) for _ in range(config.layers)]
        except MemoryError:
            need = kv_bytes(config, tokens, self.format) / 1e6
            raise ResourceError(
                f"the keys and values of {tokens} tokens need {need:.0f} MB, which cannot be had; lower --context."
            ) from None
        self._free = list(range(self.blocks - 1, -1, -1))
        # A sequence of no blocks has no tokens: more rows than blocks would never be used at the same time.
        self.tables = np.full((min(sequences, self.blocks), self.blocks), -1, np.int32)
        self._rows = list(range(len(self.tables) - 1, -1, -1))

    def _layer(self, heads: int, d: int) -> KVLayer:
        # np.zeros takes pages from the system only when they are written.
        fmt = KV_FORMATS[self.format]
        k, v = (np.zeros(shape, fmt.dtype) for shape in fmt.shapes(self.blocks, heads, d))
        if fmt.scales is None:
            return KVLayer(k, v, None, None)
        shape, dtype = fmt.scale_shape(self.blocks, heads), fmt.scales[0]
        return KVLayer(k, v, np.zeros(shape, dtype), np.zeros(shape, dtype))

    def layer(self, index: int) -> KVLayer:
        return self._layers[index]

    @property
    def free_tokens(self) -> int:
        return len(self._free) * BLOCK

    def take(self) -> int:
        if not self._free:
            raise ResourceError(f"the store of {self.blocks * BLOCK} tokens is full; raise --context.")
        return self._free.pop()

    def give(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))

    def take_row(self) -> int:
        if not self._rows:
            raise ResourceError(f"the store holds {len(self.tables)} sequences already; close one first.")
        return self._rows.pop()

    def give_row(self, row: int) -> None:
        self._rows.append(row)


class Sequence:
    """A sequence's place in a pool: ``length`` tokens are stored, in the blocks that row ``row`` of its tables lists.

    Raises ResourceError when the pool has no row left. ``close`` gives everything back; a pool that goes out of use
    as a whole needs no closing.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool, self.length, self.row = pool, 0, pool.take_row()
        self._blocks: list[int] = []

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more tokens; raises ResourceError when the pool is full, changing nothing."""
        have = len(self._blocks)
        need = (self.length + tokens + BLOCK - 1) // BLOCK - have
        if need <= 0:
            return
        if need * BLOCK > self.pool.free_tokens:
            raise ResourceError(
                f"{self.length + tokens} tokens do not fit into a store of {self.pool.blocks * BLOCK}; raise --context."
            )
        self._blocks += [self.pool.take() for _ in range(need)]
        self.pool.tables[self.row, have : have + need] = self._blocks[have:]

    def truncate(self, length: int) -> None:
        """Forgets the tokens from ``length`` on and gives whole blocks back."""
        keep = (length + BLOCK - 1) // BLOCK
        self.pool.give(self._blocks[keep:])
        self.pool.tables[self.row, keep : len(self._blocks)] = -1
        del self._blocks[keep:]
        self.length = length

    def close(self) -> None:
        """Gives the blocks and the row back; a sequence that is used after that is an IndexError."""
        if self.row < len(self.pool.tables):
            self.truncate(0)
            self.pool.give_row(self.row)
            self.row = len(self.pool.tables)
