"""Decode of the Llama-3.2-1B shape with AVX2 alone: at least 0.85 times what AVX-512 reaches.

python benchmarks/avx2.py [--quick]
"""

from _common import A8, claim, options, probe, show
from gossamer import ops
from gossamer.evaluate import shape_model
from gossamer.evaluate.roofline import decode_work
from gossamer.evaluate.speed import PROMPT, Ours
from gossamer.evaluate.turns import Job, cell, take_turns

args = options(__doc__, format=A8)
steps = 8 if args.quick else 64
best = ops.isa()
if not best.startswith("avx512"):
    raise SystemExit(f"skipped: this machine runs {best}")
model = shape_model("llama-3.2-1b", args.format, keep=[("embed", "int6/g32 @ int8/g32")])
runner = Ours(model, "f16", PROMPT, 1, steps)


def decode(isa: str) -> float:
    ops.set_isa(isa)
    try:
        return runner.decode(1, steps)
    finally:
        ops.set_isa(best)


job = Job(lambda: decode("avx2"), lambda: decode(best))
take_turns([job], 1, probe)
turns = take_turns([job], args.repetitions, probe)[0]
c = cell("decode", 1, steps, steps, decode_work(model, 1, PROMPT + steps / 2, "f16"), turns)
print(f"llama-3.2-1b as {args.format}: {model.bits_per_weight:.3f} bits/weight; peer: ours at {best}")
show(c, "avx2, batch 1")
claim(f"avx2 over {best}", c.ratio, 0.85)
