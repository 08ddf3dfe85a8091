"""``gossamer demo``: a real model made several times smaller, what that cost, and an answer from the smallest."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from gossamer.checkpoints.names import resolve
from gossamer.cli import ui
from gossamer.engine.llm import LLM, chat_tokens, check_length
from gossamer.errors import UsageError
from gossamer.evaluate import bench, evaluate, text
from gossamer.formats import Coded, SiteFormat, parse
from gossamer.models.checkpoint import Checkpoint, open_checkpoint

__all__ = ["run"]

CONTEXT = 1024  # tokens
ANSWER = 128  # tokens, the longest answer


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
    if not args.prompt.strip():
        raise UsageError("the prompt is empty; give a question with -p.")
    checkpoint = open_checkpoint(resolve(args.model))
    # A base model, which has no template, continues the text of the question.
    tokenizer, question = checkpoint.tokenizer(), {"role": "user", "content": args.prompt}
    prompt = tokenizer.encode(args.prompt) if tokenizer.chat_template is None else chat_tokens(tokenizer, [question])
    context = min(CONTEXT, checkpoint.config.context)
    check_length(prompt, context, checkpoint.config)
    passage = text("stdlib")

    def load(v: Variant) -> LLM:
        with ui.progress(f"loading {v.name}", args.json) as update:
            return LLM(
                checkpoint,
                format=v.format,
                keep=[("embed", v.embed)],
                threads=args.threads,
                context=context,
                progress=update,
            )

    base = load(VARIANTS[0])
    linear = {checkpoint.native(site) for site in checkpoint.topology.sites if site.role != "embed"}
    if not args.json:
        ui.say(f"{checkpoint.path.name}: {checkpoint.topology.parameters / 1e6:.1f} million parameters.")
        ui.say(_about(checkpoint, linear))
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
    if args.json:
        answer = llm.generate(prompt, max_tokens=ANSWER)
        ui.print_json(
            {
                "model": checkpoint.path.name,
                "stored_as": sorted(map(str, linear)),
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
                f"{c.bytes / 1e6:.1f}",
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
        table = "the embedding, which is the head too," if checkpoint.topology.tied else "the embedding"
        ui.say(f"The {VARIANTS[-1].name} row keeps {table} in {VARIANTS[-1].embed}.")
    ui.say()
    ui.say(f"> {args.prompt}")
    for piece in llm.stream(prompt, max_tokens=ANSWER):
        ui.write(piece)
    ui.say()
    ui.note(f"[{VARIANTS[-1].name}, {len(llm.last.tokens)} tokens at {llm.last.decode_tps:.0f} tok/s]")


def _about(checkpoint: Checkpoint, linear: set[SiteFormat]) -> str:
    """What the shipped file itself is: re-quantizing an already quantized model flatters the grids it lies on."""
    coded = {fmt.weight for fmt in linear if isinstance(fmt.weight, Coded)}
    size = ui.size(checkpoint.data_bytes)
    if not coded:
        return f"The file holds {size} of float weights."
    bits = " and ".join(str(b) for b in sorted({weight.number.bits for weight in coded}))
    grids = ", ".join(sorted(map(str, coded)))
    shared = [v.name for v in VARIANTS if parse(v.format).weight in coded]
    rows = f"so {' and '.join(shared)} below look better than they are" if shared else "so the rows below use others"
    return (
        f"The shipped file is itself quantized to {bits} bits ({size}, linear layers in {grids}): the base below is "
        f"that file dequantized. Its weights lie on that grid, where the same format loses nothing, {rows}."
    )
