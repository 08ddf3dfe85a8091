"""Strict reading of options into frozen dataclasses: what a class declares is all that a file may say.

A field's type is what its value must be: str, bool, int, float, Literal, a tuple of one of them, a dataclass of its
own, or one of these or None. A field whose metadata has "read", a function of (value, where), is read by that instead.
Ranges are the class's own matter, in ``__post_init__``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gossamer.errors import UsageError
from gossamer.models.config import shown

__all__ = ["listed", "options_of", "read", "unknown"]

T = TypeVar("T")


def read(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """The value of the dataclass ``cls`` that ``data`` describes; fields that it leaves out keep their defaults.

    Raises UsageError naming ``where`` for a key that is no field, a value of another type, and a field that is missing.
    """
    kinds = options_of(cls)
    for key in data:
        if key not in kinds:
            raise unknown(where, "option", str(key), list(kinds))
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        own = fields[key].metadata.get("read")
        place = f"{where}: {key}"
        values[key] = own(value, place) if own else _value(kinds[key], value, place)
    for field in fields.values():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in values:
            raise UsageError(f"{where} lacks '{field.name}', which it needs; add it.")
    try:
        return cls(**values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def options_of(cls: type) -> dict[str, Any]:
    """The options of a dataclass and their types."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def unknown(where: str, what: str, name: str, known: Sequence[str]) -> UsageError:
    """The error for a name that is not among those that there are."""
    close = difflib.get_close_matches(name[:60], known, n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'? " if close else ""
    there = f"there is {listed(known)}" if known else "there is none"
    return UsageError(f"{where} has the {what} {shown(name)}, which is not known; {hint}{there}.")


def listed(names: Sequence[str]) -> str:
    """Names for a sentence: "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [a for a in arguments if a is not type(None)]
        for i, some in enumerate(inner):
            try:
                return _value(some, value, where)
            except UsageError:
                if i == len(inner) - 1:
                    raise
    if origin is Literal:
        if value not in arguments or isinstance(value, bool) != isinstance(arguments[0], bool):
            raise UsageError(f"{where} is {shown(value)}; it can be {', '.join(map(str, arguments))}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{where} is {shown(value)}, which should be a list in brackets.")
        return tuple(_value(arguments[0], v, where) for v in value)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise UsageError(f"{where} is {shown(value)}, which should be options in braces.")
        return read(kind, value, where)  # type: ignore[arg-type]
    words = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    accepted = (int, float) if kind is float else kind
    # True is an int to isinstance, and no number to a person.
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{where} is {shown(value)}, which should be {words[kind]}.")
    if kind is float and not math.isfinite(value):
        raise UsageError(f"{where} is {value}, which should be a finite number.")
    return float(value) if kind is float else value
