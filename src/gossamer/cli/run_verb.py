"""``gossamer run MODEL``: one answer, or a conversation."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterator
from typing import Any

from gossamer.cli import ui
from gossamer.engine.llm import LLM, Sampling
from gossamer.errors import UsageError

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    prompt = args.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = _piped()
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty; give a text with -p or on standard input.")
    if args.raw and args.system:
        raise UsageError("--system needs the chat template, which --raw leaves out; choose one of them.")
    if args.raw and prompt is None:
        raise UsageError("--raw continues one text; give it with -p or on standard input.")
    llm = load(args)
    sampling = _sampling(args, llm.checkpoint.generation())
    system = [{"role": "system", "content": args.system}] if args.system else []
    if prompt is None:
        _converse(llm, system, args.max_tokens, sampling)
        return
    if args.raw:
        pieces = llm.stream(prompt, max_tokens=args.max_tokens, sampling=sampling)
    else:
        messages = [*system, {"role": "user", "content": prompt}]
        pieces = llm.stream_chat(messages, max_tokens=args.max_tokens, sampling=sampling)
    _show(llm, pieces)


def load(args: argparse.Namespace) -> LLM:
    """Loads the model of a verb's options, telling the memory it needs before it is taken."""
    with ui.progress("loading") as update:
        return LLM(
            args.model,
            format=args.format,
            context=args.context,
            kv=args.kv,
            threads=args.threads,
            progress=update,
            before_load=lambda need: ui.note(
                f"needs {ui.size(need.weights)} for weights and up to {ui.size(need.kv)} for {need.context} tokens of "
                "keys and values"
            ),
        )


def _piped() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 (byte {error.start}); convert the text first.") from None


def _sampling(args: argparse.Namespace, suggested: dict[str, Any]) -> Sampling:
    """Options given, else what the checkpoint suggests when it asks for sampling, else the most likely token."""
    use = suggested if suggested.get("do_sample") else {}

    def pick(option: Any, key: str, default: Any) -> Any:
        value = option if option is not None else use.get(key, default)
        return default if value is None else value

    return Sampling(
        temperature=float(pick(args.temperature, "temperature", 1.0 if use else 0.0)),
        top_k=int(pick(args.top_k, "top_k", 0)),
        top_p=float(pick(args.top_p, "top_p", 1.0)),
        min_p=args.min_p,
        repeat_penalty=float(pick(args.repeat_penalty, "repetition_penalty", 1.0)),
        seed=args.seed if args.seed is not None else secrets.randbits(63),
    )


def _show(llm: LLM, pieces: Iterator[str]) -> str:
    """Prints an answer as it comes; Ctrl-C ends the answer, not the program. Returns its text."""
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        llm.last.finish = "interrupted"
    sys.stdout.write("\n")
    sys.stdout.flush()
    last = llm.last
    ui.note(
        f"[{last.computed_tokens} prompt tokens at {last.prefill_tps:.0f} tok/s, "
        f"{len(last.tokens)} answered at {last.decode_tps:.1f} tok/s, ended by {last.finish}]"
    )
    return last.text


def _converse(llm: LLM, system: list[dict[str, str]], max_tokens: int, sampling: Sampling) -> None:
    ui.note("Type a message; an empty line or Ctrl-D ends the conversation, Ctrl-C stops an answer.")
    messages = list(system)
    while True:
        try:
            line = input("> ")
        except EOFError:
            ui.note("")
            return
        except KeyboardInterrupt:
            ui.note("")
            continue
        if not line.strip():
            return
        messages.append({"role": "user", "content": line})
        try:
            pieces = llm.stream_chat(messages, max_tokens=max_tokens, sampling=sampling)
        except UsageError as error:
            # The history no longer fits: say so and keep the conversation as it was.
            ui.note(f"gossamer: {error}")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": _show(llm, pieces)})
