"""Decode of SmolLM2-135M at 4 bits: at least 2.3 times llama.cpp's Q4_1 (the packaged file).

python benchmarks/decode_smollm2.py [--quick] [--peer-python PATH]
"""

from _common import A8, claim, models, options

args = options(__doc__, format=A8)
speed = models(args, "smollm2-135m", args.format, [("embed", "int8/g32 @ int8/g32")], prefill=16)
if speed:
    claim("SmolLM2-135M decode over llama.cpp Q4_1", speed.cells[1].ratio, 2.3)
