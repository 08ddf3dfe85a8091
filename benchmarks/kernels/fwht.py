"""The fast Walsh-Hadamard transform beside the dense matrix product and the memory, on one thread.

    python benchmarks/kernels/fwht.py [--rows 256] [--seconds 0.3]

For each width, the whole row one block: the least time a row of the transform (rows that stay in the cache, and rows
that come from memory) and of the dense product of rows with the matrix (numpy's BLAS, float32), taking turns; bytes
read and written a second, and their fraction of the bandwidth that plain reads of memory reach on one thread.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # read once, when numpy loads

import numpy as np  # noqa: E402

from gossamer import ops  # noqa: E402

WIDTHS = [64, 128, 576, 1536, 2048, 4096, 8192, 14336]


def turns(seconds: float, *calls: Callable[[], object]) -> list[float]:
    """The least time of each, called thrice by turns (the first may bring data into the cache) for ``seconds`` each."""
    end, least = time.perf_counter() + seconds * len(calls), [float("inf")] * len(calls)
    while True:
        for i, call in enumerate(calls):
            for _ in range(3):
                began = time.perf_counter()
                call()
                now = time.perf_counter()
                least[i] = min(least[i], now - began)
        if now > end:
            return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="rows of the dense product")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each figure")
    options = parser.parse_args()
    ops.set_threads(1)
    bandwidth = ops.read_bandwidth(1 << 28, 1.0)
    print(f"kernels {ops.isa()}, one thread, reads of memory {bandwidth:.1f} GB/s")
    print("| width | ns a row (cache) | GB/s | ns a row (memory) | GB/s | of reads | dense ns a row | dense / fast |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rng = np.random.default_rng(0)
    for width in WIDTHS:
        near_rows = max(1, (1 << 16) // width)
        near = rng.standard_normal((near_rows, width), np.float32)
        far = rng.standard_normal(((1 << 26) // width, width), np.float32)
        matrix = np.eye(width, dtype=np.float32)
        ops.fwht(matrix, width)
        x = rng.standard_normal((options.rows, width), np.float32)
        want = x @ matrix
        fast = x.copy()
        ops.fwht(fast, width)
        if not np.allclose(fast, want, rtol=0, atol=1e-4):
            raise SystemExit(f"the transform of {width} columns is not the product with its matrix")
        least = turns(
            options.seconds,
            partial(ops.fwht, near, width),
            partial(ops.fwht, far, width),
            partial(np.matmul, x, matrix, out=want),
        )
        in_cache, in_memory, dense = (t / n for t, n in zip(least, (near_rows, len(far), len(x))))
        bytes_moved = 8 * width  # each element read and written once
        print(
            f"| {width} | {in_cache * 1e9:.0f} | {bytes_moved / in_cache / 1e9:.0f} | {in_memory * 1e9:.0f} "
            f"| {bytes_moved / in_memory / 1e9:.1f} | {bytes_moved / in_memory / 1e9 / bandwidth:.0%} "
            f"| {dense * 1e9:.0f} | {dense / in_cache:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
