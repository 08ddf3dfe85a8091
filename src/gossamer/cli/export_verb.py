"""``gossamer export MODEL --to gguf|compressed-tensors -o PATH [--lossy TYPE,...]``."""

from __future__ import annotations

import argparse
import time
from collections import Counter

from gossamer.checkpoints.names import resolve
from gossamer.cli import ui
from gossamer.errors import UsageError
from gossamer.export.reencode import Exported
from gossamer.models.checkpoint import open_checkpoint

__all__ = ["run"]

_WORST = 5  # sites listed with their error


def run(args: argparse.Namespace) -> None:
    if not args.output:
        raise UsageError("--output is empty; give the name of the file or folder to write.")
    lossy = _types(args.lossy)
    checkpoint = open_checkpoint(resolve(args.model))
    started = time.perf_counter()
    with ui.progress("exporting", args.json) as update:
        if args.to == "gguf":
            from gossamer.export.gguf import export_gguf

            done = export_gguf(checkpoint, args.output, lossy, update)
        else:
            from gossamer.export.compressed_tensors import export_compressed_tensors

            done = export_compressed_tensors(checkpoint, args.output, lossy, update)
    seconds = time.perf_counter() - started
    if args.json:
        ui.print_json(_as_json(done, seconds))
        return
    _tell(done, seconds)


def _types(text: str | None) -> list[str]:
    """The types of --lossy; commas inside parentheses belong to an expression."""
    if text is None:
        return []
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    found = [part.strip() for part in parts]
    if not all(found):
        raise UsageError(f"--lossy '{text}' does not read as TYPE or TYPE,TYPE, for example --lossy Q4_K,Q8_0.")
    return found


def _tell(done: Exported, seconds: float) -> None:
    counts = Counter(done.types.values())
    kinds = ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())
    ui.say(f"wrote {done.path}: {ui.size(done.data_bytes)} of tensors ({kinds}) in {seconds:.1f} s")
    if not done.errors:
        ui.say("every weight keeps its value exactly")
        return
    ui.say(
        f"{len(done.errors)} of {len(done.types)} sites were stored anew; "
        f"relative RMS error over all sites {done.overall:.3g}"
    )
    worst = sorted(done.errors.items(), key=lambda item: -item[1])[:_WORST]
    ui.table(["site", "type", "relative RMS error"], [[n, done.types[n], f"{e:.3g}"] for n, e in worst], left=2)


def _as_json(done: Exported, seconds: float) -> dict[str, object]:
    return {
        "path": str(done.path),
        "data_bytes": done.data_bytes,
        "total_bytes": done.total_bytes,
        "types": done.types,
        "relative_rms": {"overall": done.overall, "sites": done.errors},
        "seconds": seconds,
    }
