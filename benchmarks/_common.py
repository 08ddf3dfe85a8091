"""What the benchmarks share: options, whole models beside llama.cpp, single layers, and how a claim is printed.

Everything is timed in turn (A B A B) between probes of the machine's peaks; a ratio is of neighbouring turns. Layers
are cold: several copies of the weights, 400 MB together, are used one after the other.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from gossamer import LLM, ops
from gossamer.checkpoints.names import resolve
from gossamer.errors import GossamerError
from gossamer.evaluate import bench, shape_model
from gossamer.evaluate.peer import LlamaCpp, check_peer
from gossamer.evaluate.peer_gguf import random_gguf
from gossamer.evaluate.random_weights import random_matrix
from gossamer.evaluate.roofline import Work, arithmetic, probe
from gossamer.evaluate.shapes import SHAPES
from gossamer.evaluate.speed import Speed
from gossamer.evaluate.turns import Cell, Job, Rate, cell, take_turns
from gossamer.formats import Packed, parse
from gossamer.formats.dispatch import linear, make_runner

A8 = "int4/g32 @ int8/g32"
COLD_BYTES = 400_000_000


def options(
    document: str, *, repetitions: int = 9, format: str | None = None, write: str | None = None
) -> argparse.Namespace:
    """``write`` is the help of ``--write``, for the benchmarks whose table stands in a document."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two repetitions of short pieces: does it run at all?")
    parser.add_argument("--repetitions", type=int, default=repetitions)
    parser.add_argument("--threads", type=int, default=ops.threads())
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has llama_cpp ('make peers')")
    if format is not None:
        parser.add_argument("--format", default=format)
    if write is not None:
        parser.add_argument("--write", action="store_true", help=write)
    args = parser.parse_args()
    if args.quick:
        args.repetitions = 2
    ops.set_threads(args.threads)
    print(f"{args.threads} threads, {ops.isa()}, {args.repetitions} turns, load average {os.getloadavg()[0]:.1f}")
    return args


def claim(what: str, value: Rate | float | None, limit: float, *, at_most: bool = False) -> None:
    """Prints a figure beside what it has to reach."""
    sign = "<=" if at_most else ">="
    if value is None:
        print(f"CLAIM {what}: no steady repetition, to reach {sign} {limit}")
        return
    middle = value.median if isinstance(value, Rate) else value
    spread = f" ({value.low:.3f} to {value.high:.3f})" if isinstance(value, Rate) else ""
    held = middle <= limit if at_most else middle >= limit
    print(f"CLAIM {what}: {middle:.3f}{spread}, to reach {sign} {limit}: {'held' if held else 'NOT held'}")


def show(c: Cell, name: str, unit: str = "tok/s", scale: float = 1.0) -> None:
    def text(r: Rate, factor: float = 1.0) -> str:
        return f"{r.median * factor:.4g} ({r.low * factor:.4g} to {r.high * factor:.4g})"

    parts = [f"{name}: {text(c.ours, scale)} {unit}"]
    if c.peer is not None and c.ratio is not None:
        parts += [f"peer {text(c.peer, scale)}", f"ratio {text(c.ratio)}"]
    share = "no steady repetition" if c.share is None else f"{100 * c.share:.1f} % of it"
    parts.append(f"roofline {c.bound_tps * scale:.4g} by {c.bound_by}, {share}, {c.dropped} dropped")
    parts.append(f"{c.bandwidth_gbps:.1f} GB/s; int8 {c.int8_gops:.0f}, bf16 {c.bf16_gops:.0f}, f32 {c.f32_gops:.0f}")
    print("  " + "; ".join(parts), flush=True)


# ---------------------------------------------------------------- whole models


def models(
    args: argparse.Namespace,
    name: str,
    format: str,
    keep: Sequence[tuple[str, str]],
    *,
    prefill: int = 512,
    decode: int = 128,
    batches: Sequence[int] = (1,),
) -> Speed | None:
    """One of SHAPES with random weights, or SmolLM2 itself, beside llama.cpp on its Q4_1 file or random Q4_0.

    Prints every piece. None, and a line that says why, when there is no llama.cpp.
    """
    if args.quick:
        prefill, decode = min(prefill, 64), min(decode, 8)
    real = name == "smollm2-135m"
    try:
        check_peer(args.peer_python)
        if real:
            peer = LlamaCpp(resolve(name), python=args.peer_python, threads=args.threads)
        else:
            with random_gguf(SHAPES[name], name) as path:  # mapped, so that it may be removed once it is loaded
                peer = LlamaCpp(path, python=args.peer_python, threads=args.threads)
    except GossamerError as error:
        print(f"skipped: {error}")
        return None
    with peer:
        model = LLM(name, format=format, keep=keep) if real else shape_model(name, format, keep=keep)
        speed = bench(model, prefill=prefill, decode=decode, batches=batches, repetitions=args.repetitions, peer=peer)
        kept = ", ".join(f"{pattern} {text}" for pattern, text in keep)
        print(
            f"{name} as {format}, {kept}: {speed.bits_per_weight:.3f} bits/weight, {'' if speed.cold else 'not '}cold"
        )
        about = peer.to_json()
        print(
            f"peer {peer.name} {about['version']} on {about['model']}: {peer.bits_per_weight:.3f} bits/weight, "
            + ", ".join(f"{k} {v}" for k, v in about["options"].items())
        )
    for c in speed.cells:
        show(c, f"prefill {c.tokens}" if c.work == "prefill" else f"decode, batch {c.batch}")
    for note in speed.notes:
        print(f"note: {note}")
    return speed


# ---------------------------------------------------------------- single layers


class Layer:
    """A linear layer with random weights, in as many copies as it takes to be cold."""

    def __init__(self, text: str, rows: int, cols: int, *, nbytes: int = COLD_BYTES) -> None:
        fmt = parse(text)
        first = random_matrix(fmt.weight, rows, cols)
        self.text, self.rows, self.cols = text, rows, cols
        self.bits_per_weight, self.nbytes = first.bits_per_weight, first.nbytes
        copies = max(1, -(-nbytes // first.nbytes))
        packed = [first, *(_copy(first) for _ in range(copies - 1))]
        self.runners = [make_runner(p, fmt) for p in packed]
        if self.runners[0].refused is not None:
            print(f"note: {text} runs unfused: {self.runners[0].refused}")

    def job(self, tokens: int) -> Callable[[], float]:
        """Runs every copy once on ``tokens`` random inputs; seconds of one, on average."""
        x = np.random.default_rng(1).standard_normal((tokens, self.cols), np.float32)
        out = np.empty((tokens, self.rows), np.float32)

        def run() -> float:
            started = time.perf_counter()
            for runner in self.runners:
                linear([runner], x, [out])
            return (time.perf_counter() - started) / len(self.runners)

        run()
        return run

    def work(self, tokens: int) -> Work:
        return Work(self.nbytes, {kind: tokens * n for kind, n in arithmetic(self.runners[0]).items()})


def _copy(packed: Packed) -> Packed:
    return Packed(packed.format, packed.shape, {name: array.copy() for name, array in packed.arrays.items()})


def layers(args: argparse.Namespace, ours: Layer, tokens: int, peer: Callable[[], float] | None, name: str) -> Cell:
    """Times a layer, beside ``peer`` (another layer's ``job``) when there is one, and prints it in GOP/s."""
    turns = take_turns([Job(ours.job(tokens), peer)], args.repetitions, probe)[0]
    c = cell("linear", 1, tokens, 1, ours.work(tokens), turns)
    show(c, f"{name}, {tokens} tokens", "GOP/s", 2 * ours.rows * ours.cols / 1e9)
    return c
