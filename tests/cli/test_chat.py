"""A conversation on a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import tiny_gguf
from program import Terminal

from gossamer import LLM

WELCOME = r"Type a message; an empty line or Ctrl-D ends the conversation, Ctrl-C stops an answer\.\n> "
ENDED = r"\[(\d+) prompt tokens at .* answered at .* tok/s, ended by (\w+)\]\n"


def test_a_conversation(smollm2_gguf: Path) -> None:
    """Two turns, the second of which needs the first; an answer that is stopped, and the end."""
    first, second = "What is the capital of France?", "Which country did I ask about?"
    llm = LLM(smollm2_gguf, context=1024)
    messages = [{"role": "user", "content": first}]
    messages.append({"role": "assistant", "content": llm.chat(messages).text})
    messages.append({"role": "user", "content": second})
    expected = [messages[1]["content"], llm.chat(messages, max_tokens=200).text]
    alone = llm.chat([messages[2]], max_tokens=200).text
    assert expected[1] != alone  # or the history would not show

    with Terminal("run", "smollm2-135m", "--context", "1024", "--max-tokens", "200") as terminal:
        at = terminal.until(r"needs .* for weights and up to .* for 1024 tokens")
        at = terminal.until(WELCOME, start=at)
        for message, answer in zip((first, second), expected):
            begun = len(terminal.out)
            terminal.type(f"{message}\n")
            at = terminal.until(ENDED + "> ", start=at)
            terminal.until(re.escape(f"{answer}\n"), "out", begun)
            assert terminal.out[begun:] == f"{answer}\n"  # the answer alone is on standard output

        # Stopped in the middle: the program goes on, with what was answered so far in its history.
        begun = len(terminal.out)
        terminal.type("Tell me a very long story about a dragon, with many chapters.\n")
        terminal.until(r"(?s).{60}", "out", begun)
        terminal.interrupt()
        at = terminal.until(ENDED + "> ", start=at)
        assert re.findall(ENDED, terminal.err)[-1][1] == "interrupted"
        assert terminal.process.poll() is None

        terminal.interrupt()  # where nothing is answered, it gives a new line
        at = terminal.until("\n> ", start=at)
        begun = len(terminal.out)
        terminal.type(f"{first}\n")
        at = terminal.until(ENDED + "> ", start=at)
        assert "Paris" in terminal.out[begun:]
        terminal.type("\x04")  # Ctrl-D
        assert terminal.end() == 0
        assert "Traceback" not in terminal.err


def test_what_no_longer_fits_is_refused_and_the_conversation_goes_on(tiny: Path) -> None:
    with Terminal("run", tiny, "--context", "100", "--max-tokens", "5") as terminal:
        at = terminal.until(WELCOME)
        terminal.type("hi\n")
        at = terminal.until(ENDED + "> ", start=at)
        terminal.type("this is far too long " * 10 + "\n")
        at = terminal.until(r"gossamer: the prompt has \d+ tokens and the context holds 100; .*\n> ", start=at)
        terminal.type("ho\n")
        at = terminal.until(ENDED + "> ", start=at)
        terminal.type("\n")  # an empty line
        assert terminal.end() == 0


def test_a_template_that_refuses_is_told_before_loading(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}hi"
    model = tiny_gguf.write(tmp_path / "strict.gguf", template=strict)
    with Terminal("run", model, "--system", "be kind") as terminal:
        assert terminal.end() == 2
        assert terminal.err.count("\n") == 1
        assert "no system messages" in terminal.err
    with Terminal("run", tiny_gguf.write(tmp_path / "base.gguf", template=None)) as terminal:
        assert terminal.end() == 2
        assert terminal.err.startswith("gossamer: this model has no chat template")


def test_an_answer_alone_is_stopped_too(smollm2_gguf: Path) -> None:
    with Terminal("run", "smollm2-135m", "-p", "Tell me a very long story about a dragon.") as terminal:
        terminal.until(r"(?s).{40}", "out")
        terminal.interrupt()
        assert terminal.end() == 130  # so that a loop in a shell ends as well
        assert re.findall(ENDED, terminal.err)[-1][1] == "interrupted"
        assert "Traceback" not in terminal.err


def test_a_long_prompt_shows_its_progress(smollm2_gguf: Path) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 110
    with Terminal("run", "smollm2-135m", "--raw", "-p", prompt, "--max-tokens", "2") as terminal:
        terminal.until(r"reading the prompt.*?512/11\d\d")
        terminal.until(ENDED)
        assert terminal.end() == 0
        assert "\x1b" not in terminal.out
