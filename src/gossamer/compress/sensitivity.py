"""What the gradients of the loss say: Fisher information of every weight, and how much the loss feels each row rounded.

Both are sums over sequences, taken while one reverse pass after the other goes by; what is as large as the model lies
in a file that is gone with the process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gossamer.compress.allocate import row_salience
from gossamer.compress.fit import read_site
from gossamer.errors import ResourceError
from gossamer.formats import SiteFormat, project
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.topology import Site

__all__ = ["RowChanges", "SquaredGradients"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


class _Scratch:
    """float32 matrices for sites, zero at first, in a nameless file under ``folder``."""

    def __init__(self, folder: Path, sites: Sequence[Site]) -> None:
        size = 4 * sum(site.rows * site.cols for site in sites)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                # Reserved, so that a full disk is an error here and not a signal in the middle.
                os.posix_fallocate(file.fileno(), 0, max(1, size))
                memory = np.memmap(file, np.float32, "r+")
        except OSError as error:
            raise ResourceError(
                f"{folder} does not take the {size / 1e6:.0f} MB that gradients need: {error.strerror}; "
                "free some space or choose another place"
            ) from None
        self._parts: dict[str, F32] = {}
        at = 0
        for site in sites:
            self._parts[site.name] = memory[at : at + site.rows * site.cols].reshape(site.rows, site.cols)
            at += site.rows * site.cols

    def __getitem__(self, name: str) -> F32:
        return self._parts[name]


class SquaredGradients:
    """A visitor of ``gradients.sweep``: the mean over sequences of (dL/dw)^2, float32 [rows, cols] of each site."""

    def __init__(self, folder: Path, sites: Sequence[Site], sequences: int) -> None:
        self._sums, self._names, self._n = _Scratch(folder, sites), {s.name for s in sites}, sequences

    def __call__(self, site: Site, x: F32, dy: F32) -> None:
        if site.name in self._names:
            gradient = dy.T @ x
            gradient *= gradient
            gradient /= np.float32(self._n)
            sums = self._sums[site.name]
            sums += gradient

    def of(self, name: str) -> F32:
        return self._sums[name]


class RowChanges:
    """A visitor: the salience of each row of each site when its weights are rounded to ``formats``, float64 [rows]."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, formats: Mapping[str, SiteFormat]) -> None:
        self.sites = [site for site in checkpoint.topology.sites if site.name in formats]
        self._deltas = _Scratch(folder, self.sites)
        self.found: dict[str, F64] = {}
        for site in self.sites:
            w = read_site(checkpoint, site)
            np.subtract(project(formats[site.name].weight, w), w, out=self._deltas[site.name])
            self.found[site.name] = np.zeros(site.rows)

    def __call__(self, site: Site, x: F32, dy: F32) -> None:
        if site.name in self.found:
            self.found[site.name] += row_salience(self._deltas[site.name], x, dy)

    def items(self) -> Iterator[tuple[str, F64]]:
        yield from self.found.items()
