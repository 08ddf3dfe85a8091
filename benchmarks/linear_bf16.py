"""A bf16 linear layer at 512 tokens: at least 80 % of the bf16 dot peak; beside torch's (oneDNN).

python benchmarks/linear_bf16.py [--quick]
"""

import time

import torch

from _common import Layer, claim, layers, options

args = options(__doc__)
torch.set_num_threads(args.threads)
tokens = 64 if args.quick else 512
for rows, cols in ((14336, 4096), (8192, 2048)):
    weight = torch.randn(rows, cols, dtype=torch.bfloat16)
    x = torch.randn(tokens, cols, dtype=torch.bfloat16)

    def peer(x=x, weight=weight) -> float:
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        return time.perf_counter() - started

    with torch.inference_mode():
        peer()
        ours = Layer("bf16", rows, cols, nbytes=1)
        print(f"bf16: {ours.bits_per_weight:.3f} bits/weight; torch {torch.__version__} bf16: 16.000")
        c = layers(args, ours, tokens, peer, f"bf16, {cols}x{rows}")
        claim(f"bf16, {cols}x{rows}, over the bf16 peak", c.share, 0.8)
