"""The store of keys and values: bytes are counted exactly, and every format runs."""

from __future__ import annotations

import numpy as np
import pytest

from gossamer.engine.kv import BLOCK, KV_FORMATS, KVPool, kv_bytes
from gossamer.models.config import Config, Rope


def config(kv_heads: int, head_dim: int, layers: int = 2) -> Config:
    sizes = 64, 32, layers, 2 * kv_heads, kv_heads, head_dim, 64, 512
    return Config("llama", *sizes, 1e-5, (Rope(1e4),) * layers, (0,) * layers)


@pytest.mark.parametrize("fmt", KV_FORMATS)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 64), (3, 128), (2, 6), (5, 258)])
def test_kv_bytes_are_the_bytes_of_the_arrays(fmt: str, kv_heads: int, head_dim: int) -> None:
    for tokens in (1, BLOCK, 100):
        pool = KVPool(config(kv_heads, head_dim), tokens, fmt)
        arrays = [x for i in range(2) for x in vars(pool.layer(i)).values() if x is not None]
        assert sum(x.nbytes for x in arrays) == kv_bytes(config(kv_heads, head_dim), tokens, fmt)


def test_bytes_per_element() -> None:
    """float16 scales and minima: half a byte and 4 / 128 for each element at head size 128."""
    per_element = kv_bytes(config(2, 128, 1), 320, "uint4/row") / (2 * 2 * 128 * 320)
    assert per_element == 0.5 + 4 / 128
    assert kv_bytes(config(2, 128, 1), 320, "int8/row") / (2 * 2 * 128 * 320) == 1 + 4 / 128


def test_pools_start_empty() -> None:
    layer = KVPool(config(1, 16), 10, "uint4/row").layer(1)
    assert layer.k_scale is not None
    assert not np.any(layer.k)
    assert not np.any(layer.k_scale)
