"""Bit planes at 4096 x 14336: which path is the fastest for which bits, activations and tokens.

    python benchmarks/kernels/planes.py [--threads 1] [--seconds 0.4] [--rows 4096] [--cols 14336]

Groups of 128 columns. Every call takes the next of several copies of the matrix, so that its codes come from memory and
not from the cache. The paths take turns; the least time of each is printed as milliseconds and, for the fastest, as
G weights a second, as bytes of codes a second and as their fraction of the bandwidth that plain reads reach on the same
threads. Each product is compared with the reference before it is timed: the integer sums bit for bit, for some panels.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from gossamer import ops

GROUP = 128
COLD_BYTES = 1 << 28  # of codes, all copies together


def reference(planes: list[np.ndarray], panel: int, cols: int, x: np.ndarray) -> np.ndarray:
    """The sums over groups of one panel, [tokens, groups, 16], in integers."""
    codes = np.zeros((16, cols), np.int64)
    bytes_of_panel = cols // 16 * 32
    for b, plane in enumerate(planes):
        bits = np.unpackbits(plane[panel * bytes_of_panel : (panel + 1) * bytes_of_panel], bitorder="little")
        codes += bits.reshape(cols // 4, 16, 4).transpose(1, 0, 2).reshape(16, cols).astype(np.int64) << b
    products = codes[None] * x[:, None].astype(np.int64)
    return products.reshape(len(x), 16, cols // GROUP, GROUP).sum(3).transpose(0, 2, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.4, help="time for each figure")
    parser.add_argument("--rows", type=int, default=4096, help="a multiple of 16")
    parser.add_argument("--cols", type=int, default=14336, help="a multiple of 128")
    parser.add_argument("--bits", type=int, nargs="*", default=[1, 2, 3, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 4, 16])
    options = parser.parse_args()
    rows, cols = options.rows, options.cols
    if rows % 16 or cols % GROUP or min(rows, cols) < 1:
        raise SystemExit("--rows must be a multiple of 16 and --cols of 128")
    ops.set_threads(options.threads)
    bandwidth = ops.read_bandwidth(1 << 28, 1.0)
    print(f"{rows} x {cols}, kernels {ops.isa()}, {options.threads} threads, reads of memory {bandwidth:.1f} GB/s")
    paths = ops.planes_paths()
    times = " | ".join(f"{p} ms" for p in paths)
    print(f"| bits | x | tokens | {times} | fastest | auto | G weights/s | GB/s | of reads |")
    print("|" + " ---: |" * (len(paths) + 8))
    rng = np.random.default_rng(0)
    panels, groups = rows // 16, cols // GROUP
    scales = np.ones(panels * groups * 16, np.float32)
    for bits in options.bits:
        plane_bytes = rows * cols // 8
        copies = max(2, -(-COLD_BYTES // (bits * plane_bytes)))
        first = [rng.integers(0, 256, plane_bytes, np.uint8) for _ in range(bits)]
        matrices = [first] + [[plane.copy() for plane in first] for _ in range(copies - 1)]
        for low, high, kind in ((-128, 128, "int8"), (-7, 8, "int4")):
            for tokens in options.tokens:
                x = rng.integers(low, high, (tokens, cols)).astype(np.int8)
                x_scale, out = np.ones(tokens, np.float32), np.empty((tokens, rows), np.float32)
                sums = np.empty((tokens, panels, groups, 16), np.int32)
                for path in paths:
                    ops.planes_sums(first, rows, cols, GROUP, x, sums, path)
                    for panel in {0, panels // 2, panels - 1}:
                        if not np.array_equal(sums[:, panel], reference(first, panel, cols, x)):
                            raise SystemExit(f"{path} is wrong at {bits} bits, {tokens} tokens")
                least = dict.fromkeys([*paths, "auto"], float("inf"))
                at, end = 0, time.perf_counter() + options.seconds * len(least)
                while time.perf_counter() < end:
                    for path in least:
                        planes = matrices[at % copies]
                        at += 1
                        began = time.perf_counter()
                        ops.planes_linear(planes, rows, cols, GROUP, scales, 0, 1, x, x_scale, out, path)
                        least[path] = min(least[path], time.perf_counter() - began)
                fastest = min(paths, key=lambda p: least[p])
                rate = bits * plane_bytes / least[fastest] / 1e9
                print(
                    f"| {bits} | {kind} | {tokens} | {' | '.join(f'{least[p] * 1e3:.2f}' for p in paths)} | {fastest} "
                    f"| {least['auto'] / least[fastest]:.2f} | {rows * cols / least[fastest] / 1e9:.0f} | {rate:.1f} "
                    f"| {rate / bandwidth:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
