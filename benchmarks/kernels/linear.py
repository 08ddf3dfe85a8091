"""The ladder of the linear kernels: from decoding and multiplying in numpy up, each rung checked against the first.

    python benchmarks/kernels/linear.py [--rows 2048] [--cols 2048] [--threads 1] [--seconds 0.3] [--format EXPR ...]

Rungs: numpy on the decoded matrix and the rounded inputs (the definition), then the same kernel source compiled for
each instruction set of the machine. Every call takes the next of several copies of the matrix, so that one token reads
its codes from memory. The least time of the repetitions is printed, as GB/s of packed bytes for one token and as GOP/s
(two a multiply-add) for many, and beside the best rung its fraction of the bandwidth and of the dot product's peak.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from gossamer import ops
from gossamer.formats import ArraySource, encode, parse
from gossamer.formats.dispatch import linear, make_runner

FORMATS = ["int4/g32 @ int8/g32", "int4/g32 @ bf16", "int8/row @ int8/token", "nf4/g64 @ int8/g32", "bf16"]
TOKENS = (1, 8, 64, 512)
COLD_BYTES = 1 << 27
TOLERANCE = 2e-4  # of the sum of magnitudes; tests/kernels states exact bounds


def least(run: Callable[[int], None], seconds: float) -> float:
    """Seconds of the fastest call; ``run`` is told which copy to take."""
    run(0)
    best, end, turn = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        turn += 1
        started = time.perf_counter()
        run(turn)
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each figure")
    parser.add_argument("--format", action="append", help="an expression; may be given several times")
    parser.add_argument("--quick", action="store_true", help="one format, little time")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.format = 0.05, options.format or FORMATS[:1]
    ops.set_threads(options.threads)
    bandwidth, peaks = ops.read_bandwidth(1 << 28, 1.0), {k: ops.dot_peak(k, 0.3) for k in ("int8", "bf16", "f32")}
    print(f"{options.rows} x {options.cols}, {options.threads} threads, reads of memory {bandwidth:.1f} GB/s, peaks "
          + ", ".join(f"{k} {v:.0f} GOP/s" for k, v in peaks.items()))  # fmt: skip
    rng = np.random.default_rng(0)
    w = rng.standard_normal((options.rows, options.cols)).astype(np.float32)
    x = rng.standard_normal((max(TOKENS), options.cols)).astype(np.float32)
    for text in options.format or FORMATS:
        climb(text, w, x, options.seconds, {"bytes": bandwidth, **peaks})


def climb(text: str, w: np.ndarray, inputs: np.ndarray, seconds: float, limits: dict[str, float]) -> None:
    """Prints one format's ladder."""
    site = parse(text)
    packed = encode(site.weight, ArraySource(w))
    decoded = packed.decode()
    copies = max(2, -(-COLD_BYTES // packed.nbytes))
    runners = [make_runner(encode(site.weight, ArraySource(w)), site) for _ in range(copies)]
    path = runners[0].leaves[0].path
    print(f"\n{text}: {packed.bits_per_weight:.2f} bits a weight, {path} path")
    print("| rung | " + " | ".join("1 token, GB/s" if n == 1 else f"{n}, GOP/s" for n in TOKENS) + " |")
    print("| --- |" + " ---: |" * len(TOKENS))
    best_level = ops.isa()
    for level in ["numpy", *ops.isa_supported()]:
        cells = []
        for n in TOKENS:
            x, out = np.ascontiguousarray(inputs[:n]), np.empty((n, len(w)), np.float32)

            def naive(_: int, x: np.ndarray = x) -> None:
                np.matmul(site.input.apply(x), packed.decode().T)

            def fused(turn: int, x: np.ndarray = x, out: np.ndarray = out) -> None:
                linear([runners[turn % copies]], x, [out])

            if level == "numpy":
                took = least(naive, seconds)
            else:
                ops.set_isa(level)
                took = least(fused, seconds)
                rounded = site.input.apply(x)
                if not (np.abs(out - rounded @ decoded.T) <= TOLERANCE * (np.abs(rounded) @ np.abs(decoded).T)).all():
                    raise SystemExit(f"{text} at {level} with {n} tokens is wrong")
            work = packed.nbytes / took / 1e9 if n == 1 else 2 * w.size * n / took / 1e9
            share = work / limits["bytes" if n == 1 else path]
            cells.append(f"{work:.1f} ({share:.0%})" if level == best_level else f"{work:.1f}")
        print(f"| {level} | " + " | ".join(cells) + " |")
    ops.set_isa(best_level)


if __name__ == "__main__":
    main()
