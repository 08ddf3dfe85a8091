"""W8A8 (a scale for each row and each token) at 512 tokens: at least 85 % of the int8 peak; beside torch's (oneDNN).

python benchmarks/linear_w8a8.py [--quick]

The peer is the fastest of what torch offers here: dynamically quantized linear of each engine, and ``torch._int_mm``
of inputs that are integers already, with the scales multiplied in afterwards.
"""

import time
import warnings
from collections.abc import Callable

import torch

from _common import Layer, claim, layers, options


def peers(rows: int, cols: int, tokens: int) -> dict[str, Callable[[], object]]:
    x, w = torch.randn(tokens, cols), torch.randn(rows, cols)
    scale = w.abs().amax(1) / 127
    codes = (w / scale[:, None]).round().to(torch.int8)
    found: dict[str, Callable[[], object]] = {}
    for engine in torch.backends.quantized.supported_engines:
        if engine not in ("onednn", "x86", "fbgemm"):
            continue
        torch.backends.quantized.engine = engine
        whole = torch.quantize_per_channel(w, scale, torch.zeros(rows, dtype=torch.int64), 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(whole, None)
        found[engine] = lambda packed=packed: torch.ops.quantized.linear_dynamic(x, packed, False)
    x_scale = x.abs().amax(1, keepdim=True) / 127
    x_codes, transposed = (x / x_scale).round().to(torch.int8), codes.t()
    found["_int_mm"] = lambda: torch._int_mm(x_codes, transposed).float().mul_(x_scale).mul_(scale)
    return found


def seconds(call: Callable[[], object]) -> float:
    with torch.inference_mode():
        started = time.perf_counter()
        call()
        return time.perf_counter() - started


warnings.simplefilter("ignore")  # torch deprecates its quantized tensors
args = options(__doc__)
torch.set_num_threads(args.threads)
tokens = 64 if args.quick else 512
for rows, cols in ((14336, 4096), (4096, 14336), (8192, 2048)):
    found = peers(rows, cols, tokens)
    times = {name: min(seconds(call) for _ in range(4)) for name, call in found.items()}
    best = min(times, key=times.__getitem__)
    ours = Layer("int8/row @ int8/token", rows, cols, nbytes=1)
    print(f"int8/row @ int8/token: {ours.bits_per_weight:.3f} bits/weight; torch {torch.__version__} {best}: 8.0")
    print(", ".join(f"{name} {2e-9 * rows * cols * tokens / s:.0f} GOP/s" for name, s in times.items()))
    c = layers(args, ours, tokens, lambda best=best, found=found: seconds(found[best]), f"W8A8, {cols}x{rows}")
    claim(f"W8A8, {cols}x{rows}, over the int8 peak", c.share, 0.85)
