"""What methods keep of a model's gradients: visitors for ``gradients.sweep``, one call a site and sequence.

Gradients are squared per sequence and averaged afterwards: the square of an averaged gradient is something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from gossamer.errors import UsageError
from gossamer.models.topology import Site

__all__ = ["FisherDiagonal", "OutputFisher", "RowSalience"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_ROWS = 1024  # of a gradient, in memory at once


class FisherDiagonal:
    """The diagonal of the Fisher information of weights: the mean over sequences of (dL/dW)^2, L the sequence's mean
    loss (SqueezeLLM, Kim et al. 2023).

    It takes as much memory as the weights of ``sites`` (names; None: all) in float32: a large model goes in several
    sweeps of some sites each.
    """

    def __init__(self, sites: Collection[str] | None = None) -> None:
        self._sites = sites
        self._sums: dict[str, F32] = {}
        self._sequences: Counter[str] = Counter()

    def __call__(self, site: Site, x: F32, dy: F32) -> None:
        if self._sites is not None and site.name not in self._sites:
            return
        if site.name not in self._sums:
            self._sums[site.name] = np.zeros((site.rows, site.cols), np.float32)
        total = self._sums[site.name]
        for r in range(0, site.rows, _ROWS):
            gradient = dy[:, r : r + _ROWS].T @ x
            gradient *= gradient
            total[r : r + _ROWS] += gradient
        self._sequences[site.name] += 1

    def result(self) -> dict[str, F32]:
        """float32 [rows, cols] by the names of the sites. It ends the collection."""
        while self._sequences:
            name, count = self._sequences.popitem()
            self._sums[name] /= np.float32(count)
        return self._sums


class RowSalience:
    """What a change ``delta`` of weights, float32 [rows, cols] by site, does to the loss, row by row: the sum over
    sequences of |g . delta + (g . delta)^2 / 2| with g the row's gradient of the sequence's mean loss: first order, and
    second order by the empirical Fisher information (MixLLM, Zheng et al. 2024).

    Sites without a ``delta`` are left out.
    """

    def __init__(self, delta: Mapping[str, F32]) -> None:
        self._delta = delta
        self._sums: dict[str, F64] = {}

    def __call__(self, site: Site, x: F32, dy: F32) -> None:
        if site.name not in self._delta:
            return
        delta = self._delta[site.name]
        if delta.shape != (site.rows, site.cols):
            raise UsageError(
                f"the change of '{site.name}' has the shape {list(delta.shape)}; it must be [{site.rows}, {site.cols}]."
            )
        # g . delta of a row is the sum over tokens of d(output) times the change of the output.
        change = np.einsum("tr,tr->r", dy, x @ delta.T, dtype=np.float64)
        total = self._sums.setdefault(site.name, np.zeros(site.rows))
        total += np.abs(change + change * change / 2)

    def result(self) -> dict[str, F64]:
        """float64 [rows] by the names of the sites."""
        return self._sums


class OutputFisher:
    """Second moments over tokens of the gradient of a sequence's summed loss for a site's outputs: E[dy^2], float32
    [rows], and with ``full`` also E[dy dy^T], float32 [rows, rows], for ``sites`` (names; None: all).

    With labels that the model drew itself this is the Fisher information of the outputs: errors that are independent
    from row to row and token to token, of mean square E[e_r^2] in row r, raise the mean loss of a token by about the
    sum over rows of E[dy_r^2] E[e_r^2] / 2. Every token of a sequence counts as labelled.
    """

    def __init__(self, sites: Collection[str] | None = None, *, full: bool = False) -> None:
        self._sites, self._full = sites, full
        self._squares: dict[str, F64] = {}
        self._moments: dict[str, F64] = {}
        self._tokens: Counter[str] = Counter()

    def __call__(self, site: Site, x: F32, dy: F32) -> None:
        if self._sites is not None and site.name not in self._sites:
            return
        summed = dy * np.float32(len(dy))  # the loss is a mean over the tokens
        squares = self._squares.setdefault(site.name, np.zeros(site.rows))
        squares += np.einsum("tr,tr->r", summed, summed, dtype=np.float64)
        if self._full:
            moments = self._moments.setdefault(site.name, np.zeros((site.rows, site.rows)))
            for r in range(0, site.rows, _ROWS):
                moments[r : r + _ROWS] += summed[:, r : r + _ROWS].T @ summed
        self._tokens[site.name] += len(dy)

    def result(self) -> dict[str, F32]:
        """E[dy^2], float32 [rows] by the names of the sites."""
        return {name: (total / self._tokens[name]).astype(np.float32) for name, total in self._squares.items()}

    def moments(self) -> dict[str, F32]:
        """E[dy dy^T], float32 [rows, rows] by the names of the sites; nothing where ``full`` was not asked for."""
        return {name: (total / self._tokens[name]).astype(np.float32) for name, total in self._moments.items()}
