"""A recipe: how a paper compresses a model, as data. See ``recipes/*.yaml``; a file of one's own has the same keys.

    name title paper year link claims mechanism notes    what it is and where it comes from
    formats      {role or pattern of names: expression}; of several that match a site the last counts
    transforms   [{name: ..., options}]   function-preserving changes of the weights, in this order
    allocate     {name: ..., options}     who gets which format, where ``formats`` does not settle it
    solver       {name: ..., options}     how values are found; ``tables`` is that of embedding and head
    then         [name, {name: options}]  what improves them afterwards
    needs        [hessian, fisher, ...]   what calibration must collect
    calibration  {tokens, length, text}
    sequential   layer, group or none: after what the inputs of the next are taken from compressed weights

The steps run in the order of this list, whatever their order in the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from gossamer.compress.allocate.by_role import ROLES
from gossamer.compress.schema import listed, read, unknown
from gossamer.compress.solvers.options import SOLVERS, STEPS, Solver
from gossamer.compress.steps import ALLOCATORS, TRANSFORMS, Allocator, Transformer, out_of_order
from gossamer.errors import UsageError
from gossamer.models.config import shown

__all__ = ["Calibration", "Recipe", "Step", "load", "names", "of_format", "parse_recipe"]

FILE_BYTES = 1 << 18
NEEDS = ("hessian", "inputs", "fisher")
KEYS = (
    *("name", "title", "paper", "year", "link", "claims", "mechanism", "notes", "formats", "transforms", "allocate"),
    *("solver", "tables", "then", "needs", "calibration", "sequential"),
)
SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "transforms": TRANSFORMS,
    "allocate": ALLOCATORS,
    "solver": SOLVERS,
    "then": STEPS,
}


@dataclass(frozen=True)
class Step:
    """A transform or an allocator, and its options in the class that it declares for them."""

    name: str
    options: Any

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, **_plain(self.options)}


def _plain(options: Any) -> dict[str, Any]:
    """A dataclass as JSON values."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(options)))
    return found


def _step(value: Any, where: str, section: str) -> Step:
    """``NAME`` or ``{name: NAME, option: value}``."""
    table: Mapping[str, Transformer | Allocator] = TRANSFORMS if section == "transforms" else ALLOCATORS
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise UsageError(f"{where} is {shown(value)}, which should be a name, or {{name: ..., options}}.")
    name = given["name"]
    _refuse_elsewhere(name, where, section)
    if name not in table:
        raise unknown(where, "step", name, list(table))
    options = {key: v for key, v in given.items() if key != "name"}
    return Step(name, read(table[name].options, options, f"{where} {name}"))


def _refuse_elsewhere(name: object, where: str, section: str) -> None:
    """A step that belongs to another section is in the wrong order: sections run one after the other."""
    if name in SECTIONS[section]:
        return
    for other, names in SECTIONS.items():
        if name in names:
            raise UsageError(
                f"{where} names '{name}', which is a step of '{other}'; the order is {listed(list(SECTIONS))}."
            )


def _steps(value: Any, where: str) -> tuple[Step, ...]:
    if not isinstance(value, list):
        raise UsageError(f"{where} is {shown(value)}, which should be a list of steps.")
    steps = tuple(_step(v, where, "transforms") for v in value)
    if fault := out_of_order([s.name for s in steps]):
        raise UsageError(f"{where}: {fault}")
    return steps


def _formats(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
        raise UsageError(f"{where} is {shown(value)}, which should map roles or patterns of names to expressions.")
    for key in value:
        if key not in ROLES and not (isinstance(key, str) and any(c in key for c in "*?[.")) and key != "lm_head":
            raise unknown(where, "role", str(key), ROLES)
    if "*" in list(value)[1:]:
        raise UsageError(f"{where}: '*' hides what stands before it, as the last that matches counts; write it first.")
    return dict(value)


def _claims(value: Any, where: str) -> tuple[str, ...]:
    claims = [value] if isinstance(value, str) else value
    if not isinstance(claims, list) or not all(isinstance(c, str) for c in claims):
        raise UsageError(f"{where} is {shown(value)}, which should be a text, or a list of them.")
    return tuple(claims)


def _by(reader: Callable[[Any, str], Any]) -> dict[str, Any]:
    return {"read": reader}


@dataclass(frozen=True)
class Calibration:
    """``tokens`` in all, in sequences of ``length``; ``text`` is "self", the name of a text, or a file."""

    tokens: int = 32768
    length: int = 512
    text: str = "self"

    def __post_init__(self) -> None:
        if not 2 <= self.length <= 1 << 20:
            raise UsageError(f"sequences of {self.length} tokens cannot be; a length is 2 to {1 << 20}.")
        if not self.length <= self.tokens <= 1 << 30:
            raise UsageError(f"{self.tokens} tokens do not hold one sequence of {self.length}; give more tokens.")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: every step is known, its options are its own, and the order is one that can run."""

    name: str
    formats: Mapping[str, str] = field(metadata=_by(_formats))
    title: str = ""
    paper: str = ""
    year: int | None = None
    link: str = ""
    claims: tuple[str, ...] = field(default=(), metadata=_by(_claims))
    mechanism: str = ""
    notes: str = ""
    transforms: tuple[Step, ...] = field(default=(), metadata=_by(_steps))
    allocate: Step = field(
        default=Step("by_role", ALLOCATORS["by_role"].options()), metadata=_by(partial(_step, section="allocate"))
    )
    solver: Solver = field(default_factory=Solver)
    tables: Solver = field(default_factory=Solver)
    declared: tuple[str, ...] = ()
    calibration: Calibration = Calibration()
    sequential: Literal["layer", "group", "none"] = "layer"

    def __post_init__(self) -> None:
        if self.declared and (missing := [need for need in self.needs if need not in self.declared]):
            raise UsageError(f"its steps need {listed(missing)}, which 'needs' does not name; add it there.")
        if self.tables.needs:
            raise UsageError(
                f"tables cannot be solved by {self.tables.name} so, for it needs inputs, which a table has none of; "
                "choose nearest, hqq, or clip with importance: none."
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """What calibration must collect for the steps of this recipe, in the order of NEEDS."""
        found = set(self.declared) | self.solver.needs | ALLOCATORS[self.allocate.name].needs
        for step in self.transforms:
            found |= TRANSFORMS[step.name].needs
        return tuple(need for need in NEEDS if need in found)

    @property
    def calibrated(self) -> bool:
        """Whether any step looks at what the model does with a text."""
        return bool(self.needs)

    def as_dict(self) -> dict[str, Any]:
        """What a run does, defaults included: what a ledger keeps."""
        return {
            "name": self.name,
            "paper": self.paper,
            "formats": dict(self.formats),
            "transforms": [s.as_dict() for s in self.transforms],
            "allocate": self.allocate.as_dict(),
            "solver": _solver(self.solver),
            "tables": _solver(self.tables),
            "needs": list(self.needs),
            "sequential": self.sequential,
        }


def _solver(solver: Solver) -> dict[str, Any]:
    """A solver with every option, as a ledger keeps it."""
    found = {"name": solver.name, **_plain(solver.options)}
    if solver.outliers is not None:
        found["outliers"] = _plain(solver.outliers)
    kinds = {kind: name for name, kind in STEPS.items()}
    return found | {"then": [{kinds[type(step)]: _plain(step)} for step in solver.then]}


# ---------------------------------------------------------------- where recipes come from


@cache
def names() -> tuple[str, ...]:
    """The recipes that come with the program."""
    folder = files("gossamer.compress") / "recipes"
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def load(name: str) -> Recipe:
    """The recipe of this name, or in this file. Raises UsageError for what is neither, and for a file that is wrong."""
    if name in names():
        text = (files("gossamer.compress") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        return parse_recipe(text, f"recipe {name}")
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        error = unknown("--recipe", "name", name, names())
        raise UsageError(f"{str(error).removesuffix('.')}, or give the path of a .yaml file.")
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_BYTES + 1)
        if len(data) > FILE_BYTES:
            raise UsageError(f"{path} has more than {FILE_BYTES >> 10} kB, which no recipe has; give another file.")
        return parse_recipe(data.decode(), path.name)
    except OSError as error:
        raise UsageError(f"the recipe {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"the recipe {path} is not UTF-8; save it as such.") from None


def of_format(expression: str | None, recipe: Recipe | None = None) -> Recipe:
    """``recipe`` with ``expression`` as its format "*"; without one plain rounding (``rtn``) of every site to it.

    None stands for the formats that the checkpoint has. Raises UsageError where the recipe gives formats in another
    way, so that one expression cannot stand for them.
    """
    if recipe is None:
        return replace(load("rtn"), formats={} if expression is None else {"*": expression})
    if "*" not in recipe.formats or recipe.allocate.name != "by_role":
        raise UsageError(
            f"--format {expression} cannot stand for the formats of the recipe {recipe.name}, which gives several; "
            "use --keep PATTERN=EXPR for some sites, or write a recipe file."
        )
    return replace(recipe, formats={**recipe.formats, "*": expression} if expression else {})


def parse_recipe(text: str, where: str) -> Recipe:
    """The recipe that a YAML text describes. Raises UsageError, one sentence that names ``where``."""
    data = _yaml(text, where)
    for key in data:
        if key not in KEYS:
            raise unknown(where, "key", str(key), KEYS)
    for section in ("solver", "tables"):
        value = data.get(section)
        _refuse_elsewhere(value.get("name") if isinstance(value, Mapping) else value, f"{where}: {section}", "solver")
    then = data.pop("then", None)
    for step in then if isinstance(then, list) else []:
        names = list(step) if isinstance(step, Mapping) else [step]
        _refuse_elsewhere(names[0] if names else None, f"{where}: then", "then")
    given = {"declared" if key == "needs" else key: value for key, value in data.items()}
    if "needs" in data and isinstance(data["needs"], list):
        for need in data["needs"]:
            if need not in NEEDS:
                raise unknown(f"{where}: needs", "entry", str(need), NEEDS)
    try:
        given["solver"] = Solver.parse(data.get("solver"), then, where)
        given["tables"] = Solver.parse(data.get("tables"), None, where)
    except UsageError as error:
        message = str(error)
        raise UsageError(message if where in message else f"{where}: {message}") from None
    return read(Recipe, given, where)


class _Loader(yaml.SafeLoader):
    """Plain data without tricks: no anchors, which can blow up a small file, and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it refers to another place with '*', which recipes do not")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {shown(key)} in line {node.start_mark.line + 1} is no text; quote it")
            if key in keys[:i]:
                raise yaml.YAMLError(f"the key {shown(key)} stands twice in line {node.start_mark.line + 1} and after")
        return super().construct_mapping(node, deep)


def _yaml(text: str, where: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, _Loader)  # a safe loader, made stricter
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(str(error.problem).split())
        raise UsageError(f"{where}{line} is not sound YAML: {problem}; mend it.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = "it nests too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UsageError(f"{where} is not sound YAML: {problem}; mend it.") from None
    if not isinstance(data, dict):
        raise UsageError(f"{where} holds {shown(data)}, which should be the keys of a recipe, such as 'name: mine'.")
    return data
