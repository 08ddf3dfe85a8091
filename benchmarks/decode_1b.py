"""Decode of the Llama-3.2-1B shape: at least 1.3 times llama.cpp's Q4_0, and 92 % of the measured read bandwidth.

python benchmarks/decode_1b.py [--quick] [--peer-python PATH]
"""

from _common import A8, claim, models, options

args = options(__doc__, format=A8)
speed = models(args, "llama-3.2-1b", args.format, [("embed", "int6/g32 @ int8/g32")], prefill=16)
if speed:
    claim("1B decode over llama.cpp Q4_0", speed.cells[1].ratio, 1.3)
    claim("1B decode over the read bandwidth", speed.bandwidth_fraction, 0.92)
