"""``gossamer eval MODEL [--against BASE] [--text NAME] [--tasks A,B] [--noise] [--answers] [--sites]``."""

from __future__ import annotations

import argparse
from typing import Any

from gossamer.checkpoints.names import resolve
from gossamer.cli import ui
from gossamer.cli.options import reading
from gossamer.engine.llm import LLM
from gossamer.errors import UsageError
from gossamer.evaluate import evaluate, text
from gossamer.evaluate.html import EVAL
from gossamer.evaluate.score import Result, noise_floor
from gossamer.evaluate.similarity import Similarity, compare_generations
from gossamer.evaluate.sites import SiteError, by_role, stored_errors
from gossamer.evaluate.tasks import TASKS, TaskResult, evaluate_tasks
from gossamer.models.checkpoint import Checkpoint, open_checkpoint

__all__ = ["run"]

ANSWER_CONTEXT = 512  # tokens of a prompt of ours, its template and the answer


def run(args: argparse.Namespace) -> None:
    names = _tasks(args)
    against = args.model if args.against is None and args.against_format is not None else args.against
    for option in ("noise", "answers", "sites"):
        if getattr(args, option) and against is None:
            raise UsageError(f"--{option} compares with a base; name it with --against.")
    how = reading(args)
    passage = text(args.text or "stdlib") if args.text is not None or not names else None
    if args.noise and passage is None:
        raise UsageError("--noise is measured on a text; name it with --text.")

    def load(model: str, fmt: str | None) -> LLM:
        checkpoint = open_checkpoint(resolve(model))
        context = _context(args, checkpoint, passage is not None, bool(names), model)
        with ui.progress(f"loading {model}", args.json) as update:
            return LLM(checkpoint, format=fmt, kv=args.kv, threads=args.threads, context=context, progress=update)

    candidate = load(args.model, args.format)
    base = load(against, args.against_format) if against is not None else None
    found: dict[str, Any] = {"kind": EVAL}
    shown: list[Any] = []
    if passage is not None:
        with ui.progress("measuring", args.json) as update:
            result = evaluate(candidate, passage, against=base, progress=update, **how)
        noise = None
        if args.noise and base is not None:
            with ui.progress("measuring the noise floor", args.json) as update:
                noise = noise_floor(base, passage, progress=update, **how)
            found["noise_floor"] = {"formats": noise.formats, "kl_mean": noise.kl_mean, "kl_p99": noise.kl_p99}
        found |= result.to_json()
        shown.append(lambda: _show_text(result, noise))
    else:
        found |= {"model": candidate.checkpoint.path.name, "against": base and base.checkpoint.path.name}
    if names:
        with ui.progress("answering", args.json) as update:
            tasks = evaluate_tasks(candidate, names, limit=args.limit, against=base, progress=update)
        found["tasks"] = [t.to_json() for t in tasks]
        shown.append(lambda: _show_tasks(tasks))
    if args.answers and base is not None:
        with ui.progress("writing", args.json) as update:
            answers = compare_generations(candidate, base, progress=update)
        found["similarity"] = answers.to_json()
        shown.append(lambda: _show_answers(answers))
    if args.sites and base is not None:
        with ui.progress("comparing weights", args.json) as update:
            sites = stored_errors(base.checkpoint, candidate.loaded, update)
        found["sites"] = [s.to_json() for s in sites]
        shown.append(lambda: _show_sites(sites))
    if args.json:
        ui.print_json(found)
        return
    for i, show in enumerate(shown):
        if i:
            ui.say()
        show()


def _tasks(args: argparse.Namespace) -> list[str]:
    if args.tasks is None:
        if args.limit is not None:
            raise UsageError("--limit counts the items of tasks; name some with --tasks.")
        return []
    names = [name.strip() for name in args.tasks.split(",")]
    for name in names:
        if name not in TASKS:
            raise UsageError(f"--tasks: there is no task '{name}'; choose {', '.join(TASKS)}.")
    return names


def _context(args: argparse.Namespace, checkpoint: Checkpoint, reads: bool, tasks: bool, model: str) -> int:
    """As long as what is asked needs: memory is checked for all of it."""
    limit = checkpoint.config.context
    if reads and args.window > limit:
        raise UsageError(f"--window {args.window} is too long: {model} was made for up to {limit} tokens.")
    need = args.window if reads else 1
    return max(need, min(ANSWER_CONTEXT, limit)) if args.answers else need


def _show_text(result: Result, noise: Result | None) -> None:
    ui.say(result.text)
    ui.say(result.protocol)
    ui.say()
    floor = None if noise is None else noise.kl_mean
    rows = [
        *_row("perplexity", result.perplexity, 3, result.perplexity_stderr),
        *_row("perplexity of the base", result.base_perplexity, 3),
        *_row("increase of a token's cost (nats)", result.nll_increase, 5, result.nll_increase_stderr),
        *_row("bits per byte", result.bits_per_byte, 4),
        *_row("KL divergence, mean (nats/token)", result.kl_mean, 5, result.kl_mean_stderr),
        *_row("KL divergence, 99th percentile", result.kl_p99, 4),
    ]
    for name, half in zip(("first", "second"), result.kl_halves or ()):
        rows += _row(f"KL divergence, {name} half of the windows", half, 5)
    if noise is not None:
        rows += _row(f"KL divergence of the base as {next(iter(noise.formats))}", floor, 5, noise.kl_mean_stderr)
    rows += [
        *_row("same most likely token", result.top1_agreement, 4),
        ["bytes (weights, scales, norms)", f"{result.bytes:,}"],
        *_row("bits per weight", result.bits_per_weight, 3),
    ]
    ui.table([f"{result.tokens} tokens scored", ""], rows)
    if result.kl_by_confidence:
        ui.say()
        ui.table(
            ["highest probability of the base", "tokens", "KL divergence", "same token"],
            [
                [
                    f"{b.low:g} to {b.high:g}",
                    str(b.tokens),
                    _figure(b.kl_mean, 5, b.kl_mean_stderr),
                    _figure(b.top1_agreement, 4),
                ]
                for b in result.kl_by_confidence
            ],
        )


def _row(name: str, value: float | None, digits: int, error: float | None = None) -> list[list[str]]:
    return [] if value is None else [[name, _figure(value, digits, error)]]


def _figure(value: float | None, digits: int, error: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")


def _show_tasks(tasks: list[TaskResult]) -> None:
    headers = ["task", "items", "accuracy", "by length", "chance", "bits/byte"]
    beside = tasks[0].base_accuracy is not None
    headers += ["base", "difference", "flips"] if beside else []
    rows = []
    for t in tasks:
        cells = [t.task, str(t.items), _figure(t.accuracy, 4, t.accuracy_stderr)]
        cells += [_figure(t.accuracy_normalised, 4, t.accuracy_normalised_stderr), _figure(t.chance, 2)]
        cells.append(_figure(t.answer_bits_per_byte, 4))
        if beside:
            cells += [_figure(t.base_accuracy, 4), _figure(t.difference, 4, t.difference_stderr), _figure(t.flips, 4)]
        rows.append(cells)
    ui.table(headers, rows)


def _show_answers(found: Similarity) -> None:
    ui.table(
        [f"{found.prompts} answers of up to {found.max_tokens} tokens", "mean"],
        [
            *_row("tokens that both begin with", found.same_prefix, 1, found.same_prefix_stderr),
            *_row("equal answers", found.identical, 3),
            *_row("edit similarity of tokens", found.edit, 3, found.edit_stderr),
            *_row("chrF of the text", found.chrf, 3, found.chrf_stderr),
        ],
    )


def _show_sites(sites: list[SiteError]) -> None:
    headers = ["site", "format", "bytes", "bits/weight", "SQNR (dB)"]
    for rows in (by_role(sites), sites):
        ui.table(
            headers,
            [
                [
                    r.name if rows is sites else f"{r.role}, {r.name}",
                    r.format,
                    f"{r.nbytes:,}",
                    f"{r.bits_per_weight:.3f}",
                    "exact" if r.exact else _figure(r.sqnr_db, 1),
                ]
                for r in rows
            ],
            left=2,
        )
        if rows is not sites:
            ui.say()
