"""Prefill and decode of SmolLM2-135M beside llama.cpp, in turn (A B A B), medians and spread of the ratio.

    python benchmarks/speed_vs_llamacpp.py [--quick] [--peer-python PATH] [--write]

The peer is llama.cpp through its PyPI bindings, built from source with native flags (``make peers``), on Q4_0 and the
packaged Q4_1 files of the same model. Each side loads its model once; a repetition is a 512-token prompt in one batch,
then 128 single tokens after a 16-token prompt, no sampling, keys and values in f16. The weights (about 90 MB) are
larger than a last-level cache of 32 MB. Prints each side's bits/weight; ``--write`` puts the table into
docs/measurements.md.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from _common import options
from _tables import replace
from gossamer import LLM, ops
from gossamer.checkpoints.names import resolve
from gossamer.errors import UsageError
from gossamer.evaluate import bench
from gossamer.evaluate.peer import LlamaCpp, quantize
from gossamer.evaluate.turns import Cell

CASES = [  # ours, llama.cpp's type
    ("int4/g32 @ int8/token", "Q4_0"),
    ("int4/g32", "Q4_0"),
    (None, "Q4_1"),
]
HEAD = [
    "| ours | bits/weight | llama.cpp | bits/weight | prefill tok/s, ours / peer | ratio "
    "| decode tok/s, ours / peer | ratio |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
]


def cells(c: Cell) -> list[str]:
    return [
        f"{c.ours.median:.0f} / {c.peer.median:.0f}",
        f"{c.ratio.median:.2f} ({c.ratio.low:.2f}-{c.ratio.high:.2f})",
    ]


def main() -> None:
    args = options(__doc__, write="put the table into docs/measurements.md")
    packaged, rows = Path(resolve("smollm2-135m")), list(HEAD)
    prefill, decode = (64, 8) if args.quick else (512, 128)
    with tempfile.TemporaryDirectory() as folder:
        files = {"Q4_1": packaged, "Q4_0": Path(folder) / "Q4_0.gguf"}
        try:
            quantize(packaged, files["Q4_0"], "Q4_0", python=args.peer_python)
        except UsageError as error:
            print(f"skipped: {error}")
            return
        for ours, kind in CASES:
            model = LLM("smollm2-135m", format=ours, keep=[("embed", "int8/g32")] if ours else [])
            with LlamaCpp(files[kind], python=args.peer_python, threads=args.threads) as peer:
                speed = bench(model, prefill=prefill, decode=decode, repetitions=args.repetitions, peer=peer)
            name = ours or "the file's own (uint4/g32-m(f16) @ bf16)"
            bits = [f"{speed.bits_per_weight:.2f}", kind, f"{peer.bits_per_weight:.2f}"]
            rows.append("| " + " | ".join([name, *bits, *cells(speed.cells[0]), *cells(speed.cells[1])]) + " |")
            print(rows[-1], flush=True)
    about = (
        f"SmolLM2-135M-Instruct, {args.threads} threads, {ops.isa()}, {args.repetitions} turns, "
        f"embedding and head int8/g32 (llama.cpp: Q8_0); llama-cpp-python {peer.about['version']} built from source "
        f"with native flags; load average {os.getloadavg()[0]:.1f}. Ratio: median (least-most) of the turns."
    )
    print("\n".join([about, *rows]))
    if args.write:
        replace(
            Path(__file__).parents[1] / "docs" / "measurements.md", "speed-vs-llamacpp", "\n".join([about, "", *rows])
        )


if __name__ == "__main__":
    main()
