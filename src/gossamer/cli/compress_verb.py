"""``gossamer compress MODEL -o DIR --format EXPR [--keep PATTERN=EXPR]``."""

from __future__ import annotations

import argparse
import time

from gossamer import ops
from gossamer.checkpoints.names import resolve
from gossamer.cli import ui
from gossamer.cli.options import keep_rules
from gossamer.compress.write import compress
from gossamer.engine.llm import chooser
from gossamer.errors import UsageError
from gossamer.formats import parse
from gossamer.models.checkpoint import open_checkpoint
from gossamer.models.load import Plan

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    if not args.output:
        raise UsageError("--output is empty; give the name of the folder to write.")
    fmt, rules = parse(args.format), keep_rules(args.keep)
    if args.threads is not None:
        ops.set_threads(args.threads)
    checkpoint = open_checkpoint(resolve(args.model))
    choose = chooser(fmt, rules, checkpoint.topology)

    def tell(plan: Plan) -> None:
        if not args.json:
            ui.note(
                f"{checkpoint.path.name}: {ui.size(checkpoint.data_bytes)} of weights -> {ui.size(plan.data_bytes)} "
                f"({plan.bits_per_weight:.3f} bits/weight)"
            )

    started = time.perf_counter()
    recipe = {"name": "rtn", "format": str(fmt), "keep": {p: str(f) for p, f in rules}}
    with ui.progress("compressing", args.json) as update:
        done = compress(checkpoint, args.output, choose, recipe=recipe, before_write=tell, progress=update)
    seconds = time.perf_counter() - started
    if args.json:
        ui.print_json(
            {
                "path": str(done.path),
                "data_bytes": done.data_bytes,
                "folder_bytes": done.folder_bytes,
                "bits_per_weight": done.bits_per_weight,
                "source_bytes": checkpoint.data_bytes,
                "seconds": seconds,
            }
        )
        return
    ui.say(
        f"wrote {done.path}: {done.data_bytes:,} bytes of weights ({done.bits_per_weight:.3f} bits/weight), "
        f"{done.folder_bytes:,} bytes in all, in {seconds:.1f} s"
    )
