"""The region that a loaded model's weights lie in."""

from __future__ import annotations

import numpy as np
import pytest

from gossamer.errors import ResourceError
from gossamer.models.memory import ALIGN, HUGE, STEP, Region


def test_arrays_are_copied_one_after_the_other() -> None:
    region = Region(1000)
    given = {"a": np.arange(10, dtype=np.uint8), "b": np.arange(7, dtype="<f4"), "empty": np.empty(0, "<u2")}
    placed = region.place(given)
    more = region.place({"c": np.ones(3, "<f4")})
    for name, array in given.items():
        assert np.array_equal(placed[name], array)
        assert placed[name].dtype == array.dtype
        assert not np.shares_memory(placed[name], array)
    addresses = [a.ctypes.data for a in (placed["a"], placed["b"], more["c"])]
    assert all(address % ALIGN == 0 for address in addresses)
    assert addresses == [addresses[0], addresses[0] + ALIGN, addresses[0] + 2 * ALIGN]


def test_a_large_array_lets_go_of_what_was_copied() -> None:
    array = np.arange(3 * STEP // 4 + 5, dtype=np.uint32)
    released: list[int] = []
    region = Region(array.nbytes)
    placed = region.place({"a": array}, lambda: released.append(1))["a"]
    assert np.array_equal(placed, array)
    assert not np.shares_memory(placed, array)
    assert released


def test_what_does_not_fit_stays_where_it_is() -> None:
    region = Region(1)
    large = np.zeros(HUGE + 1, np.uint8)
    assert region.place({"large": large})["large"] is large
    assert region.place({"small": np.ones(4, np.uint8)})["small"].tolist() == [1, 1, 1, 1]


def test_arrays_keep_the_region() -> None:
    array = Region(100).place({"a": np.full(64, 7, np.uint8)})["a"]
    np.zeros(1 << 20)  # other memory comes and goes
    assert (array == 7).all()


def test_too_much_is_refused_in_one_sentence() -> None:
    with pytest.raises(ResourceError, match=r"MB for weights cannot be had; choose a smaller format or free memory\."):
        Region(1 << 60)
