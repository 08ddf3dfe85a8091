"""``gossamer bench MODEL|--shape NAME``."""

from __future__ import annotations

import argparse

from gossamer import ops
from gossamer.cli import ui
from gossamer.engine.llm import LLM
from gossamer.errors import UsageError
from gossamer.evaluate import bench, shape_model
from gossamer.models.load import Loaded

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    if (args.model is None) == (args.shape is None):
        raise UsageError("give either a MODEL or --shape NAME, and not both.")
    if args.threads is not None:
        ops.set_threads(args.threads)
    with ui.progress("loading", args.json) as update:
        if args.shape is not None:
            fmt = "int4/g32" if args.format is None else args.format
            model: LLM | Loaded = shape_model(args.shape, fmt, progress=update)
        else:
            model = LLM(args.model, format=args.format, progress=update)
    with ui.progress("timing", args.json) as update:
        speed = bench(
            model,
            name=args.shape or args.model,
            threads=args.threads,
            repetitions=args.repetitions,
            progress=update,
        )
    if args.json:
        ui.print_json(speed.to_json())
        return
    ui.say(f"{speed.model}: {', '.join(f'{fmt} ({n} sites)' for fmt, n in speed.formats.items())}")
    ui.say(speed.protocol)
    ui.say()

    def span(low_high: tuple[float, float]) -> str:
        return f"({low_high[0]:.1f} to {low_high[1]:.1f})"

    fraction = "not steady enough" if speed.bandwidth_fraction is None else f"{100 * speed.bandwidth_fraction:.0f} %"
    rows = [
        ["prefill", f"{speed.prefill_tps:.1f} tok/s", span(speed.prefill_tps_range)],
        ["decode", f"{speed.decode_tps:.1f} tok/s", span(speed.decode_tps_range)],
        ["decode reads", f"{speed.decode_gbps:.2f} GB/s", ""],
        ["memory bandwidth", f"{speed.bandwidth_gbps:.2f} GB/s", ""],
        ["share of the bandwidth", fraction, f"{speed.dropped} of {speed.repetitions} repetitions dropped"],
        ["weights", ui.size(speed.weight_bytes), f"{speed.bits_per_weight:.3f} bits/weight"],
    ]
    if speed.load_s is not None:
        rows.append(["load", f"{speed.load_s:.2f} s", ""])
    if speed.peak_rss_mb is not None:
        rows.append(["peak memory", f"{speed.peak_rss_mb:.0f} MB", ""])
    rows.append(["sites without a fused kernel", str(len(speed.unfused_sites)), ""])
    ui.table([f"{speed.threads} threads, {speed.isa}", "", ""], rows)
    for note in speed.notes:
        ui.say(f"note: {note}")
    for site, why in list(speed.unfused_sites.items())[:5]:
        ui.say(f"unfused: {site}: {why}")
