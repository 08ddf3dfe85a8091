"""Decode of the Llama-3-8B shape, groups of 64: 95 % of the measured read bandwidth, 1.1 times llama.cpp's Q4_0.

python benchmarks/decode_8b.py [--quick] [--peer-python PATH]

Takes 14 GB of memory and 5 GB of disk for the time it runs.
"""

from _common import claim, models, options

args = options(__doc__, repetitions=5, format="int4/g64 @ int8/g64")
KEEP = [("embed", "int6/g32 @ int8/g32"), ("head", "int6/g32 @ int8/g32")]
speed = models(args, "llama-3-8b", args.format, KEEP, prefill=16, decode=32)
if speed:
    claim("8B decode over the read bandwidth", speed.bandwidth_fraction, 0.95)
    claim("8B decode over llama.cpp Q4_0", speed.cells[1].ratio, 1.1)
