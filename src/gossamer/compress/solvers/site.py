"""A site's weight in any expression: the recursion over its nodes, with a solver at the leaves.

Each node solves its parts in its own space: a transform maps W and the input's moments to the inner one, a split takes
columns or rows apart, a sum gives every term what those before it leave. What comes back is one Packed of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.compress.solvers import extraction, inputs
from gossamer.compress.solvers.leaf import Leaf
from gossamer.compress.solvers.lowrank import factors
from gossamer.compress.solvers.measure import SiteError, measure
from gossamer.compress.solvers.nested import planes
from gossamer.compress.solvers.obs import Obs
from gossamer.compress.solvers.options import Bias, Clip, LowRank, Nearest, Nested, Outliers, Solver
from gossamer.compress.statistics import Statistics
from gossamer.errors import UsageError
from gossamer.formats import (
    Branch,
    Coded,
    Cols,
    Composite,
    Format,
    Hadamard,
    Mask,
    Packed,
    Permute,
    Planes,
    Rank,
    Rows,
    Scale,
    Sum,
    encode_with,
    weight_of,
)
from gossamer.formats.composite import padded, refuse_hints, refuse_infinite

__all__ = ["SiteError", "SitePacked", "Solver", "solve"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class SitePacked:
    """A solved site: as it is stored, its errors, what happened, and with the step ``bias`` float32 [rows] to add."""

    packed: Packed
    error: SiteError
    log: list[str] = field(default_factory=list)
    bias: F32 | None = None


@dataclass(frozen=True)
class _Part:
    """A matrix to be stored: float32 w [rows, cols], what is known of its input and of its loss.

    without: entries, bool [rows, cols], that another term of a sum will hold.
    """

    w: F32
    stats: Statistics | None
    fisher: F32 | None
    hints: Mapping[str, Any]
    without: Bools | None = None


def solve(
    fmt: Branch,
    w: F32,
    stats: Statistics | None,
    how: Solver,
    *,
    where: str,
    fisher: F32 | None = None,
    hints: Mapping[str, Any] | None = None,
) -> SitePacked:
    """Stores float32 w [rows, cols] as ``fmt`` says, with values found as ``how`` says.

    stats: of the site's input; fisher: the mean over sequences of (dL/dw)^2, [rows, cols]. hints: as in
    ``formats.encode_with``: which columns, rows, order, factors; what is not given is chosen here: outlier columns and
    the order of ``permute`` by max|x| where there are statistics (a mask's entries by ``how.outliers``), all else by
    the format's own rule. ``where`` names the site in messages.
    Raises UsageError where statistics are missing or belong to another input and where a solver cannot fit a format;
    FormatError for a shape the format cannot hold and for NaN or infinite weights.
    """
    weight = weight_of(fmt)
    if w.ndim != 2:
        raise UsageError(f"{where} is not a matrix but has {w.ndim} axes; give float32 [rows, cols].")
    w = np.ascontiguousarray(w, np.float32)
    weight.check(*w.shape)
    refuse_infinite(w, weight, where)
    if stats is not None:
        inputs.check(stats, w.shape[1], where)
    if fisher is not None and fisher.shape != w.shape:
        raise UsageError(f"{where} is {w.shape[0]} x {w.shape[1]}, but its Fisher information is {fisher.shape}.")
    _refuse_missing(weight, how, stats, fisher, where)
    run = _Run(how, where)
    arrays = run.solve(fmt, _Part(w, stats, fisher, hints or {}))
    packed = Packed(weight, (w.shape[0], w.shape[1]), arrays)
    bias = None
    if how.step(Bias) is not None:
        assert stats is not None
        bias = ((w - packed.decode()) @ stats.mean).astype(np.float32)
    return SitePacked(packed, measure(packed, w, stats), run.log, bias)


def _refuse_missing(fmt: Format, how: Solver, stats: Statistics | None, fisher: F32 | None, where: str) -> None:
    needs = how.needs
    have = {"hessian": stats is not None and stats.hessian is not None, "inputs": stats is not None}
    have["fisher"] = fisher is not None
    words = {"hessian": "the second moments of its input", "inputs": "statistics of its input"}
    words["fisher"] = "Fisher information"
    for need in sorted(needs):
        if not have[need]:
            raise UsageError(f"the solver '{how.name}' needs {words[need]} for {where}; calibrate with them.")
    if how.step(LowRank) is not None and not any(isinstance(node, Rank) for node in _nodes(fmt)):
        raise UsageError(f"{where} as {fmt} has no low-rank part to compensate with; write '{fmt} + rank8(int8/row)'.")


def _either(a: Bools | None, b: Bools) -> Bools:
    return b if a is None else a | b


def _nodes(fmt: Format) -> list[Format]:
    """The format and every one inside it."""
    inner = fmt.parts if isinstance(fmt, Composite) else ()
    return [fmt, *(node for _, branch in inner for node in _nodes(weight_of(branch)))]


class _Run:
    """One solve: how, the site's name, and what happened."""

    def __init__(self, how: Solver, where: str) -> None:
        self.how, self.where = how, where
        self.log: list[str] = []
        self.leaf = Leaf(how, where, self.log)

    def solve(self, branch: Branch, part: _Part) -> Arrays:
        """The arrays of a branch."""
        fmt = weight_of(branch)
        refuse_hints(fmt, part.hints)
        if isinstance(fmt, Sum):
            return self._sum(fmt, part)
        if isinstance(fmt, Cols):
            return self._cols(fmt, part)
        if isinstance(fmt, Rows):
            return self._rows(fmt, part)
        if isinstance(fmt, Hadamard):
            return self._hadamard(fmt, part)
        if isinstance(fmt, Permute):
            return self._permute(fmt, part)
        if isinstance(fmt, Scale):
            return self._scale(fmt, part)
        if isinstance(fmt, Planes):
            packed = self._leaf(fmt.inner, part)
            return fmt.split(packed.arrays, *packed.shape)
        if isinstance(fmt, Mask):
            return self._mask(fmt, part, None)
        if isinstance(fmt, Rank):
            return self._rank(fmt, part)
        return dict(self._leaf(fmt, part).arrays)

    def _leaf(self, fmt: Format, part: _Part) -> Packed:
        return self.leaf.solve(fmt, part.w, part.stats, part.fisher, part.without)

    # ------------------------------------------------------------ sums

    def _sum(self, fmt: Sum, part: _Part) -> Arrays:
        if isinstance(self.how.options, Nested):
            return self._nested(fmt, part)
        arrays: Arrays = {}
        rest, later = part.w, part.without
        mask = next((i for i, term in enumerate(fmt.terms) if isinstance(term, Mask)), None)
        entries, chosen_inside = None, False
        if mask is not None:
            hinted = "entries" in part.hints.get(str(mask), {})
            alone = (
                mask == 1 and isinstance(fmt.terms[0], Coded) and not any(isinstance(t, Coded) for t in fmt.terms[1:])
            )
            chosen_inside = self._rule == "loop" and alone and not hinted
            if not chosen_inside:
                entries = self._entries(fmt, mask, part)
        # What a term of codes pushes into later columns, a further one would have to undo: only the last one pushes.
        last = max((i for i, term in enumerate(fmt.terms) if not isinstance(term, (Mask, Rank))), default=0)
        for i, term in enumerate(fmt.terms):
            name = str(i)
            hints = part.hints.get(name, {})
            if i == 0 and chosen_inside:
                assert isinstance(term, Coded)
                assert isinstance(fmt.terms[1], Mask)
                count = fmt.terms[1].count(*part.w.shape)
                solved, entries, rest = self.leaf.with_outliers(term, part.w, part.stats, count)
                inner = dict(solved.arrays)
            elif isinstance(term, Mask):
                inner = self._mask(term, replace(part, w=rest, hints=hints), entries if i == mask else None)
            else:
                apart = later if mask is None or i > mask or entries is None else _either(later, entries)
                run = self._without_pushing() if i < last and isinstance(self.how.options, Obs) else self
                inner = run.solve(term, replace(part, w=rest, hints=hints, without=apart))
            arrays.update({f"{name}.{key}": a for key, a in inner.items()})
            if i < len(fmt.terms) - 1:
                with np.errstate(over="ignore"):
                    rest = rest - term.decode_rows(inner, len(rest), rest.shape[1], 0, len(rest))
                refuse_infinite(rest, fmt, "what the first parts leave")
        return arrays

    def _without_pushing(self) -> _Run:
        """The same with the grids of ``obs``, but codes rounded to nearest."""
        assert isinstance(self.how.options, Obs)
        search = self.how.options.search
        run = _Run(Solver(Nearest() if search is None else Clip(**asdict(search))), self.where)
        run.log = self.log
        return run

    @property
    def _rule(self) -> str:
        """How a mask's entries are chosen."""
        if self.how.outliers is not None:
            return self.how.outliers.rule
        if isinstance(self.how.options, Obs):
            return "loop"
        if isinstance(self.how.options, Nearest):
            return "residual"
        return "fisher" if "fisher" in self.how.needs else "error"

    def _entries(self, fmt: Sum, mask: int, part: _Part) -> Bools | None:
        """The entries that the mask will hold, bool [rows, cols]; None to take the largest of what remains."""
        term = fmt.terms[mask]
        assert isinstance(term, Mask)
        if "entries" in part.hints.get(str(mask), {}):
            return np.asarray(part.hints[str(mask)]["entries"], np.bool_)
        count, rule = term.count(*part.w.shape), self._rule
        if rule == "fisher":
            given = self.how.outliers or Outliers("fisher")
            assert part.fisher is not None  # asked for before
            return extraction.by_sensitivity(part.w, part.fisher, count, sensitive=given.sensitive, reach=given.reach)
        if rule == "magnitude":
            return extraction.by_magnitude(part.w, count)
        if rule == "residual" or mask == 0:
            return None
        # Errors of the terms before the mask, fitted quickly to everything.
        quick = Sum(fmt.terms[:mask]) if mask > 1 else fmt.terms[0]
        error = part.w - encode_with(quick, part.w, {}, self.where).decode()
        return extraction.by_error(error, None if part.stats is None else part.stats.square, count)

    def _mask(self, fmt: Mask, part: _Part, entries: Bools | None) -> Arrays:
        hints = dict(part.hints)
        if entries is not None and "entries" not in hints:
            hints["entries"] = entries
        return dict(encode_with(fmt, part.w, hints, self.where).arrays)

    def _rank(self, fmt: Rank, part: _Part) -> Arrays:
        hints = dict(part.hints)
        if "factors" not in hints:
            step = self.how.step(LowRank) or LowRank()
            error = part.w if part.without is None else np.where(part.without, np.float32(0), part.w)
            hessian, square = (None, None) if part.stats is None else (part.stats.hessian, part.stats.square)
            hints["factors"] = factors(
                error, fmt.rank, step.scaling, hessian=hessian, square=square, where=self.where, log=self.log
            )
        return dict(encode_with(fmt, part.w, hints, self.where).arrays)

    def _nested(self, fmt: Sum, part: _Part) -> Arrays:
        terms = [term for term in fmt.terms if isinstance(term, Coded)]
        if len(terms) < len(fmt.terms):
            raise UsageError(
                f"the solver 'nested' fits sums of codes such as uint2/g128 + bipolar1/g128, so it cannot fit {fmt}."
            )
        options = self.how.options
        assert isinstance(options, Nested)
        assert part.stats is not None
        found = planes(
            terms, part.w, part.stats.hessian, damping=options.damping, block=options.block, search=options.search,
            where=self.where, log=self.log,
        )  # fmt: skip
        return {f"{i}.{key}": a for i, packed in enumerate(found) for key, a in packed.arrays.items()}

    # ------------------------------------------------------------ splits

    def _cols(self, fmt: Cols, part: _Part) -> Arrays:
        """The last part first; with ``obs`` its errors are made up for in the columns of the others."""
        rows, cols = part.w.shape
        stats = part.stats
        score = np.abs(part.w).max(axis=0) if stats is None else stats.absmax
        own: Arrays = {"index": padded(fmt.choose(score, part.hints))}
        lists = [index.astype(np.int64) for _, _, index in fmt.indices(own, cols)]
        w, follows = part.w, isinstance(self.how.options, Obs) and stats is not None and stats.hessian is not None
        if follows:
            w = w.copy()
        solved: list[Arrays] = []
        for i in reversed(range(len(lists))):
            here, others = lists[i], np.sort(np.concatenate([*lists[:i], np.empty(0, np.int64)]))
            inner = None if stats is None else inputs.columns(stats, here)
            follow = None
            if follows and len(others):
                assert stats is not None
                assert inner is not None
                assert stats.hessian is not None
                hessian, follow = inputs.remaining(stats.hessian, here, others, self.where, self.log)
                inner = replace(inner, hessian=hessian)
            branch = fmt.branches[i]
            arrays = self.solve(
                branch,
                _Part(
                    np.ascontiguousarray(w[:, here]), inner, None if part.fisher is None else part.fisher[:, here],
                    part.hints.get(str(i), {}), None if part.without is None else part.without[:, here],
                ),
            )  # fmt: skip
            solved.append({f"{i}.{key}": a for key, a in arrays.items()})
            if follow is not None:
                error = w[:, here] - weight_of(branch).decode_rows(arrays, rows, len(here), 0, rows)
                if part.without is not None:
                    error[part.without[:, here]] = 0
                w[:, others] += error @ follow
        for arrays in reversed(solved):
            own.update(arrays)
        return own

    def _rows(self, fmt: Rows, part: _Part) -> Arrays:
        own: Arrays = {"index": padded(fmt.choose(np.abs(part.w).max(axis=1), part.hints))}
        for i, (_, branch, here) in enumerate(list(fmt.indices(own, len(part.w)))):
            arrays = self.solve(
                branch,
                _Part(
                    part.w[here], part.stats, None if part.fisher is None else part.fisher[here],
                    part.hints.get(str(i), {}), None if part.without is None else part.without[here],
                ),
            )  # fmt: skip
            own.update({f"{i}.{key}": a for key, a in arrays.items()})
        return own

    # ------------------------------------------------------------ transforms

    def _hadamard(self, fmt: Hadamard, part: _Part) -> Arrays:
        if part.fisher is not None and "fisher" in self.how.needs:
            raise UsageError(
                f"Fisher information of {self.where} is of single weights, which {fmt} mixes; use another importance "
                "or no rotation."
            )
        w = part.w if part.without is None else np.where(part.without, np.float32(0), part.w)
        with np.errstate(over="ignore"):
            w = np.concatenate([fmt.transform(w[r : r + 256], {}) for r in range(0, len(w), 256)])
        refuse_infinite(w, fmt, "the transformed matrix")
        stats = None if part.stats is None else inputs.rotated(part.stats, fmt)
        return self._inside({}, fmt.inner, _Part(w, stats, None, part.hints.get("0", {})))

    def _permute(self, fmt: Permute, part: _Part) -> Arrays:
        size = np.abs(part.w).max(axis=0) if part.stats is None else part.stats.absmax
        order = fmt.choose(size, part.hints).astype(np.int64)
        inner = _Part(
            part.w[:, order],
            None if part.stats is None else inputs.columns(part.stats, order),
            None if part.fisher is None else part.fisher[:, order],
            part.hints.get("0", {}),
            None if part.without is None else part.without[:, order],
        )
        return self._inside({"index": padded(order.astype(np.uint32))}, fmt.inner, inner)

    def _scale(self, fmt: Scale, part: _Part) -> Arrays:
        by = fmt.choose(part.w, part.hints)
        inner = _Part(
            part.w / by,
            None if part.stats is None else inputs.scaled(part.stats, by),
            None if part.fisher is None else part.fisher * by**2,
            part.hints.get("0", {}),
            part.without,
        )
        return self._inside({"factors": padded(by.astype("<f4"))}, fmt.inner, inner)

    def _inside(self, own: Arrays, branch: Branch, part: _Part) -> Arrays:
        part = replace(part, w=np.ascontiguousarray(part.w, np.float32))
        return {**own, **{f"0.{key}": a for key, a in self.solve(branch, part).items()}}
