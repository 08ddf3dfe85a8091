"""The published methods that come as recipes: what each claims, how it works, what it costs, what was measured of it.

A recipe is a YAML file in ``recipes``; ``measured.json`` beside them holds {recipe: [{column: value}, ...]}, written by
the benchmarks. Only what describes a method is read here; ``recipe.py`` reads what a run does.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from gossamer.compress.allocate.by_role import by_role
from gossamer.compress.allocate.loss import packed_bytes
from gossamer.errors import UsageError
from gossamer.evaluate.shapes import shape_config
from gossamer.formats import parse
from gossamer.models.topology import Site, describe

__all__ = ["SHAPE", "Method", "method", "methods"]

SHAPE = "llama-3-8b"  # whose block linears the cost is stated for
STEPS = ("transforms", "allocate", "solver", "then")


@dataclass(frozen=True)
class Method:
    """One recipe as a person reads it.

    ``formats`` maps roles and patterns of names to expressions. ``steps`` are the names of what is done, in order.
    ``needs`` says what calibration collects (empty: no text is read). ``bits`` is the packed bits per weight of the
    block linears of an 8B shape, the most where a site may get less (``at_most``). ``measured`` are rows of results.
    """

    name: str
    title: str
    paper: str
    year: int | None
    link: str
    claims: tuple[str, ...]
    mechanism: str
    notes: str
    formats: Mapping[str, str]
    steps: tuple[str, ...]
    needs: tuple[str, ...]
    calibration: Mapping[str, Any]
    bits: float
    at_most: bool
    measured: tuple[Mapping[str, Any], ...]


@cache
def methods() -> tuple[Method, ...]:
    """All that come with the program, by name."""
    folder = files("gossamer.compress") / "recipes"
    found = sorted(file.name for file in folder.iterdir() if file.name.endswith(".yaml"))
    results = folder / "measured.json"
    measured = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    return tuple(_read((folder / name).read_text(encoding="utf-8"), measured) for name in found)


def method(name: str) -> Method:
    """The method of that name. Raises UsageError for another."""
    for found in methods():
        if found.name == name:
            return found
    names = [m.name for m in methods()]
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(names)}."
    raise UsageError(f"'{name}' is no method that comes as a recipe; {hint}")


def _read(text: str, measured: Mapping[str, Any]) -> Method:
    import yaml

    data: dict[str, Any] = yaml.safe_load(text)
    claims = data.get("claims", [])
    allocate = data.get("allocate", {})
    bits, at_most = _bits(data["formats"], {"name": allocate} if isinstance(allocate, str) else allocate)
    return Method(
        name=data["name"],
        title=data.get("title", ""),
        paper=data.get("paper", ""),
        year=data.get("year"),
        link=data.get("link", ""),
        claims=(claims,) if isinstance(claims, str) else tuple(claims),
        mechanism=data.get("mechanism", ""),
        notes=data.get("notes", ""),
        formats=data["formats"],
        steps=tuple(word for section in STEPS for word in _names(data.get(section, []))),
        needs=tuple(data.get("needs", ())),
        calibration=data.get("calibration", {}),
        bits=bits,
        at_most=at_most,
        measured=tuple(measured.get(data["name"], ())),
    )


def _names(section: Any) -> list[str]:
    """The names of a step, or of a list of steps: NAME, {name: NAME, ...} or {NAME: {...}}."""
    if isinstance(section, str):
        return [section]
    if isinstance(section, Mapping):
        return [str(section.get("name", next(iter(section), "")))]
    return [name for step in section for name in _names(step)]


def _bits(formats: Mapping[str, str], allocate: Mapping[str, Any]) -> tuple[float, bool]:
    """Bits per weight of a block of the shape, and whether that is the most that there can be."""
    sites = [site for site in describe(shape_config(SHAPE)).sites if site.layer == 0]
    bits = _mean_bits(sites, formats)
    if "wide" in allocate:
        share = allocate["percent"] / 100 if "percent" in allocate else allocate["count"] / allocate["block"]
        wide = f"{allocate['wide']} @ {parse(formats['*']).input}"
        bits += share * (_mean_bits(sites, {"*": wide}) - bits)
    return bits, allocate.get("name") == "finequant"


def _mean_bits(sites: list[Site], formats: Mapping[str, str]) -> float:
    chosen = by_role(sites, formats)
    weights = sum(site.rows * site.cols for site in sites)
    return 8 * sum(packed_bytes(chosen[s.name].weight, s.rows, s.cols) for s in sites) / weights
