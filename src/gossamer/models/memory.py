"""Where a loaded model's weights lie: one region of memory in execution order, on huge pages where the system has them.

A decode step reads every weight once. With pages of 4 KiB the processor spends much of that time finding pages: on the
machines of docs/measurements.md huge pages read a third faster. Files cannot be mapped so, hence the copy.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.errors import ResourceError
from gossamer.formats import Packed, SiteFormat
from gossamer.models.topology import Site

__all__ = ["Region"]

ALIGN = 64
HUGE = 2 << 20
STEP = 16 << 20  # bytes that a thread copies at once


class Region:
    """``nbytes`` bytes of zeros from the system, given out from the front. Arrays keep the region alive."""

    def __init__(self, nbytes: int) -> None:
        nbytes = max(HUGE, -(-nbytes // HUGE) * HUGE)
        try:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            raise ResourceError(
                f"{nbytes / 1e6:.0f} MB for weights cannot be had; choose a smaller format or free memory."
            ) from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory = np.frombuffer(memory, np.uint8)
        self._at = 0

    @classmethod
    def of(cls, formats: Mapping[str, SiteFormat], sites: Iterable[Site]) -> Region:
        """Room for the packed arrays of ``sites``."""
        fields = (f for site in sites for f in formats[site.name].weight.fields(site.rows, site.cols).values())
        return cls(sum(field.nbytes for field in fields))

    def move(self, packed: Packed, release: Callable[[], None] | None = None) -> Packed:
        """The matrix with its arrays placed; ``release`` as in ``place``."""
        return Packed(packed.format, packed.shape, self.place(packed.arrays, release))

    def place(
        self, arrays: Mapping[str, npt.NDArray[Any]], release: Callable[[], None] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Copies of flat arrays, one after the other.

        ``release`` is called after every few megabytes: pages of the arrays that have been read may leave the process,
        so that a large table is not there twice.
        """
        placed: dict[str, npt.NDArray[Any]] = {}
        for name, array in arrays.items():
            if self._at + array.nbytes > len(self._memory):
                # An estimate was too small (a mask's): this one stays where it is.
                placed[name] = array
                continue
            copy = self._memory[self._at : self._at + array.nbytes].view(array.dtype)
            _copy(array, copy, release)
            placed[name] = copy
            self._at = -(-(self._at + array.nbytes) // ALIGN) * ALIGN
        return placed


def _copy(array: npt.NDArray[Any], to: npt.NDArray[Any], release: Callable[[], None] | None) -> None:
    """By as many threads as there are: one alone does not fill the memory's bandwidth while the system clears pages."""
    step, threads = STEP // array.itemsize, ops.threads()
    if len(array) <= step:
        to[...] = array
        return
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(array), threads * step):
            parts = [slice(at, at + step) for at in range(start, min(len(array), start + threads * step), step)]
            list(pool.map(partial(_copy_part, array, to), parts))
            if release:
                release()


def _copy_part(array: npt.NDArray[Any], to: npt.NDArray[Any], part: slice) -> None:
    to[part] = array[part]
