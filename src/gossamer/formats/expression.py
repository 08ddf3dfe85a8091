"""Format expressions as text.

    site    := weight [ "@" input ]                    no "@" means "@ bf16"
    weight  := "f32" | "f16" | "bf16"
             | number "/" group [ "*" scale ] [ "-z(" number ")" | "-m(" scale ")" ]
    number  := "int8" | "int5" | "int4" | "uint8" | "uint5" | "uint4"
    group   := "g" N (a multiple of 8) | "row"
    scale   := "f32" | "f16" | "bf16"
    input   := "f32" | "bf16" | "int8/token"

Spaces do not matter. Printing gives the shortest form, and parsing what was printed gives the same value.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from gossamer.errors import FormatError
from gossamer.formats.coded import BLOCK, MAX_GROUP, Coded, default_scale
from gossamer.formats.dense import Dense
from gossamer.formats.node import Format
from gossamer.formats.numbers import FLOATS, INTEGERS

__all__ = ["INPUTS", "SiteFormat", "parse", "parse_weight"]

INPUTS = ("f32", "bf16", "int8/token")
DEFAULT_INPUT = "bf16"


@dataclass(frozen=True)
class SiteFormat:
    """How a linear site is stored and what its input is rounded to before it is multiplied."""

    weight: Format
    input: str = DEFAULT_INPUT

    def __post_init__(self) -> None:
        if self.input not in INPUTS:
            raise FormatError(f"input format '{self.input}' is not known; inputs are {', '.join(INPUTS)}.")
        if self.input == "int8/token" and not self.weight.integer:
            raise FormatError(
                f"'{self.weight} @ int8/token' cannot run: integer inputs need an integer weight such as "
                "int8/g32; use @ bf16 or @ f32."
            )

    def __str__(self) -> str:
        return str(self.weight) if self.input == DEFAULT_INPUT else f"{self.weight} @ {self.input}"


def _quote(text: str) -> str:
    """Text that a person typed, fit for a one-line message: short, on one line, without control characters."""
    flat = " ".join(text.split())[:61]
    safe = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in flat)
    return f"'{safe}'" if len(safe) <= 60 else f"'{safe[:57]}...'"


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word[:60].lower(), known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "."


def parse_weight(text: str) -> Format:
    """Reads a weight expression, without '@'. Raises FormatError naming the token that is wrong."""
    source = "".join(text.split())
    if not source:
        raise FormatError("a format expression is empty; write for example 'int4/g32' or 'bf16'.")
    where = f"in format {_quote(text)}:"
    name, slash, rest = source.partition("/")
    if name in FLOATS:
        if slash:
            raise FormatError(f"{where} {name} is stored as it is and takes no {_quote('/' + rest)}; write '{name}'.")
        return Dense(name)
    if name not in INTEGERS:
        known = [*FLOATS, *INTEGERS]
        raise FormatError(
            f"{where} {_quote(name)} is not a number format (known: {', '.join(known)}){_suggest(name, known)}"
        )
    if not rest:
        raise FormatError(f"{where} '{name}' needs a group, such as {name}/g32 or {name}/row.")
    match = re.fullmatch(r"([A-Za-z0-9]*)(?:\*([A-Za-z0-9]+))?(?:-([zm])\(([^()]*)\))?", rest)
    if match is None:
        raise FormatError(
            f"{where} {_quote(rest)} does not read as GROUP[*SCALE][-z(NUMBER) or -m(SCALE)], "
            "for example g32, g128*bf16 or g32-m(f16)."
        )
    group_text, scale, kind, offset = match.groups()
    group = _group(where, group_text)
    number = INTEGERS[name]
    if scale is not None and scale not in FLOATS:
        raise FormatError(
            f"{where} scale {_quote(scale)} is not known (scales: {', '.join(FLOATS)}){_suggest(scale, list(FLOATS))}"
        )
    if kind:
        part = _quote(f"-{kind}({offset})")
        if number.signed:
            raise FormatError(f"{where} signed codes take no {part}; write u{name} for an offset.")
        if kind == "z" and offset != name:
            raise FormatError(f"{where} a zero point of {name} is stored as {name}, so write -z({name}), not {part}.")
        if kind == "m" and offset not in FLOATS:
            raise FormatError(f"{where} a minimum is stored as one of {', '.join(FLOATS)}, so {part} cannot be.")
    return Coded(number, group, scale or default_scale(group), offset if kind == "m" else None)


def _group(where: str, token: str) -> int | None:
    if token == "row":
        return None
    match = re.fullmatch(r"[gGq]?([0-9]{1,9})", token)
    size = int(match[1]) if match else 0
    good = BLOCK <= size <= MAX_GROUP and size % BLOCK == 0
    if not good or token[0] != "g":
        # A mistyped letter leaves the number worth suggesting; a bad number, the next good one.
        near = min(MAX_GROUP, max(BLOCK, (size + BLOCK - 1) // BLOCK * BLOCK))
        hint = f"; did you mean 'g{near}'?" if match else "."
        raise FormatError(
            f"{where} {_quote(token)} is not a group: write 'row', or gN with N a multiple of {BLOCK} up to "
            f"{MAX_GROUP}, such as g32, g64 or g128{hint}"
        )
    return size


def parse(text: str) -> SiteFormat:
    """Reads a site format such as ``int4/g32 @ int8/token``. Raises FormatError naming the wrong token."""
    weight, at, given = text.partition("@")
    if not at:
        return SiteFormat(parse_weight(weight))
    where = f"in format {_quote(text)}:"
    if not weight.strip():
        raise FormatError(f"{where} there is no weight format before the '@'; write for example 'int4/g32 @ bf16'.")
    source = "".join(given.split())
    if not source:
        raise FormatError(f"{where} there is no input format after the '@'; write one of {', '.join(INPUTS)}.")
    if source not in INPUTS:
        raise FormatError(
            f"{where} input {_quote(source)} is not known (inputs: {', '.join(INPUTS)}){_suggest(source, list(INPUTS))}"
        )
    return SiteFormat(parse_weight(weight), source)
