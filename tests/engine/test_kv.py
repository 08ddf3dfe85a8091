"""Blocks and rows of a store that several sequences share."""

from __future__ import annotations

import numpy as np
import pytest

from gossamer.engine.kv import BLOCK, KVPool, Sequence
from gossamer.errors import ResourceError
from gossamer.models.config import Config, Rope

CONFIG = Config(
    family="llama", vocab=64, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=32, context=4096,
    norm_eps=1e-5, ropes=(Rope(1e4),) * 2, windows=(0, 0),
)  # fmt: skip


def test_tables_list_the_blocks_of_each_sequence_and_stay_where_they_are() -> None:
    pool = KVPool(CONFIG, 6 * BLOCK, sequences=3)
    tables = pool.tables
    a, b = Sequence(pool), Sequence(pool)
    assert a.row != b.row
    a.reserve(BLOCK + 1)
    b.reserve(1)
    a.length = BLOCK + 1
    a.reserve(BLOCK)
    assert pool.tables is tables
    used = [n for n in tables[a.row] if n >= 0] + [n for n in tables[b.row] if n >= 0]
    assert (tables[a.row] >= 0).tolist() == [True] * 3 + [False] * 3
    assert (tables[b.row] >= 0).tolist() == [True] + [False] * 5
    assert len(set(used)) == 4
    assert pool.free_tokens == 2 * BLOCK


def test_truncate_gives_whole_blocks_back() -> None:
    pool = KVPool(CONFIG, 4 * BLOCK)
    s = Sequence(pool)
    s.reserve(3 * BLOCK)
    s.length = 3 * BLOCK
    first = pool.tables[s.row, 0]
    s.truncate(1)
    assert pool.tables[s.row].tolist() == [first, -1, -1, -1]
    assert (s.length, pool.free_tokens) == (1, 3 * BLOCK)
    s.truncate(0)
    assert (pool.tables == -1).all()


def test_a_full_store_changes_nothing() -> None:
    pool = KVPool(CONFIG, 2 * BLOCK)
    a, b = Sequence(pool), Sequence(pool)
    a.reserve(BLOCK)
    before = pool.tables.copy()
    with pytest.raises(ResourceError, match="do not fit"):
        b.reserve(BLOCK + 1)
    assert np.array_equal(pool.tables, before)
    b.reserve(BLOCK)


def test_rows_run_out_and_come_back() -> None:
    pool = KVPool(CONFIG, 8 * BLOCK, sequences=2)
    a, b = Sequence(pool), Sequence(pool)
    with pytest.raises(ResourceError, match="2 sequences"):
        Sequence(pool)
    a.reserve(5)
    row = a.row
    a.close()
    a.close()  # once more is nothing
    assert pool.free_tokens == 8 * BLOCK
    assert Sequence(pool).row == row
    with pytest.raises(ResourceError):
        Sequence(pool)
    with pytest.raises(IndexError):
        a.reserve(1)
    assert b.length == 0
