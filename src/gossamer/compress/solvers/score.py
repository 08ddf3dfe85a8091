"""What a grid costs: the importance-weighted errors of the nearest codes, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import UsageError
from gossamer.formats import Coded, fit

__all__ = ["Score"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

ELEMENTS = 1 << 19  # looked at together: temporaries stay in the cache


class Score:
    """The errors of a matrix w, float32 [rows, cols], in the groups of ``fmt``; importance as ``fit_grid`` takes it."""

    def __init__(self, fmt: Coded, w: F32, importance: F32 | None, norm: float) -> None:
        self.fmt, self.w, self.norm = fmt, w, norm
        self.shape = rows, cols = w.shape
        self.groups, self.width = fmt.groups(cols), fmt.width(cols)
        tile = fmt.tile_rows(rows)
        self.tile_of: I64 = np.arange(rows) // tile
        self.first_rows: I64 = np.arange(0, rows, tile)
        self._columns: F32 | None = None  # [groups, width]
        self._each: F32 | None = None  # [rows, cols]
        self._blocks: F32 | None = None  # factors [groups, width, width]
        if importance is None:
            if cols % self.width:
                self._columns = self._padded(np.ones(cols, np.float32))
        elif importance.shape == (cols,):
            self._columns = self._padded(importance)
        elif importance.shape == (rows, cols):
            self._each = importance
        elif importance.shape == (self.groups, self.width, self.width):
            if norm != 2:
                raise UsageError(
                    f"a metric of whole groups measures squared errors, so norm {norm:g} cannot be; use 2."
                )
            self._blocks = _roots(importance)
        else:
            raise UsageError(
                f"importance of shape {importance.shape} does not fit a {rows} x {cols} matrix in {self.groups} groups "
                f"of {self.width}; give one number for each column or weight, or a matrix for each group."
            )

    def _padded(self, columns: F32) -> F32:
        """[cols] to [groups, width]; what pads the last group counts nothing."""
        padded = np.zeros(self.groups * self.width, np.float32)
        padded[: len(columns)] = columns
        return padded.reshape(self.groups, self.width)

    def _steps(self) -> Iterator[slice]:
        step = max(1, ELEMENTS // (self.groups * self.width))
        for r in range(0, self.shape[0], step):
            yield slice(r, min(self.shape[0], r + step))

    def _rows(self, r: slice) -> F32:
        return fit.grouped(self.fmt, np.ascontiguousarray(self.w[r], np.float32))

    def _importance(self, r: slice) -> F32:
        assert self._each is not None
        return self._no_padding(fit.grouped(self.fmt, self._each[r]))

    def _no_padding(self, x: F32) -> F32:
        if self.shape[1] % self.width:  # then x is a copy
            x.reshape(len(x), -1)[:, self.shape[1] :] = 0
        return x

    def _codes(self, x: F32, r: slice, s: F32, z: F32 | None, m: F32 | None) -> npt.NDArray[Any]:
        t = self.tile_of[r]
        zeros = None if z is None else z[r][..., None]
        return fit.nearest_codes(self.fmt, x, s[t][..., None], zeros, None if m is None else m[t][..., None])

    def errors(self, s: F32, z: F32 | None, m: F32 | None) -> F32:
        """Of each row and group, float32 [rows, groups], with scales and minima [row tiles, groups]."""
        found = np.empty((self.shape[0], self.groups), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # weights beyond 1e19: no range is better than the first
            self._errors(found, s, z, m)
        return found

    def _errors(self, found: F32, s: F32, z: F32 | None, m: F32 | None) -> None:
        for r in self._steps():
            x = self._rows(r)
            t = self.tile_of[r]
            codes = self._codes(x, r, s, z, m)
            zeros = None if z is None else z[r][..., None]
            x = x - fit.values(self.fmt.number, codes, s[t][..., None], zeros, None if m is None else m[t][..., None])
            if self.norm == 2:
                x = self._weighted(x, r)
                found[r] = np.einsum("ngw,ngw->ng", x, x)
            else:
                x = np.abs(x, out=x) ** np.float32(self.norm)
                counts = self._columns if self._each is None else self._importance(r)
                found[r] = x.sum(axis=-1) if counts is None else (x * counts).sum(axis=-1)

    def _weighted(self, y: F32, r: slice) -> F32:
        """y [n, groups, width] times the root of what it counts, so that sums of squares are what is minimized."""
        if self._blocks is not None:
            turned: F32 = np.matmul(y.swapaxes(0, 1), self._blocks).swapaxes(0, 1)
            return turned
        if self._each is not None:
            return y * np.sqrt(self._importance(r))
        return y if self._columns is None else y * np.sqrt(self._columns)

    def least_squares(self, s: F32, z: F32 | None, m: F32 | None, keep_m: bool = False) -> tuple[F64, F64 | None]:
        """The scales, and (but for ``keep_m``) minima, [row tiles, groups], of least weighted squared error for the
        nearest codes; the given ones where the codes do not determine any, or only scales of the other sign."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._least_squares(s, z, m, keep_m)

    def _least_squares(self, s: F32, z: F32 | None, m: F32 | None, keep_m: bool) -> tuple[F64, F64 | None]:
        number = self.fmt.number
        sums = np.zeros((2 if m is None or keep_m else 5, self.shape[0], self.groups))
        one = np.float32(1)
        for r in self._steps():
            x = self._rows(r)
            codes = self._codes(x, r, s, z, m)
            if m is not None:
                u = codes.astype(np.float32)
                if keep_m:
                    x = x + m[self.tile_of[r]][..., None]
            else:
                zeros = None if z is None else z[r][..., None]
                u = fit.values(number, codes, np.ones((1, 1, 1), np.float32), zeros, None)
            a, b = self._weighted(x, r), self._weighted(u, r)
            sums[:2, r] = np.einsum("ngw,ngw->ng", a, b), np.einsum("ngw,ngw->ng", b, b)
            if m is not None and not keep_m:
                o = self._weighted(np.broadcast_to(one, x.shape), r)
                pairs = ((a, o), (b, o), (o, o))
                sums[2:, r] = [np.einsum("ngw,ngw->ng", p, q) for p, q in pairs]
        total = np.stack([self.tiles(p) for p in sums])
        if m is None or keep_m:
            xu, uu = total
            best = xu / np.where(uu > 0, uu, 1)
            return np.where((uu > 0) & (best * s > 0), best, s), None if m is None else m.astype(np.float64)
        xu, uu, xo, uo, oo = total
        determinant = uu * oo - uo * uo
        sound = determinant > 1e-6 * uu * oo
        base = np.where(sound, determinant, 1)
        scale, minimum = (xu * oo - xo * uo) / base, (xu * uo - xo * uu) / base
        sound &= scale * s > 0
        return np.where(sound, scale, s), np.where(sound, minimum, m)

    def moments(self) -> tuple[F64, F64, F64]:
        """Of each row tile and group: how many weights it has, their sum and the sum of their squares."""
        rows, cols = self.shape
        inside = np.clip(cols - self.width * np.arange(self.groups), 1, self.width)
        count = np.bincount(self.tile_of)[:, None] * inside[None].astype(np.float64)
        total, square = np.zeros((rows, self.groups)), np.zeros((rows, self.groups))
        for r in self._steps():
            x = self._no_padding(self._rows(r))
            total[r], square[r] = x.sum(axis=-1, dtype=np.float64), np.einsum("ngw,ngw->ng", x, x)
        return count, self.tiles(total), self.tiles(square)

    # ------------------------------------------------------------ rows that share a scale

    def tiles(self, per_row: npt.NDArray[Any]) -> F64:
        """[rows, groups] summed over the rows of each tile."""
        if len(self.first_rows) == len(per_row):
            return per_row.astype(np.float64)
        summed: F64 = np.add.reduceat(per_row.astype(np.float64), self.first_rows, axis=0)
        return summed

    def spread(self, per_tile: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[row tiles, groups] for each row."""
        return per_tile if len(per_tile) == self.shape[0] else per_tile[self.tile_of]


def _roots(metrics: F32) -> F32:
    """L with L L^T = M for each positive semidefinite M [groups, width, width]."""
    values, vectors = np.linalg.eigh(metrics.astype(np.float64))
    roots: F32 = (vectors * np.sqrt(np.maximum(values, 0))[:, None, :]).astype(np.float32)
    return roots
