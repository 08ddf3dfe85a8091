"""``gossamer demo``: a real model made several times smaller, what that cost, and an answer from the smallest."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from gossamer.cli import ui
from gossamer.engine.llm import LLM
from gossamer.evaluate import bench, evaluate, text
from gossamer.formats import parse_weight

__all__ = ["run"]


@dataclass(frozen=True)
class Variant:
    """A way to run the demo model: a name for people, the linear layers' format, the embedding's."""

    name: str
    format: str
    embed: str


VARIANTS = (
    Variant("base (the file as f16)", "f16 @ f32", "f16 @ f32"),
    Variant("8-bit", "int8/g32", "int8/g32"),
    Variant("4-bit", "int4/g32", "int8/g32"),
)


def run(args: argparse.Namespace) -> None:
    passage = text("stdlib")
    context = 1024

    def load(v: Variant) -> LLM:
        with ui.progress(f"loading {v.name}", args.json) as update:
            return LLM(
                args.model,
                format=v.format,
                keep=[("embed", v.embed)],
                threads=args.threads,
                context=context,
                progress=update,
            )

    base = load(VARIANTS[0])
    stored = {str(base.checkpoint.native(site)) for site in base.checkpoint.topology.sites if site.role != "embed"}
    if not args.json:
        ui.say(f"{base.checkpoint.path.name}: {base.loaded.topology.parameters / 1e6:.1f} million parameters.")
        ui.say(_about(base, stored))
        ui.say(f"Measured on: {passage.description}")
        ui.say()
    results = []
    for variant in VARIANTS:
        llm = base if variant is VARIANTS[0] else load(variant)
        with ui.progress(f"measuring {variant.name}", args.json) as update:
            cost = evaluate(
                llm, passage, against=None if llm is base else base, tokens=args.tokens, window=512, progress=update
            )
        with ui.progress(f"timing {variant.name}", args.json) as update:
            speed = bench(llm, name=variant.name, decode=64, repetitions=3, progress=update)
        results.append((variant, cost, speed))
    question = [{"role": "user", "content": args.prompt}]
    if args.json:
        answer = llm.chat(question, max_tokens=128)
        ui.print_json(
            {
                "model": base.checkpoint.path.name,
                "stored_as": sorted(stored),
                "variants": [
                    {"name": v.name, "format": v.format, "embed": v.embed, "quality": c.to_json(), "speed": s.to_json()}
                    for v, c, s in results
                ],
                "prompt": args.prompt,
                "answer": answer.text,
            }
        )
        return
    ui.table(
        ["", "format", "MB", "bits/weight", "perplexity", "KL mean", "same top-1", "prefill tok/s", "decode tok/s"],
        [
            [
                v.name,
                v.format,
                f"{c.data_bytes / 1e6:.1f}",
                f"{c.bits_per_weight:.2f}",
                f"{c.perplexity:.2f}",
                "" if c.kl_mean is None else f"{c.kl_mean:.4f}",
                "" if c.top1_agreement is None else f"{100 * c.top1_agreement:.1f} %",
                f"{s.prefill_tps:.0f}",
                f"{s.decode_tps:.0f}",
            ]
            for v, c, s in results
        ],
        left=2,
    )
    ui.say()
    ui.say(results[0][1].protocol)
    if VARIANTS[-1].embed != VARIANTS[-1].format:
        ui.say(f"The {VARIANTS[-1].name} row keeps the embedding and head in {VARIANTS[-1].embed}.")
    ui.say()
    ui.say(f"> {args.prompt}")
    for piece in llm.stream_chat(question, max_tokens=128):
        sys.stdout.write(piece)
        sys.stdout.flush()
    ui.say()
    ui.note(f"[{VARIANTS[-1].name}, {len(llm.last.tokens)} tokens at {llm.last.decode_tps:.0f} tok/s]")


def _about(base: LLM, stored: set[str]) -> str:
    """What the shipped file itself is: re-quantizing an already quantized model flatters the formats it lies on."""
    coded = sorted(fmt for fmt in stored if parse_weight(fmt.partition("@")[0]).integer)
    size = ui.size(base.checkpoint.data_bytes)
    if not coded:
        return f"The file holds {size} of float weights."
    return (
        f"The shipped file is itself quantized ({size}, linear layers in {', '.join(coded)}): the base below is that file "
        "dequantized, and formats on the same grid would look lossless, so the rows below use others."
    )
