"""Where a loaded model's weights lie: one region of memory in execution order, on huge pages where the system has them.

A decode step reads every weight once. With pages of 4 KiB the processor spends much of that time finding pages: on the
machines of docs/measurements.md huge pages read a third faster. Files cannot be mapped so, hence the copy.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import ResourceError
from gossamer.formats import Packed, SiteFormat
from gossamer.models.topology import Site

__all__ = ["Region"]

ALIGN = 64
HUGE = 2 << 20


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

    def move(self, packed: Packed) -> Packed:
        """The matrix with its arrays placed."""
        return Packed(packed.format, packed.shape, self.place(packed.arrays))

    def place(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Copies of flat arrays, one after the other."""
        placed: dict[str, npt.NDArray[Any]] = {}
        for name, array in arrays.items():
            if self._at + array.nbytes > len(self._memory):
                # An estimate was too small (a mask's): this one stays where it is.
                placed[name] = array
                continue
            copy = self._memory[self._at : self._at + array.nbytes].view(array.dtype)
            copy[...] = array
            placed[name] = copy
            self._at = -(-(self._at + array.nbytes) // ALIGN) * ALIGN
        return placed
