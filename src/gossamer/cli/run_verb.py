"""``gossamer run MODEL``: one answer, or a conversation."""

from __future__ import annotations

import argparse
import os
import secrets
import select
import signal
import sys
from collections.abc import Sequence
from typing import Any

from gossamer.checkpoints.names import resolve
from gossamer.cli import ui
from gossamer.engine.llm import LLM, Need, Sampling, chat_tokens, check_length
from gossamer.errors import CheckpointError, UsageError
from gossamer.models.checkpoint import Checkpoint, open_checkpoint
from gossamer.models.config import shown
from gossamer.models.transformer import MAX_TOKENS

__all__ = ["run"]

INTERRUPTED = 130  # exit code of a program that Ctrl-C ended


def run(args: argparse.Namespace) -> int:
    prompt = args.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = _piped()
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty; give a text with -p or on standard input.")
    if args.raw and args.system:
        raise UsageError("--system needs the chat template, which --raw leaves out; choose one of them.")
    if args.raw and prompt is None:
        raise UsageError("--raw continues one text; give it with -p or on standard input.")
    for name, value in (("the prompt", prompt), ("--system", args.system)):
        _check_unicode(name, value)

    # Whatever can be wrong with the options or the prompt is found before the weights are loaded.
    checkpoint = open_checkpoint(resolve(args.model))
    sampling = _sampling(args, checkpoint)
    tokenizer = checkpoint.tokenizer()
    system = [{"role": "system", "content": args.system}] if args.system else []
    if args.raw:
        tokens = tokenizer.encode(prompt)
    else:  # for a conversation, only to see that the template takes such messages
        tokens = chat_tokens(tokenizer, [*system, {"role": "user", "content": prompt or "?"}])

    def before_load(need: Need) -> None:
        check_length(tokens, need.context, checkpoint.config)
        ui.note(
            f"needs {ui.size(need.weights)} for weights and up to {ui.size(need.kv)} for {need.context} tokens of "
            "keys and values"
        )

    with ui.progress("loading") as update:
        llm = LLM(
            checkpoint,
            format=args.format,
            context=args.context,
            kv=args.kv,
            threads=args.threads,
            progress=update,
            before_load=before_load,
        )
    if prompt is None:
        _converse(llm, system, args.max_tokens, sampling)
        return 0
    _answer(llm, tokens, args.max_tokens, sampling)
    return INTERRUPTED if llm.last.finish == "interrupted" else 0


def _piped() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 (byte {error.start}); convert the text first.") from None


def _check_unicode(name: str, text: str | None) -> None:
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:  # the shell gave bytes that are no text
        raise UsageError(f"{name} is not UTF-8 (character {error.start}); convert the text first.") from None


def _sampling(args: argparse.Namespace, checkpoint: Checkpoint) -> Sampling:
    """Options given, else what the checkpoint suggests when it asks for sampling, else the most likely token."""
    suggested = checkpoint.generation()
    sampled = suggested.get("do_sample") is True

    def pick(option: float | None, key: str, default: float) -> float:
        if option is not None:
            return option
        value: Any = suggested.get(key) if sampled else None
        if value is None:
            return default
        kind = type(default)
        if type(value) not in (int, float) or not abs(value) < 1 << 31 or kind(value) != value:
            raise CheckpointError(
                f"{checkpoint.path.name}/generation_config.json has '{key}' = {shown(value)}, which should be a "
                "number; mend the file."
            )
        return kind(value)

    return Sampling(
        temperature=pick(args.temperature, "temperature", 1.0 if sampled else 0.0),
        top_k=int(pick(args.top_k, "top_k", 0)),
        top_p=pick(args.top_p, "top_p", 1.0),
        min_p=pick(args.min_p, "min_p", 0.0),
        repeat_penalty=pick(args.repeat_penalty, "repetition_penalty", 1.0),
        seed=args.seed if args.seed is not None else secrets.randbits(63),
    )


def _answer(llm: LLM, tokens: Sequence[int], max_tokens: int, sampling: Sampling) -> None:
    """Prints an answer as it comes, and its speed on stderr. Ctrl-C ends the answer, not the program."""
    # A short prompt is one step, which takes less time than a bar would.
    with ui.progress("reading the prompt", quiet=len(tokens) <= MAX_TOKENS) as update:
        pieces = llm.stream(tokens, max_tokens=max_tokens, sampling=sampling, progress=update)
        try:
            piece = next(pieces, None)
        except KeyboardInterrupt:
            llm.last.finish, piece = "interrupted", None
    try:
        while piece is not None:
            ui.write(piece)
            piece = next(pieces, None)
    except KeyboardInterrupt:
        llm.last.finish = "interrupted"
    ui.write("\n")
    last = llm.last
    seed = f", seed {sampling.seed}" if sampling.temperature > 0 else ""
    ui.note(
        f"[{last.computed_tokens} prompt tokens at {last.prefill_tps:.0f} tok/s, "
        f"{len(last.tokens)} answered at {last.decode_tps:.1f} tok/s, ended by {last.finish}{seed}]"
    )


def _converse(llm: LLM, system: list[dict[str, str]], max_tokens: int, sampling: Sampling) -> None:
    ui.note("Type a message; an empty line or Ctrl-D ends the conversation, Ctrl-C stops an answer.")
    messages = list(system)
    while True:
        try:  # Ctrl-C may come at any moment: it ends what is being done and never the program
            ui.ask("> ")
            line = _typed()
            if not line.strip():
                return
            asked = [*messages, {"role": "user", "content": line}]
            _answer(llm, llm.chat_tokens(asked), max_tokens, sampling)
            messages = [*asked, {"role": "assistant", "content": llm.last.text}]
        except EOFError:
            ui.note("")
            return
        except KeyboardInterrupt:  # nothing is being answered, or the answer had not begun
            ui.note("")
        except UsageError as error:  # the history may no longer fit: the conversation stays as it was
            ui.note(f"gossamer: {error}")


def _typed() -> str:
    """A line from the terminal. A Ctrl-C just before a plain read begins would be noticed after the next line only, so
    this waits for a line or a signal, whichever comes first, and reads when there is something to read."""
    signalled, wake = os.pipe()
    os.set_blocking(wake, False)
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        select.select([sys.stdin, signalled], [], [])
    finally:
        signal.set_wakeup_fd(before)
        os.close(signalled)
        os.close(wake)
    return input()
