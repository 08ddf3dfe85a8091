"""Prefill of 512 tokens with 4-bit weights and 8-bit inputs, and the share of the int8 peak of its linear layers.

python benchmarks/prefill.py [--quick] [--peer-python PATH]

SmolLM2-135M at least 6.5 times llama.cpp's Q4_1; the 1B and 8B shapes at least 2.5 times its Q4_0, and their linear
layers at least 70 % of the int8 peak (60 % with groups of 32, when those prove bound by their scales).
"""

from _common import A8, Layer, claim, layers, models, options

args = options(__doc__, repetitions=5, format=A8)
CASES = [
    ("smollm2-135m", [("embed", "int8/g32 @ int8/g32")], 6.5, "Q4_1"),
    ("llama-3.2-1b", [("embed", "int6/g32 @ int8/g32")], 2.5, "Q4_0"),
    ("llama-3-8b", [("embed", "int6/g32 @ int8/g32"), ("head", "int6/g32 @ int8/g32")], 2.5, "Q4_0"),
]
for name, keep, least, kind in CASES[: 2 if args.quick else 3]:
    speed = models(args, name, args.format, keep, decode=4)
    if speed:
        claim(f"{name} prefill over llama.cpp {kind}", speed.cells[0].ratio, least)
for text, least in ((args.format, 0.6), ("int4/g128 @ int8/g128", 0.7)):
    for rows, cols in ((8192, 2048), (14336, 4096)):
        c = layers(args, Layer(text, rows, cols, nbytes=1), 64 if args.quick else 512, None, f"{text}, {cols}x{rows}")
        claim(f"{text}, {cols}x{rows}, over the int8 peak", c.share, least)
