"""A matrix in one format that is not made of others: which solver finds its values, and what errors count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers import options
from gossamer.compress.solvers.grid import Grid
from gossamer.compress.solvers.held import obs_on_grid, obs_on_tables
from gossamer.compress.solvers.hqq import Hqq, hqq
from gossamer.compress.solvers.lloyd import lloyd
from gossamer.compress.solvers.nearest import clip, nearest
from gossamer.compress.solvers.nested import dual, planes, progressive
from gossamer.compress.solvers.obs import Obs, Solved, group_metric, obs
from gossamer.compress.solvers.outliers import OutlierRule
from gossamer.compress.solvers.rounding import objective, refit_scales, round_learned
from gossamer.compress.solvers.search import fit_grid
from gossamer.compress.statistics import Statistics
from gossamer.errors import UsageError
from gossamer.formats import Coded, Format, KMeans, Packed, encode_with

__all__ = ["Leaf"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

TRIES = 6  # sweeps to find how many outliers fill a mask
FALL = 0.7  # of the threshold's logarithm for that of the count: what weights have at about one percent
ENOUGH = 0.93  # of a mask


class Leaf:
    """Solves leaves: ``how`` for the site named ``where``; what happens is put into ``log``."""

    def __init__(self, how: options.Solver, where: str, log: list[str]) -> None:
        self.how, self.where, self.log = how, where, log

    def solve(
        self, fmt: Format, w: F32, stats: Statistics | None, fisher: F32 | None, without: Bools | None = None
    ) -> Packed:
        """float32 w [rows, cols] in a format that is no Composite.

        without: entries, bool [rows, cols], that are stored elsewhere: they do not count, and have some code.
        """
        if isinstance(fmt, KMeans):
            return self._tables(fmt, w, stats, fisher, without)
        if not isinstance(fmt, Coded):
            return encode_with(fmt, w, {}, self.where)  # plain numbers: nothing to find
        return self._rounded(self._codes(fmt, w, stats, fisher, without), w, stats, without)

    # ------------------------------------------------------------ codes and scales

    def _codes(self, fmt: Coded, w: F32, stats: Statistics | None, fisher: F32 | None, without: Bools | None) -> Packed:
        """The solver's own codes and scales."""
        how = self.how.options
        if isinstance(how, Obs):
            assert stats is not None
            assert stats.hessian is not None
            if without is not None:
                return self._held(fmt, w, stats, without, how)
            found = obs(fmt, w, stats.hessian, how, where=self.where, tokens=stats.tokens)
            self.log += found.log
            return found.packed
        w = w if without is None else fill(fmt, w, without)
        if isinstance(how, options.Clip):
            return clip(fmt, w, self._importance(fmt, how.importance, stats, fisher, without), how)
        if isinstance(how, Hqq):
            return hqq(fmt, w, how)
        if isinstance(how, options.Progressive):
            square = stats.square if stats is not None and how.importance == "input" else None
            return self._swept(progressive(fmt, w, square, lowest=how.lowest, where=self.where), w, stats, how.obs)
        if isinstance(how, options.Dual):
            assert stats is not None
            step = max(1, -(-len(stats.samples) // how.tokens))
            samples = stats.samples[::step] if len(stats.samples) else None
            return self._swept(dual(fmt, w, samples, where=self.where), w, stats, how.obs)
        if isinstance(how, options.Nested):
            assert stats is not None
            (only,) = planes(
                [fmt], w, stats.hessian, damping=how.damping, block=how.block, search=how.search, where=self.where,
                log=self.log,
            )  # fmt: skip
            return only
        if isinstance(how, options.Lloyd):
            raise UsageError(
                f"the solver 'lloyd' fits tables such as kmeans3/row, so it cannot fit {fmt} in {self.where}; use "
                "clip or obs."
            )
        return nearest(fmt, w)

    def _importance(
        self, fmt: Coded, kind: str, stats: Statistics | None, fisher: F32 | None, without: Bools | None
    ) -> F32 | None:
        """What errors count: [cols], [rows, cols], or [groups, width, width]."""
        if kind == "block" and stats is not None and stats.hessian is not None:
            return group_metric(fmt, stats.hessian)
        found = fisher if kind == "fisher" else stats.square if kind == "input" and stats is not None else None
        if without is None:
            return found
        return np.where(without, np.float32(0), np.float32(1) if found is None else found).astype(np.float32)

    def _swept(self, packed: Packed, w: F32, stats: Statistics | None, how: Obs | None) -> Packed:
        """Codes of least output error on the scales and zero points of ``packed``."""
        if how is None:
            return packed
        assert stats is not None
        assert stats.hessian is not None
        grid = Grid.of(packed)[0]
        found = obs(grid.fmt, w, stats.hessian, how, grid=grid, where=self.where, tokens=stats.tokens)
        self.log += found.log
        return found.packed

    def _held(self, fmt: Coded, w: F32, stats: Statistics, without: Bools, how: Obs) -> Packed:
        """``obs`` around entries that are stored elsewhere, on a grid fitted without them."""
        assert stats.hessian is not None
        kind = "block" if how.metric == "hessian" else "input"
        counts = None if how.search is None else self._importance(fmt, kind, stats, None, without)
        grid = fit_grid(fmt, fill(fmt, w, without), counts, search=how.search)
        return obs_on_grid(grid, w, stats.hessian, how, without=without, where=self.where, log=self.log)

    def with_outliers(self, fmt: Coded, w: F32, stats: Statistics | None, count: int) -> tuple[Packed, Bools, F32]:
        """``obs`` that keeps at most ``count`` entries out as it goes: the codes, which entries, and what is meant.

        What is meant, float32 [rows, cols], is w, with each entry kept out as it stood when its turn came.
        """
        how, given = self.how.options, self.how.outliers or options.Outliers("loop")
        assert isinstance(how, Obs)
        assert stats is not None
        assert stats.hessian is not None
        found = self._filled(fmt, w, stats, how, given.threshold, count)
        self.log += found.log
        entries = np.zeros(w.shape, np.bool_)
        assert found.entries is not None
        entries.ravel()[found.entries] = True
        meant = np.where(entries, found.values, w)
        self.log.append(
            f"{self.where}: {len(found.entries)} outliers, {len(found.entries) / w.size:.3%} of the weights"
        )
        return self._rounded(found.packed, meant, stats, entries), entries, meant

    def _filled(self, fmt: Coded, w: F32, stats: Statistics, how: Obs, threshold: float, count: int) -> Solved:
        """The solution with the lowest threshold, not below the one given, that keeps at most ``count`` entries out.

        How many reach a threshold is known only after a sweep: about as many as a power of it, so a few tries find it.
        """
        hessian = stats.hessian
        assert hessian is not None

        def at(limit: float, most: float) -> Solved:
            options = replace(how, outliers=OutlierRule(limit, most))
            return obs(fmt, w, hessian, options, where=self.where, tokens=stats.tokens)

        def kept(solved: Solved) -> int:
            assert solved.entries is not None
            return len(solved.entries)

        best = None
        above, below = 0.0, np.inf  # thresholds that too many reach, and that no more than allowed do
        for _ in range(TRIES):
            found = at(threshold, 1.0)
            if kept(found) > count:
                above = max(above, threshold)
                threshold *= 1.02 * (kept(found) / max(count, 1)) ** FALL
                if threshold >= below:
                    threshold = (above * below) ** 0.5
                continue
            if best is None or kept(found) > kept(best):
                best = found
            below = min(below, threshold)
            if above == 0 or kept(found) >= ENOUGH * count:
                break
            threshold = (above * below) ** 0.5
        return best or at(threshold, (count + 0.5) / w.size)

    def _rounded(self, packed: Packed, w: F32, stats: Statistics | None, without: Bools | None) -> Packed:
        """The step ``round``, where it is asked for; entries ``without`` have no error."""
        step = self.how.step(options.Round)
        if step is None:
            return packed
        assert stats is not None
        hessian = stats.hessian
        assert hessian is not None
        grid, codes = Grid.of(packed)
        values = grid.values(codes)
        target = w if without is None else np.where(without, values, w)
        best, least = packed, objective(target, values, hessian).sum()
        for i in range(step.scales + 1):
            if i:
                grid = refit_scales(grid, codes, target, hessian, where=self.where)
            codes = round_learned(grid, codes, target, hessian, passes=step.passes, where=self.where)
            values = grid.values(codes)
            if without is not None:  # where another term makes up for whatever the code gives
                values = np.where(without, target, values)
            now = objective(target, values, hessian).sum()
            if now < least:
                best, least = grid.pack(codes), now
        return best

    # ------------------------------------------------------------ tables

    def _tables(
        self, fmt: KMeans, w: F32, stats: Statistics | None, fisher: F32 | None, without: Bools | None
    ) -> Packed:
        how = self.how.options
        if self.how.step(options.Round) is not None:
            raise UsageError(
                f"the step 'round' moves codes on scales, and {fmt} in {self.where} has tables; leave it out."
            )
        kind = getattr(how, "importance", "input" if isinstance(how, Obs) else "none")
        weights = fisher if kind == "fisher" else stats.square if kind in ("input", "block") and stats else None
        packed = lloyd(fmt, w, weights, without=without, where=self.where)
        if isinstance(how, Obs):
            assert stats is not None
            assert stats.hessian is not None
            return obs_on_tables(packed, w, stats.hessian, how, without=without, where=self.where, log=self.log)
        return packed


def fill(fmt: Coded, w: F32, without: Bools) -> F32:
    """w with the entries kept out at the mean of their group's others, so that they do not stretch its range."""
    cols = w.shape[1]
    width = min(fmt.width(cols), cols)
    starts = np.arange(0, cols, width)
    inside = ~without
    count = np.add.reduceat(inside, starts, axis=1, dtype=np.int64)
    total = np.add.reduceat(np.where(without, np.float32(0), w), starts, axis=1, dtype=np.float64)
    mean = (total / np.maximum(count, 1)).astype(np.float32)
    return np.where(without, np.repeat(mean, width, axis=1)[:, :cols], w)
