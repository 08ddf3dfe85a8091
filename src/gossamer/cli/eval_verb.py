"""``gossamer eval MODEL [--against BASE]``."""

from __future__ import annotations

import argparse

from gossamer.checkpoints.names import resolve
from gossamer.cli import ui
from gossamer.engine.llm import LLM
from gossamer.errors import UsageError
from gossamer.evaluate import evaluate, text
from gossamer.models.checkpoint import open_checkpoint

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    passage = text(args.text)

    def load(model: str, fmt: str | None) -> LLM:
        checkpoint = open_checkpoint(resolve(model))
        limit = checkpoint.config.context
        if args.window > limit:
            raise UsageError(f"--window {args.window} is too long: {model} was made for up to {limit} tokens.")
        with ui.progress(f"loading {model}", args.json) as update:
            return LLM(checkpoint, format=fmt, kv=args.kv, threads=args.threads, context=args.window, progress=update)

    candidate = load(args.model, args.format)
    against = args.model if args.against is None and args.against_format is not None else args.against
    base = load(against, args.against_format) if against is not None else None
    with ui.progress("measuring", args.json) as update:
        result = evaluate(
            candidate,
            passage,
            against=base,
            tokens=args.tokens,
            window=args.window,
            score=args.score,
            progress=update,
        )
    if args.json:
        ui.print_json(result.to_json())
        return
    ui.say(result.text)
    ui.say(result.protocol)
    ui.say()

    def row(name: str, value: float | None, digits: int, error: float | None = None) -> list[list[str]]:
        if value is None:
            return []
        return [[name, f"{value:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")]]

    rows = [
        *row("perplexity", result.perplexity, 3, result.perplexity_stderr),
        *row("perplexity of the base", result.base_perplexity, 3),
        *row("bits per byte", result.bits_per_byte, 4),
        *row("KL divergence, mean (nats/token)", result.kl_mean, 5, result.kl_mean_stderr),
        *row("KL divergence, 99th percentile", result.kl_p99, 4),
        *row("same most likely token", result.top1_agreement, 4),
        ["bytes (weights, scales, norms)", f"{result.bytes:,}"],
        *row("bits per weight", result.bits_per_weight, 3),
    ]
    ui.table([f"{result.tokens} tokens scored", ""], rows)
