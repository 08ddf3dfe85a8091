"""Decode of several sequences at once, Llama-3.2-1B shape: batch 8 and 16 over batch 1, and over llama.cpp's Q4_0.

python benchmarks/batch.py [--quick] [--peer-python PATH]

At least 5.5 and 7.5 times batch 1, and at least 3 times llama.cpp at both; the claims are for a machine that reads
38 to 48 GB/s.
"""

from _common import A8, claim, models, options

args = options(__doc__, format=A8)
KEEP = [("embed", "int6/g32 @ int8/g32")]
speed = models(args, "llama-3.2-1b", args.format, KEEP, prefill=16, decode=64, batches=(1, 8, 16))
if speed:
    decode = {c.batch: c for c in speed.cells[1:]}
    for batch, least in ((8, 5.5), (16, 7.5)):
        claim(f"batch {batch} over batch 1", decode[batch].ours.median / decode[1].ours.median, least)
        claim(f"batch {batch} over llama.cpp Q4_0", decode[batch].ratio, 3.0)
