"""The best format for every site under a limit on bytes, on seconds per token, or on the loss: an integer programme.

One binary variable for each site and candidate, one candidate a site; the sums of bytes, seconds and predicted losses
are bounded or minimised. HiGHS (Huangfu & Hall 2018) solves it to a gap of one in a million, or says which gap is left
when its time runs out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gossamer.errors import UsageError
from gossamer.formats import SiteFormat

if TYPE_CHECKING:
    import highspy

__all__ = ["GAP", "SECONDS", "Candidate", "Solution", "budget"]

F64 = npt.NDArray[np.float64]

GAP = 1e-6  # of the objective: what is found is within this of the best there is
SECONDS = 60.0  # after which what is found is returned with the gap that is proven
GOALS = ("loss", "nbytes", "seconds")
RETRIES = 8  # times a limit is tightened by what the solver's tolerance let through


@dataclass(frozen=True)
class Candidate:
    """A format that a site may take: its bytes, seconds a token (None: not measured) and predicted loss."""

    format: SiteFormat
    nbytes: int
    seconds: float | None
    loss: float


@dataclass(frozen=True)
class Solution:
    """The chosen formats and what they add up to.

    ``seconds`` is None where a chosen candidate was not measured. ``gap`` is how far, as a share of the objective, a
    better choice could still be: at most 1e-6, but where the time limit ended the search (``optimal`` False).
    """

    formats: dict[str, SiteFormat]
    nbytes: int
    seconds: float | None
    loss: float
    gap: float
    optimal: bool


def budget(
    candidates: Mapping[str, Sequence[Candidate]],
    *,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
    max_loss: float | None = None,
    minimise: str = "loss",
    gap: float = GAP,
    time_limit: float = SECONDS,
) -> Solution:
    """One candidate for each site, the sum of ``minimise`` ("loss", "nbytes" or "seconds") least within the limits.

    Limits are sums over all sites: ``max_bytes`` of packed arrays, ``max_seconds`` a token, ``max_loss`` in the unit of
    the candidates' losses. A table with two uses is one site, so it counts once. The same input gives the same answer
    unless ``time_limit`` (seconds) ends the search.

    Raises UsageError for a site without candidates, figures that are not finite, seconds that are needed and missing,
    and limits that cannot be met: it names the nearest that can.
    """
    problem = _Problem(candidates, {"nbytes": max_bytes, "seconds": max_seconds, "loss": max_loss}, minimise)
    for what in problem.limits:
        least = problem.least(what)
        if least > problem.limits[what] * (1 + 1e-12):
            raise UsageError(_unreachable(what, problem.limits[what], least, {}))
    found = problem.solve(minimise, problem.limits, gap, time_limit)
    if found is None:
        raise UsageError(problem.nearest(gap, time_limit))
    choice, proven, optimal = found
    formats = {site: options[i].format for (site, options), i in zip(problem.sites.items(), choice)}
    picked = [options[i] for options, i in zip(problem.sites.values(), choice)]
    known = [c.seconds for c in picked if c.seconds is not None]
    return Solution(
        formats,
        sum(c.nbytes for c in picked),
        math.fsum(known) if len(known) == len(picked) else None,
        math.fsum(c.loss for c in picked),
        proven,
        optimal,
    )


class _Problem:
    """Candidates worth considering, and the limits on their sums."""

    def __init__(
        self, candidates: Mapping[str, Sequence[Candidate]], limits: Mapping[str, float | None], minimise: str
    ) -> None:
        if minimise not in GOALS:
            raise UsageError(f"'{minimise}' cannot be minimised; choose {', '.join(GOALS)}.")
        self.limits = {what: float(limit) for what, limit in limits.items() if limit is not None}
        for what, limit in self.limits.items():
            if not limit > 0 or not math.isfinite(limit):
                raise UsageError(f"a limit of {_said(what, limit)} cannot be; give a positive number.")
        self.used = [what for what in GOALS if what in self.limits or what == minimise]
        for site, options in candidates.items():
            if not options:
                raise UsageError(f"{site} has no format to choose from; give it at least one.")
            for c in options:
                if "seconds" in self.used and c.seconds is None:
                    raise UsageError(f"{c.format} was not timed for {site}, but the budget asks for a speed; time it.")
                if not all(math.isfinite(float(v)) and v >= 0 for v in (c.nbytes, c.seconds or 0, c.loss)):
                    raise UsageError(f"{c.format} for {site} has a size, time or loss that is no number of 0 or more.")
        if not candidates:
            raise UsageError("there is no site to choose a format for.")
        self.sites = {site: self._undominated(options) for site, options in candidates.items()}
        self.values = {
            what: [np.array([float(getattr(c, what)) for c in options]) for options in self.sites.values()]
            for what in self.used
        }

    def _undominated(self, options: Sequence[Candidate]) -> list[Candidate]:
        """Those that no other beats or equals in all that counts; of equals the first."""
        figures = [tuple(float(getattr(c, what)) for what in self.used) for c in options]
        kept = []
        for i, mine in enumerate(figures):
            beaten = any(
                all(a <= b for a, b in zip(other, mine)) and (other != mine or j < i)
                for j, other in enumerate(figures)
                if j != i
            )
            if not beaten:
                kept.append(options[i])
        return kept

    def least(self, what: str) -> float:
        return math.fsum(float(v.min()) for v in self.values[what])

    def total(self, what: str, choice: Sequence[int]) -> float:
        return math.fsum(float(v[i]) for v, i in zip(self.values[what], choice))

    def nearest(self, gap: float, time_limit: float) -> str:
        """What to say where each limit alone can be met, but not all: how far the first must give way."""
        limits = list(self.limits.items())
        while limits:
            (what, limit), *others = limits
            found = self.solve(what, dict(others), gap, time_limit)
            if found is not None:
                return _unreachable(what, limit, self.total(what, found[0]), dict(others))
            limits = others
        return "the limits cannot be met together; loosen one of them, or add candidates."

    def solve(
        self, goal: str, limits: Mapping[str, float], gap: float, time_limit: float
    ) -> tuple[list[int], float, bool] | None:
        """The index of each site's candidate, the gap, and whether that is proven; None if the limits exclude all."""
        tightened = dict(limits)
        for _ in range(RETRIES):
            found = self._solve(goal, tightened, gap, time_limit)
            if found is None:
                return None
            excess = {what: self.total(what, found[0]) - limit for what, limit in limits.items()}
            over = {what: x for what, x in excess.items() if x > 1e-12 * limits[what]}
            if not over:
                return found
            # The solver's tolerances let a little through: ask for as much less.
            tightened |= {what: tightened[what] - 2 * x for what, x in over.items()}
        return None

    def _solve(
        self, goal: str, limits: Mapping[str, float], gap: float, time_limit: float
    ) -> tuple[list[int], float, bool] | None:
        import highspy

        sizes = [len(options) for options in self.sites.values()]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        scale = {what: max(float(np.concatenate(self.values[what]).max()), 1e-300) for what in self.used}
        lp = highspy.HighsLp()
        n = lp.num_col_ = int(starts[-1])
        lp.num_row_ = len(sizes) + len(limits)
        # What every choice costs at least says nothing about which is best, and would drown the differences.
        cost = np.concatenate([v - v.min() for v in self.values[goal]])
        unit = float(cost.max()) or 1.0
        lp.col_cost_ = cost / unit
        lp.offset_ = self.least(goal) / unit
        lp.col_lower_, lp.col_upper_ = np.zeros(n), np.ones(n)
        lp.row_lower_ = np.concatenate([np.ones(len(sizes)), np.full(len(limits), -np.inf)])
        room = [(limit - self.least(what)) / scale[what] for what, limit in limits.items()]
        if min(room, default=0.0) < 0:
            return None
        lp.row_upper_ = np.concatenate([np.ones(len(sizes)), room])
        rows = [np.concatenate([v - v.min() for v in self.values[what]]) / scale[what] for what in limits]
        matrix = lp.a_matrix_
        matrix.format_ = highspy.MatrixFormat.kRowwise
        matrix.start_ = np.concatenate([starts, starts[-1] + n * np.arange(1, len(rows) + 1)]).astype(np.int32)
        matrix.index_ = np.concatenate([np.arange(n)] * (1 + len(rows))).astype(np.int32)
        matrix.value_ = np.concatenate([np.ones(n), *rows])
        lp.integrality_ = [highspy.HighsVarType.kInteger] * n
        highs = highspy.Highs()  # type: ignore[no-untyped-call]
        for option, value in {
            "output_flag": False,
            "threads": 1,
            "random_seed": 0,
            "mip_rel_gap": gap,
            "mip_abs_gap": 0.0,
            "time_limit": time_limit,
            "mip_feasibility_tolerance": 1e-9,
            "primal_feasibility_tolerance": 1e-9,
        }.items():
            highs.setOptionValue(option, value)
        highs.passModel(lp)
        highs.run()
        return self._read(highs, starts, time_limit)

    def _read(
        self, highs: highspy.Highs, starts: npt.NDArray[np.int64], time_limit: float
    ) -> tuple[list[int], float, bool] | None:
        import highspy

        status, info = highs.getModelStatus(), highs.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            raise UsageError(
                f"no choice of formats was found within {time_limit:g} s; give fewer candidates or more time."
            )
        x = np.array(highs.getSolution().col_value)
        choice = [int(np.argmax(x[a:b])) for a, b in pairwise(starts.tolist())]
        return choice, max(0.0, float(info.mip_gap)), status == highspy.HighsModelStatus.kOptimal


_WORDS = {
    "nbytes": ("smallest", "{:,.0f} bytes"),
    "seconds": ("fastest", "{:.4g} seconds a token"),
    "loss": ("least", "a predicted loss of {:.4g}"),
}


def _said(what: str, value: float) -> str:
    return _WORDS[what][1].format(value)


def _unreachable(what: str, limit: float, least: float, others: Mapping[str, float]) -> str:
    beside = "".join(f" beside {_said(name, value)}" for name, value in others.items())
    return (
        f"a budget of {_said(what, limit)}{beside} cannot be met: the {_WORDS[what][0]} that these formats allow is "
        f"{_said(what, least)}; allow that, or add candidates."
    )
