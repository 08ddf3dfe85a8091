"""What the Hadamard transform and the 4-bit rounding of the inputs take of a W4A4 layer at 512 tokens: at most 10 %.

python benchmarks/w4a4.py [--quick]

The same layer with 16 rows of output does all of the preparation and next to none of the product, so its time by the
whole layer's bounds the share from above.
"""

from _common import Layer, claim, layers, options

args = options(__doc__, format="hadamard(128, none, int4/row) @ int4/token")
tokens = 64 if args.quick else 512
for rows, cols in ((14336, 4096), (4096, 14336)):
    whole = Layer(args.format, rows, cols, nbytes=1)
    preparing = Layer(args.format, 16, cols, nbytes=1)
    print(f"{args.format}: {whole.bits_per_weight:.3f} bits/weight")
    c = layers(args, whole, tokens, preparing.job(tokens), f"{args.format}, {cols}x{rows}; peer: 16 rows of it")
    claim(f"preparing the inputs, share of {cols}x{rows}", c.ratio, 0.1, at_most=True)
    plain = Layer("int4/row @ int4/token", rows, cols, nbytes=1)
    layers(args, whole, tokens, plain.job(tokens), "with the transform; peer: without")
