"""``gossamer compress MODEL -o DIR [--recipe NAME|FILE] [--format EXPR] [--keep PATTERN=EXPR]``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gossamer import ops
from gossamer.checkpoints.names import resolve
from gossamer.cli import ui
from gossamer.cli.options import keep_rules
from gossamer.compress import recipe as recipes
from gossamer.compress.check import CheckError
from gossamer.compress.job import Job, Written, compress
from gossamer.compress.preflight import Prediction
from gossamer.compress.recipe import Calibration, Recipe
from gossamer.compress.watch import Watch
from gossamer.errors import ResourceError, UsageError
from gossamer.models.checkpoint import Checkpoint, open_checkpoint
from gossamer.models.load import Progress

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    if not args.output:
        raise UsageError("--output is empty; give the name of the folder to write.")
    recipe = _recipe(args)
    keep = [(pattern, str(fmt)) for pattern, fmt in keep_rules(args.keep)]
    if args.threads is not None:
        ops.set_threads(args.threads)
    checkpoint = open_checkpoint(resolve(args.model))
    calibration = _calibration(args, recipe)
    if args.dry_run:
        job = Job(checkpoint, recipe, keep=keep, calibration=calibration, seed=args.seed)
        _tell_plan(checkpoint, recipe, job.preview(args.output), args)
        return
    watch = _Shown(checkpoint, recipe, args.json)
    try:
        done = compress(
            checkpoint, args.output, recipe, keep=keep, calibration=calibration, seed=args.seed, watch=watch
        )
    except (KeyboardInterrupt, ResourceError, CheckError):
        _tell_kept(args.output)
        raise
    _tell_result(checkpoint, done, args.json)


def _recipe(args: argparse.Namespace) -> Recipe:
    if args.recipe is None and args.format is None:
        raise UsageError(f"give --recipe NAME ({', '.join(recipes.names())}), a recipe file, or --format EXPR.")
    found = None if args.recipe is None else recipes.load(args.recipe)
    if args.format is not None:
        return recipes.of_format(args.format, found)
    assert found is not None
    return found


def _calibration(args: argparse.Namespace, recipe: Recipe) -> Calibration:
    given = {"text": args.calibration, "tokens": args.calibration_tokens}
    given = {key: value for key, value in given.items() if value is not None}
    if given and not recipe.calibrated:
        raise UsageError(
            f"the recipe {recipe.name} looks at no text, so --calibration and --calibration-tokens say nothing; leave "
            "them out, or choose a recipe that calibrates."
        )
    return replace(recipe.calibration, **given)


class _Shown(Watch):
    """Lines and bars on standard error."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, quiet: bool) -> None:
        self.checkpoint, self.recipe, self.quiet = checkpoint, recipe, quiet

    def predicted(self, prediction: Prediction) -> None:
        if not self.quiet:
            ui.note(_sizes(self.checkpoint, prediction))
            if self.recipe.calibrated:
                ui.note(f"  predicted: {_needs(prediction)}")

    def say(self, text: str) -> None:
        if not self.quiet:
            ui.note(f"  {text}")

    @contextmanager
    def phase(self, what: str) -> Iterator[Progress]:
        with ui.progress(what, self.quiet) as update:
            yield update


def _sizes(checkpoint: Checkpoint, p: Prediction) -> str:
    return (
        f"{checkpoint.path.name}: {ui.size(checkpoint.data_bytes)} of weights -> {ui.size(p.data_bytes)} "
        f"({p.bits_per_weight:.3f} bits/weight)"
    )


def _needs(p: Prediction) -> str:
    return f"{_span(p.seconds)}, {ui.size(p.peak_bytes)} of memory, {ui.size(p.disk_bytes)} of disk while it works"


def _span(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _tell_plan(checkpoint: Checkpoint, recipe: Recipe, p: Prediction, args: argparse.Namespace) -> None:
    if args.json:
        ui.print_json({"recipe": recipe.name, "source_bytes": checkpoint.data_bytes, **p.as_dict()})
        return
    ui.say(_sizes(checkpoint, p))
    ui.say(f"  recipe {recipe.name}{': ' + recipe.title if recipe.title else ''}")
    steps = ", ".join(f"{name} {_span(seconds)}" for name, seconds in p.steps.items())
    ui.say(f"  time about {_span(p.seconds)} ({steps})")
    ui.say(f"  memory up to {ui.size(p.peak_bytes)}")
    ui.say(f"  disk {ui.size(p.output_bytes)} for the folder and {ui.size(p.work_bytes)} more while it works")
    ui.say("  nothing was written")


def _tell_kept(out: str) -> None:
    folder = Path(out).absolute()
    work = folder.parent / f".{folder.name}.partial"
    if work.exists():
        ui.note(f"what is finished is kept in {work}: give the same command again to go on, or remove it")


def _tell_result(checkpoint: Checkpoint, done: Written, as_json: bool) -> None:
    if as_json:
        ui.print_json(
            {
                "path": str(done.path),
                "data_bytes": done.data_bytes,
                "folder_bytes": done.folder_bytes,
                "bits_per_weight": done.bits_per_weight,
                "source_bytes": checkpoint.data_bytes,
                "seconds": done.seconds,
                "peak_bytes": done.peak_bytes,
                "predicted": done.predicted.as_dict(),
                "resumed": done.resumed,
            }
        )
        return
    ui.say(
        f"wrote {done.path}: {done.data_bytes:,} bytes of weights ({done.bits_per_weight:.3f} bits/weight), "
        f"{done.folder_bytes:,} bytes in all, in {_span(done.seconds)} ({_span(done.predicted.seconds)} predicted)"
    )
    if done.peak_bytes is not None:
        ui.say(f"  memory up to {ui.size(done.peak_bytes)} ({ui.size(done.predicted.peak_bytes)} predicted)")
