"""Fewer bits, tables and mixed formats beside plain 4 bits: decode of 8B-like layers, cold, one token.

python benchmarks/low_bits.py [--quick]

int3 at least 1.2 and int2 at least 1.65 times as fast as int4; tables (nf4, e2m1) at least 0.9 times; 5 % of the
matrix in high precision (columns, rows or an added part) at least 0.85 times.
"""

from _common import Layer, claim, layers, options

args = options(__doc__)
CASES = [
    ("int3/g64 @ int8/g64", "int4/g64 @ int8/g64", 1.2),
    ("int2/g64 @ int8/g64", "int4/g64 @ int8/g64", 1.65),
    ("nf4/g64", "int4/g64", 0.9),
    ("e2m1/g32*e8m0", "int4/g32", 0.9),
    ("cols({c}: bf16 @ bf16, int4/g64) @ int8/g64", "int4/g64 @ int8/g64", 0.85),
    ("rows({r}: bf16 @ bf16, int4/g64) @ int8/g64", "int4/g64 @ int8/g64", 0.85),
    ("int4/g64 + mask(5%: f16) @ int8/g64", "int4/g64 @ int8/g64", 0.85),
]
SHAPES = [(14336, 4096), (4096, 14336)]
for rows, cols in SHAPES[: 1 if args.quick else 2]:
    bases = {}
    for text, base, least in CASES:
        text = text.format(c=cols // 20 // 64 * 64, r=rows // 20 // 16 * 16)
        if base not in bases:
            bases = {base: Layer(base, rows, cols)}
        ours = Layer(text, rows, cols)
        print(f"{text}: {ours.bits_per_weight:.3f} bits/weight; {base}: {bases[base].bits_per_weight:.3f}")
        c = layers(args, ours, 1, bases[base].job(1), f"{text}, {cols}x{rows}")
        claim(f"{text} over {base}, {cols}x{rows}", c.ratio, least)
        del ours
