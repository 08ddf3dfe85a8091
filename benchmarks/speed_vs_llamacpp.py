"""Prefill and decode of SmolLM2-135M beside llama.cpp, in turn (A B A B), medians and spread of the ratio.

    python benchmarks/speed_vs_llamacpp.py [--peer-python PATH] [--repetitions 9] [--threads 2] [--write]

The peer is llama.cpp through its PyPI bindings, built from source with native flags (``make peers``), on Q4_0 and the
packaged Q4_1 files of the same model. Each side loads its model once; a repetition is a 512-token prompt in one batch,
then 128 single tokens after a 16-token prompt, no sampling, keys and values in f16. The weights (about 90 MB) are
larger than a last-level cache of 32 MB. Prints each side's bits/weight.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gossamer import LLM, ops
from gossamer.checkpoints.gguf import GGUFFile
from gossamer.checkpoints.names import resolve
from gossamer.limits import default_threads

HERE = Path(__file__).parent
CASES = [  # ours, llama.cpp's type
    ("int4/g32 @ int8/token", "Q4_0"),
    ("int4/g32", "Q4_0"),
    (None, "Q4_1"),
]


class Peer:
    def __init__(self, python: str, model: Path, threads: int) -> None:
        self.process = subprocess.Popen(
            [python, str(HERE / "_llamacpp_worker.py"), str(model), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.about = self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the llama.cpp worker ended; run benchmarks/_llamacpp_worker.py by hand to see why")
        return json.loads(line)

    def repetition(self, prefill: int, decode: int) -> dict[str, float]:
        self.process.stdin.write(json.dumps({"prefill": prefill, "decode": decode}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def ours(llm: LLM, prefill: int, decode: int) -> dict[str, float]:
    tokens = np.random.default_rng(0).integers(10, llm.config.vocab - 10, max(prefill, decode + 16)).tolist()
    run = llm.transformer
    sequence = llm.new_sequence(max(prefill, decode + 16))
    started = time.perf_counter()
    *_, hidden = llm.hidden(tokens[:prefill], sequence)
    run.logits(hidden[-1:])
    prefill_s = time.perf_counter() - started
    sequence.truncate(0)
    *_, hidden = llm.hidden(tokens[:16], sequence)
    started = time.perf_counter()
    for i in range(decode):
        (hidden,) = llm.hidden([tokens[16 + i]], sequence)
        run.logits(hidden)
    return {"prefill_tps": prefill / prefill_s, "decode_tps": decode / (time.perf_counter() - started)}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--write", action="store_true", help="put the table into docs/measurements.md")
    args = parser.parse_args()
    has_peer = subprocess.run([args.peer_python, "-c", "import llama_cpp"], capture_output=True).returncode == 0
    if not has_peer:
        print(f"skipped: {args.peer_python} has no llama_cpp; 'make peers' builds it")
        return
    ops.set_threads(args.threads)
    rows = [
        "| ours | bits/weight | llama.cpp | bits/weight | prefill tok/s, ours / peer | ratio "
        "| decode tok/s, ours / peer | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    packaged = resolve("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        files = {"Q4_1": packaged}
        for ours_format, kind in CASES:
            if kind not in files:
                files[kind] = Path(folder) / f"{kind}.gguf"
                worker = [args.peer_python, str(HERE / "_llamacpp_worker.py"), "quantize"]
                subprocess.run([*worker, str(packaged), str(files[kind]), kind], check=True, capture_output=True)
            llm = LLM("smollm2-135m", format=ours_format, keep=[("embed", "int8/g32")] if ours_format else [])
            peer = Peer(args.peer_python, files[kind], args.threads)
            a, b = [], []
            for i in range(args.repetitions + 1):
                first, second = ours(llm, 512, 128), peer.repetition(512, 128)
                if i:  # the first turn warms both
                    a.append(first)
                    b.append(second)
            peer.close()
            with GGUFFile(files[kind]) as file:
                bits = 8 * file.data_bytes / llm.loaded.topology.parameters
            name = ours_format or "the file's own (uint4/g32-m(f16) @ bf16)"
            cells = [name, f"{llm.loaded.bits_per_weight:.2f}", kind, f"{bits:.2f}"]
            for key in ("prefill_tps", "decode_tps"):
                x, y = [r[key] for r in a], [r[key] for r in b]
                cells.append(f"{statistics.median(x):.0f} / {statistics.median(y):.0f}")
                cells.append(spread([p / q for p, q in zip(x, y)]))
            rows.append("| " + " | ".join(cells) + " |")
            print(rows[-1], flush=True)
    about = (
        f"SmolLM2-135M-Instruct, {args.threads} threads, {ops.isa()}, {args.repetitions} turns, "
        f"embedding and head int8/g32 "
        f"(llama.cpp: Q8_0); llama-cpp-python {peer.about['version']} built from source with native flags; "
        f"load average {os.getloadavg()[0]:.1f}. Ratio: median (least-most) of the turns."
    )
    print("\n".join([about, *rows]))
    if args.write:
        from _tables import replace

        replace(HERE.parent / "docs" / "measurements.md", "speed-vs-llamacpp", "\n".join([about, "", *rows]))


if __name__ == "__main__":
    main()
