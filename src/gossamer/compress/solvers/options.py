"""How a site is solved: a frozen value read from a recipe, ``solver: {name: obs, order: act}`` and ``then: [round]``.

Every option is a field of one of the classes below, with its default and its range; an unknown one is a UsageError that
lists what there is.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from gossamer.compress.solvers.extraction import SENSITIVE
from gossamer.compress.solvers.hqq import Hqq
from gossamer.compress.solvers.lowrank import Scaling
from gossamer.compress.solvers.obs import Obs
from gossamer.compress.solvers.search import Search
from gossamer.errors import UsageError

__all__ = [
    "SOLVERS",
    "STEPS",
    "Bias",
    "Clip",
    "Dual",
    "Hqq",
    "Lloyd",
    "LowRank",
    "Nearest",
    "Nested",
    "Obs",
    "Outliers",
    "Progressive",
    "Round",
    "Solver",
]

T = TypeVar("T")

SEARCH = Search()

_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a name"}


def _within(value: float, least: float, most: float, what: str) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        raise UsageError(f"option '{what}' must be {least:g} to {most:g}, not {value:g}.")


@dataclass(frozen=True)
class Nearest:
    """Round to nearest with the format's own scales: what ``encode`` does."""


@dataclass(frozen=True)
class Clip(Search):
    """Scales and offsets searched, with the options of ``Search``.

    importance: errors count by the mean squares of the input (``input``), by the second moments within each group
    (``block``), by Fisher information, or alike (``none``).
    """

    importance: Literal["input", "block", "fisher", "none"] = "input"


@dataclass(frozen=True)
class Lloyd:
    """Tables by weighted k-means."""

    importance: Literal["input", "fisher", "none"] = "fisher"


@dataclass(frozen=True)
class Progressive:
    """QoQ's two levels: protective int8 per row, then uint4 groups inside it, whose ranges may shrink to ``lowest``.

    obs: options of a Hessian sweep on the scales and zero points that were found; none: codes round to nearest.
    """

    lowest: float = 1.0
    importance: Literal["input", "none"] = "input"
    obs: Obs | None = None

    def __post_init__(self) -> None:
        _within(self.lowest, 0.05, 1, "lowest")


@dataclass(frozen=True)
class Dual:
    """DGQ's two grains: group scales that are int8 multiples of a row's, both searched by the output's error.

    tokens: of the samples, at most so many are tried on. obs: as for ``Progressive``.
    """

    tokens: int = 128
    obs: Obs | None = None

    def __post_init__(self) -> None:
        _within(self.tokens, 1, 1 << 20, "tokens")


@dataclass(frozen=True)
class Nested:
    """Matryoshka planes: a base and signs of what it leaves, errors pushed from block to block at every width.

    search: of the base's ranges; nothing for the largest magnitude.
    """

    damping: float = 0.01
    block: int = 128
    search: Search | None = SEARCH

    def __post_init__(self) -> None:
        _within(self.damping, 0, 10, "damping")
        _within(self.block, 16, 1 << 16, "block")


@dataclass(frozen=True)
class Outliers:
    """Which entries a mask beside the codes keeps.

    rule: ``fisher`` SqueezeLLM's; ``loop`` chosen inside ``obs`` (SpQR); ``error`` largest weighed error of a first
    fit; ``magnitude`` largest |w|; ``residual`` largest of what remains after the fit. ``sensitive`` and ``reach`` go
    with ``fisher``, ``threshold`` with ``loop``: it is raised where more entries reach it than the mask holds.
    """

    rule: Literal["fisher", "loop", "error", "magnitude", "residual"] = "error"
    sensitive: float = SENSITIVE
    reach: float | None = None
    threshold: float = 0.2

    def __post_init__(self) -> None:
        _within(self.sensitive, 0, 5, "sensitive")
        _within(self.threshold, 0, 1e6, "threshold")
        if self.reach is not None:
            _within(self.reach, 0, 100, "reach")


@dataclass(frozen=True)
class Round:
    """Codes improved by coordinate descent on the output's error.

    passes: over all columns. scales: how often the scales (and minima) are fitted again to the codes, and the codes to
    them, after that.
    """

    passes: int = 4
    scales: int = 0

    def __post_init__(self) -> None:
        _within(self.passes, 1, 100, "passes")
        _within(self.scales, 0, 100, "scales")


@dataclass(frozen=True)
class LowRank:
    """How the low-rank part of a sum is found from what the codes leave."""

    scaling: Scaling = "plain"


@dataclass(frozen=True)
class Bias:
    """The mean error of the output is handed back, to be added to the site's bias."""


Options = Nearest | Clip | Hqq | Obs | Lloyd | Progressive | Dual | Nested
Step = Round | LowRank | Bias

SOLVERS: dict[str, type[Any]] = {
    "nearest": Nearest,
    "clip": Clip,
    "hqq": Hqq,
    "obs": Obs,
    "lloyd": Lloyd,
    "progressive": Progressive,
    "dual": Dual,
    "nested": Nested,
}
STEPS: dict[str, type[Any]] = {"round": Round, "lowrank": LowRank, "bias": Bias}


@dataclass(frozen=True)
class Solver:
    """How a site's values are found: the solver of its codes, which entries a mask keeps, and what is done after."""

    options: Options = Nearest()
    outliers: Outliers | None = None
    then: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        kinds = [type(step) for step in self.then]
        if len(set(kinds)) < len(kinds):
            raise UsageError("'then' names a step twice; write each once.")
        if kinds != sorted(kinds, key=list(STEPS.values()).index):
            raise UsageError(f"'then' has steps in an order that cannot be; write them as {', '.join(STEPS)}.")
        if self.outliers is not None and self.outliers.rule == "loop" and not isinstance(self.options, Obs):
            raise UsageError("outliers chosen in the loop go with the solver 'obs' alone; write rule: error.")
        if isinstance(self.options, (Lloyd, Nested)) and Round in kinds:
            raise UsageError(f"the step 'round' moves codes on scales that stand, so it cannot follow '{self.name}'.")

    @property
    def name(self) -> str:
        return next(name for name, kind in SOLVERS.items() if isinstance(self.options, kind))

    def step(self, kind: type[T]) -> T | None:
        """The step of this kind in ``then``, if there is one."""
        return next((step for step in self.then if isinstance(step, kind)), None)

    @property
    def needs(self) -> frozenset[str]:
        """What calibration must give: "hessian", "inputs" (ranges, means and samples) or "fisher"."""
        found = set()
        by = getattr(self.options, "importance", "none")
        swept = isinstance(self.options, (Obs, Nested)) or getattr(self.options, "obs", None) is not None
        if swept or by == "block" or self.step(Round):
            found.add("hessian")
        lowrank = self.step(LowRank)
        if lowrank is not None and lowrank.scaling == "whiten":
            found.add("hessian")
        if isinstance(self.options, Dual) or by == "input" or self.step(Bias) or (lowrank and lowrank.scaling == "rms"):
            found.add("inputs")
        if by == "fisher" or (self.outliers is not None and self.outliers.rule == "fisher"):
            found.add("fisher")
        return frozenset(found)

    @classmethod
    def parse(cls, solver: Any = None, then: Any = None, where: str = "the recipe") -> Solver:
        """From a recipe: ``solver`` a name or a mapping with ``name`` and options, ``then`` a list of steps.

        A step is a name, or a mapping of one name to its options. Raises UsageError, in one sentence, for what is
        unknown or out of range.
        """
        if isinstance(solver, str):
            solver = {"name": solver}
        given = dict(_mapping({} if solver is None else solver, "solver", where))
        name = given.pop("name", "nearest")
        outliers = given.pop("outliers", None)
        if isinstance(outliers, str):
            outliers = {"rule": outliers}
        options = _named(SOLVERS, name, given, "solver", where)
        found = None if outliers is None else _build(Outliers, outliers, "outliers", where)
        steps = [] if then is None else [then] if isinstance(then, (str, Mapping)) else then
        if not isinstance(steps, Iterable):
            raise UsageError(f"'then' of {where} must be a list of steps ({', '.join(STEPS)}), not {then!r}.")
        return cls(options, found, tuple(_step(step, where) for step in steps))


def _step(step: Any, where: str) -> Step:
    if isinstance(step, str):
        return _named(STEPS, step, {}, "step", where)  # type: ignore[no-any-return]
    given = _mapping(step, "then", where)
    if len(given) != 1:
        raise UsageError(f"a step of {where} is a name or one name with its options, not {dict(given)!r}.")
    ((name, options),) = given.items()
    return _named(STEPS, name, {} if options is None else options, "step", where)  # type: ignore[no-any-return]


def _named(table: Mapping[str, type[Any]], name: Any, given: Any, what: str, where: str) -> Any:
    if not isinstance(name, str) or name not in table:
        close = difflib.get_close_matches(str(name), table, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(table)}."
        raise UsageError(f"{what} '{name}' of {where} is not known; {hint}")
    return _build(table[name], given, f"{what} '{name}'", where)


def _mapping(given: Any, what: str, where: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise UsageError(f"'{what}' of {where} must be a mapping of options to values, not {given!r}.")
    return given


def _build(kind: type[Any], given: Any, what: str, where: str) -> Any:
    """A frozen class from a mapping of its fields."""
    known = {f.name for f in fields(kind)}
    given = _mapping(given, what, where)
    if unknown := [key for key in given if key not in known]:
        takes = ", ".join(f.name for f in fields(kind)) or "none"
        raise UsageError(f"{what} of {where} has no option '{unknown[0]}'; its options: {takes}.")
    hints = get_type_hints(kind)
    return kind(**{key: _value(hints[key], value, f"{what}, option '{key}',", where) for key, value in given.items()})


def _value(hint: Any, value: Any, what: str, where: str) -> Any:
    """A value of the type that a field asks for."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UsageError(f"{what} of {where} is {value!r}; write {', '.join(get_args(hint))}.")
        return value
    choices = get_args(hint) or (hint,)
    if value is None and NoneType in choices:
        return None
    for choice in choices:
        if is_dataclass(choice):
            return _build(choice, value, what, where)  # type: ignore[arg-type]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if choice is float and number:
            return float(value)
        if choice is int and number and float(value).is_integer():
            return int(value)
        if choice is str and isinstance(value, str):
            return value
    wanted = " or ".join("nothing" if c is NoneType else _KINDS[c]
                         for c in choices)  # fmt: skip
    raise UsageError(f"{what} of {where} must be {wanted}, not {value!r}.")
