"""``gossamer compare MODEL --recipes A,B,... [-o DIR]``."""

from __future__ import annotations

import argparse
import json
from contextlib import AbstractContextManager
from pathlib import Path

from gossamer import ops
from gossamer.checkpoints.names import resolve
from gossamer.checkpoints.safetensors_writer import write_error
from gossamer.cli import ui
from gossamer.cli.bench_verb import split_list
from gossamer.cli.options import keep_rules, reading
from gossamer.cli.report_verb import COMPARED, write_page
from gossamer.compress.compare import Comparison, Options, compare, draw_frontier
from gossamer.errors import ResourceError
from gossamer.evaluate import text
from gossamer.evaluate.html import page
from gossamer.models.load import Progress

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    how = reading(args)
    keep = [(pattern, str(fmt)) for pattern, fmt in keep_rules(args.keep)]
    passage = text(args.text)
    if args.threads is not None:
        ops.set_threads(args.threads)
    if args.output is not None:
        _make(Path(args.output))  # before hours of measuring

    def step(what: str) -> AbstractContextManager[Progress]:
        return ui.progress(what, args.json)

    found = compare(
        resolve(args.model),
        split_list(args.recipes),
        passage,
        keep=keep,
        against=None if args.against is None else resolve(args.against),
        options=Options(**how, inputs=args.inputs, repetitions=0 if args.no_speed else Options.repetitions),
        cache=args.cache,
        fresh=args.fresh,
        step=step,
    )
    data = found.to_json()
    if args.output is not None:
        folder = Path(args.output)
        write_page(folder / COMPARED, json.dumps(data, indent=2) + "\n")
        write_page(folder / "frontier.svg", draw_frontier(found))
        write_page(folder / "report.html", page(f"Comparison of {found.model}", results=[(COMPARED, data)]))
    if args.json:
        ui.print_json(data)
        return
    _show(found)
    if args.output is not None:
        ui.say(f"wrote {args.output}: {COMPARED}, frontier.svg and report.html")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{write_error(folder, error)}.") from None


def _show(found: Comparison) -> None:
    ui.say(f"{found.model} against {found.against}; {found.text}")
    ui.say(found.protocol)
    ui.say()
    speed = any(r.decode_tps is not None for r in found.rows)
    headers = ["", "MB", "bits/weight", "KL (nats/token)", "KL 99 %", "same token", "perplexity"]
    rows = []
    for r in found.rows:
        error = "" if r.kl_mean_stderr is None else f" +- {r.kl_mean_stderr:.5f}"
        cells = [f"{'* ' if r.best else '  '}{r.name}", f"{r.bytes / 1e6:.1f}", f"{r.bits_per_weight:.3f}"]
        cells += [f"{r.kl_mean:.5f}{error}", f"{r.kl_p99:.4f}", f"{r.top1_agreement:.4f}", f"{r.perplexity:.3f}"]
        if speed:
            cells.append("" if r.decode_tps is None else f"{r.decode_tps:.1f}")
        rows.append(cells)
    ui.table([*headers, *(["tok/s"] if speed else [])], rows)
    ui.say()
    ui.say("* no other row is both smaller and closer to the base")
    ui.say(f"noise floor: the base differs from itself in another precision by {found.noise_floor:.6f} nats/token")
