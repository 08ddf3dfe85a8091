"""``gossamer bench MODEL|--shape NAME [--formats A,B] [--batch 1,8] [--peer llama.cpp]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from gossamer import ops
from gossamer.checkpoints.names import resolve
from gossamer.cli import ui
from gossamer.cli.options import keep_rules
from gossamer.engine.llm import LLM
from gossamer.errors import UsageError
from gossamer.evaluate import bench, shape_model
from gossamer.evaluate.machine import forget_peak_rss
from gossamer.evaluate.peer import PEERS, LlamaCpp, check_peer
from gossamer.evaluate.peer_gguf import random_gguf
from gossamer.evaluate.report import check_picture, draw, report
from gossamer.evaluate.shapes import shape_config
from gossamer.evaluate.speed import PROMPT, Speed
from gossamer.evaluate.turns import Rate
from gossamer.formats import parse
from gossamer.models.load import Loaded

__all__ = ["batch_sizes", "run", "split_formats", "split_list"]

OWN = "the file's own"
MOST_SEQUENCES = 64  # what one store of keys and values has room for


def split_list(text: str) -> list[str]:
    """The entries of a list; they are parted by ',' or ';' outside of parentheses, for commas occur inside."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character in ",;" and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def split_formats(text: str) -> list[str]:
    """The expressions of a list."""
    return [str(parse(part)) for part in split_list(text)]  # an empty one is refused there


def batch_sizes(text: str) -> list[int]:
    """ "1,4,8" as numbers. Raises UsageError for anything but different whole numbers of at least 1."""
    sizes = []
    for part in text.split(","):
        number = part.strip()
        if not (number.isascii() and number.isdigit()) or len(number) > 6 or not 1 <= int(number) <= MOST_SEQUENCES:
            raise UsageError(
                f"--batch '{text}' must list whole numbers from 1 to {MOST_SEQUENCES}, for example 1,4,8,16."
            )
        sizes.append(int(number))
    if len(set(sizes)) < len(sizes):
        raise UsageError(f"--batch '{text}' names a size twice; name each once.")
    return sizes


def run(args: argparse.Namespace) -> None:
    if (args.model is None) == (args.shape is None):
        raise UsageError("give either a MODEL or --shape NAME, and not both.")
    formats: Sequence[str | None] = [None] if args.formats is None else split_formats(args.formats)
    if args.shape is not None and args.formats is None:
        formats = ["int4/g32"]
    batches = batch_sizes(args.batch)
    keep = [(pattern, str(fmt)) for pattern, fmt in keep_rules(args.keep)]
    if args.shape is not None:
        shape_config(args.shape)
    for path in (args.plot, args.json):
        if path not in (None, "-") and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"'{path}' cannot be written: its folder does not exist; make it first.")
    if args.plot is not None:
        check_picture(args.plot)
    _check_peer(args)
    if args.threads is not None:
        ops.set_threads(args.threads)
    quiet = args.json == "-"
    rows: list[tuple[str, Speed]] = []
    with ExitStack() as stack:
        peer = None
        for fmt in formats:
            forget_peak_rss()
            with ui.progress(f"loading {fmt or ''}".rstrip(), quiet) as update:
                if args.shape is not None:
                    model: LLM | Loaded = shape_model(args.shape, fmt or "int4/g32", progress=update, keep=keep)
                else:
                    context = max(args.prompt, PROMPT + args.tokens)
                    model = LLM(args.model, format=fmt, keep=keep, context=context, progress=update)
            if peer is None and args.peer is not None:  # after ours, so that a bad model is refused first
                peer = stack.enter_context(_open_peer(args, stack))
            with ui.progress(f"timing {fmt or ''}".rstrip(), quiet) as update:
                speed = bench(
                    model,
                    name=args.shape or args.model,
                    threads=args.threads,
                    prefill=args.prompt,
                    decode=args.tokens,
                    batches=batches,
                    repetitions=args.repetitions,
                    peer=peer,
                    progress=update,
                )
            rows.append((fmt or OWN, speed))
            del model
            if not quiet:
                _show(fmt or OWN, speed, peer)
        data = report(rows, peer)
    if quiet:
        ui.print_json(data)
    elif args.json is not None:
        Path(args.json).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw(data, args.plot)


def _check_peer(args: argparse.Namespace) -> None:
    if args.peer is None:
        if args.peer_model is not None or args.peer_python is not None:
            raise UsageError("--peer-model and --peer-python need --peer llama.cpp.")
        return
    if args.peer not in PEERS:
        raise UsageError(f"--peer '{args.peer}' is not known; choose {', '.join(PEERS)}.")
    check_peer(args.peer_python)


def _open_peer(args: argparse.Namespace, stack: ExitStack) -> LlamaCpp:
    """The peer on --peer-model, on the model itself when that is a GGUF file, or on random weights of the shape."""
    if args.peer_model is not None:
        path = Path(args.peer_model)
    elif args.shape is not None:
        path = stack.enter_context(random_gguf(shape_config(args.shape), args.shape))
    else:
        path = Path(resolve(args.model))
        if path.suffix.lower() != ".gguf":
            raise UsageError(f"{args.model} is no GGUF file, and llama.cpp reads only those; give --peer-model FILE.")
    return LlamaCpp(path, python=args.peer_python, threads=ops.threads())


def _show(fmt: str, speed: Speed, peer: LlamaCpp | None) -> None:
    ui.say(f"{speed.model} as {fmt}: {', '.join(f'{f} ({n} sites)' for f, n in speed.formats.items())}")
    ui.say(speed.protocol)
    if peer is not None:
        about = peer.to_json()
        ui.say(
            f"peer: {peer.name} {about['version']} on {about['model']}, {peer.bits_per_weight:.3f} bits/weight, "
            + ", ".join(f"{k} {v}" for k, v in about["options"].items())
        )
    ui.say()
    headers = [f"{speed.threads} threads, {speed.isa}", "tok/s", "least to greatest", "roofline", "bound by", "share"]
    if peer is not None:
        headers += [peer.name, "least to greatest", "ratio", "least to greatest"]
    rows = []
    for c in speed.cells:
        work = f"prefill of {c.tokens}" if c.work == "prefill" else f"decode, batch {c.batch}"
        share = "not steady" if c.share is None else f"{100 * c.share:.0f} %"
        cells = [work, f"{c.ours.median:.1f}", _span(c.ours), f"{c.bound_tps:.0f}", c.bound_by, share]
        if c.peer is not None and c.ratio is not None:
            cells += [f"{c.peer.median:.1f}", _span(c.peer), f"{c.ratio.median:.2f}", _span(c.ratio, 2)]
        rows.append(cells)
    ui.table(headers, rows)
    ui.say()
    last = speed.cells[-1]
    facts = [
        ["weights", ui.size(speed.weight_bytes), f"{speed.bits_per_weight:.3f} bits/weight"],
        ["read while decoding", "cold" if speed.cold else "partly from the cache" if speed.cold is False else "", ""],
        ["memory bandwidth", f"{speed.bandwidth_gbps:.1f} GB/s", ""],
        ["int8, bf16, f32 peaks", f"{last.int8_gops:.0f}, {last.bf16_gops:.0f}, {last.f32_gops:.0f} GOP/s", ""],
        ["load average", f"{speed.load_average:.1f}", ""],
    ]
    if speed.load_s is not None:
        facts.append(["load", f"{speed.load_s:.2f} s", ""])
    if speed.peak_rss_mb is not None:
        facts.append(["peak memory", f"{speed.peak_rss_mb:.0f} MB", ""])
    facts.append(["sites without a fused kernel", str(len(speed.unfused_sites)), ""])
    ui.table(["model and machine", "", ""], facts)
    for note in speed.notes:
        ui.say(f"note: {note}")
    for site, why in list(speed.unfused_sites.items())[:5]:
        ui.say(f"unfused: {site}: {why}")
    ui.say()


def _span(values: Rate, digits: int = 1) -> str:
    return f"({values.low:.{digits}f} to {values.high:.{digits}f})"
