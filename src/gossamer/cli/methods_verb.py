"""``gossamer methods [NAME]``."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict
from typing import Any

from gossamer.cli import ui
from gossamer.compress.methods import SHAPE, Method, method, methods

__all__ = ["run"]

WIDTH = 110  # characters of a line
LABEL = 12


def run(args: argparse.Namespace) -> None:
    if args.json:
        ui.print_json(asdict(method(args.name)) if args.name else [asdict(m) for m in methods()])
    elif args.name:
        _page(method(args.name))
    else:
        for m in methods():
            ui.say(f"{m.name}: {m.title}")
            _entry("paper", f"{m.paper} ({m.year})" if str(m.year) not in m.paper else m.paper)
            _entry("claim", m.claims[0] if m.claims else "none")
            _entry("mechanism", m.mechanism)
            _entry("cost", _cost(m))
        ui.say()
        ui.say("gossamer methods NAME tells all about one; claims are the papers'.")


def _page(m: Method) -> None:
    ui.say(f"{m.name}: {m.title}")
    _entry("paper", m.paper)
    _entry("year", str(m.year))
    _entry("link", m.link)
    for claim in m.claims:
        _entry("claim", claim)
    _entry("mechanism", m.mechanism)
    _entry("steps", ", ".join(m.steps))
    for pattern, expression in m.formats.items():
        _entry("format", f"{pattern}: {expression}")
    _entry("cost", _cost(m))
    if m.notes:
        _entry("notes", m.notes)
    if not m.measured:
        _entry("measured", "nothing yet; gossamer compress MODEL --recipe NAME makes it, gossamer eval measures it.")
        return
    ui.say()
    columns = list(dict.fromkeys(key for row in m.measured for key in row))
    ui.table(columns, [[_figure(row.get(key, "")) for key in columns] for row in m.measured])


def _cost(m: Method) -> str:
    """Bytes, and what has to be known before."""
    bits = f"{'at most ' if m.at_most else ''}{m.bits:.3f} bits a weight in the blocks of {SHAPE}"
    if not m.needs:
        return f"{bits}; no calibration"
    words = {
        "hessian": "second moments of every input",
        "inputs": "ranges and means of every input",
        "fisher": "gradients of the loss",
    }
    tokens = f" over {m.calibration['tokens']:,} tokens" if "tokens" in m.calibration else ""
    return f"{bits}; calibrated with {', '.join(words.get(need, need) for need in m.needs)}{tokens}"


def _entry(label: str, text: str) -> None:
    first, rest = f"  {label}".ljust(LABEL + 2), " " * (LABEL + 2)
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    for line in lines:
        ui.say(line)


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
