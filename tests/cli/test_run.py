"""``gossamer run``: one answer on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gguf
from program import PATIENCE, environment, gossamer, start

from gossamer import LLM, Sampling
from gossamer.cli.main import main

NEEDS = r"needs [\d.]+ [MG]B for weights and up to [\d.]+ [MG]B for (\d+) tokens of keys and values\n"
SPEED = r"\[(\d+) prompt tokens at [\d]+ tok/s, (\d+) answered at [\d.]+ tok/s, ended by (\w+)(?:, seed (\d+))?\]\n"
STORY = "Tell me about rivers."


def stats(err: str) -> tuple[int, int, str, str | None]:
    """Prompt tokens, answered tokens, why it ended, and the seed, from all that is said beside the answer."""
    match = re.fullmatch(NEEDS + SPEED, err)
    assert match, err
    return int(match[2]), int(match[3]), match[4], match[5]


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> LLM:
    return LLM("smollm2-135m", context=1024)


def test_the_demo_model_answers(llm: LLM) -> None:
    done = gossamer("run", "smollm2-135m", "-p", "What is the capital of France?", "--threads", "2")
    answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert done.code == 0
    assert done.out == answer.text + "\n"
    assert "Paris" in done.out
    assert stats(done.err) == (answer.prompt_tokens, len(answer.tokens), "stop", None)


# ---------------------------------------------------------------- a small one


def test_every_option_reaches_the_model(tiny: Path) -> None:
    options = ["--system", "You are a pirate.", "--max-tokens", "24", "--temperature", "0.8", "--top-p", "0.9"]
    options += ["--top-k", "40", "--min-p", "0.02", "--repeat-penalty", "1.2", "--seed", "7", "--threads", "1"]
    options += ["--context", "512", "--kv", "int8/row", "--format", "int4/g32 @ int8/token"]
    done = gossamer("run", tiny, "-p", "Who are you?", *options)
    assert done.code == 0
    messages = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Who are you?"}]
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=40, min_p=0.02, repeat_penalty=1.2, seed=7)
    llm = LLM(tiny, format="int4/g32 @ int8/token", kv="int8/row", context=512)
    assert done.out == llm.chat(messages, max_tokens=24, sampling=sampling).text + "\n"
    assert re.search(NEEDS, done.err)[1] == "512"


def test_standard_input_is_the_prompt(tiny: Path) -> None:
    text = "Grüße, 世界!\nand a second line"
    piped = gossamer("run", tiny, "--max-tokens", "20", stdin=text.encode())
    given = gossamer("run", tiny, "--max-tokens", "20", "-p", text)
    assert piped.code == given.code == 0
    assert piped.out == given.out
    assert stats(piped.err) == stats(given.err)


def test_raw_leaves_the_template_out(tiny: Path) -> None:
    llm = LLM(tiny)
    raw = gossamer("run", tiny, "--raw", "-p", "the in", "--max-tokens", "9")
    chat = gossamer("run", tiny, "-p", "the in", "--max-tokens", "9")
    assert raw.out == llm.generate("the in", max_tokens=9).text + "\n"
    assert stats(raw.err)[0] == len(llm.tokenizer.encode("the in")) < stats(chat.err)[0]


def test_a_model_without_template_continues_text(tmp_path: Path) -> None:
    base = tiny_gguf.write(tmp_path / "base.gguf", template=None)
    assert gossamer("run", base, "--raw", "-p", "the in", "--max-tokens", "9").code == 0
    for arguments in (["-p", "hi"], ["-p", "hi", "--system", "be kind"]):
        done = gossamer("run", base, *arguments)
        assert (done.code, done.out) == (2, "")
        assert done.err == "gossamer: this model has no chat template; let it continue plain text with --raw\n"


def test_the_answer_is_no_longer_than_asked(tiny: Path) -> None:
    for asked in (1, 30):
        done = gossamer("run", tiny, "-p", STORY, "--max-tokens", asked)
        assert stats(done.err)[1:3] == (asked, "length")
    done = gossamer("run", tiny, "-p", STORY, "--context", "64", "--max-tokens", "500")
    prompt, answered, ended, _ = stats(done.err)
    assert (prompt + answered, ended) == (64, "context")


def test_a_seed_makes_it_reproducible(tiny: Path) -> None:
    def sample(*more: str) -> tuple[str, str | None]:
        done = gossamer("run", tiny, "-p", STORY, "--temperature", "1.5", "--max-tokens", "40", *more)
        assert done.code == 0
        return done.out, stats(done.err)[3]

    first, seed = sample()
    assert seed is not None
    assert sample("--seed", seed) == (first, seed)  # a random seed is told, so that it can be used again
    assert sample("--seed", seed, "--threads", "1")[0] == first
    assert sample("--seed", "5")[0] != sample("--seed", "6")[0]


def test_without_a_temperature_the_most_likely_token_is_taken(tiny: Path) -> None:
    outputs = {gossamer("run", tiny, "-p", STORY, "--max-tokens", "20", "--seed", s).out for s in (1, 2)}
    assert outputs == {LLM(tiny).chat([{"role": "user", "content": STORY}], max_tokens=20).text + "\n"}


@pytest.mark.parametrize(
    "option", [("--top-k", "1"), ("--top-p", "0.000001"), ("--min-p", "1"), ("--temperature", "0.0001")]
)
def test_each_filter_alone_can_leave_one_token(tiny: Path, option: tuple[str, str]) -> None:
    greedy = gossamer("run", tiny, "-p", STORY, "--max-tokens", "20").out
    options = dict([("--temperature", "1"), option])
    done = gossamer("run", tiny, "-p", STORY, "--max-tokens", "20", *(a for pair in options.items() for a in pair))
    assert done.out == greedy


def test_what_the_checkpoint_suggests_is_used_and_can_be_overruled(tiny: Path, tmp_path: Path) -> None:
    assert gossamer("compress", tiny, "-o", tmp_path / "m", "--format", "int8/g32").code == 0
    suggestion = tmp_path / "m" / "generation_config.json"

    def run(suggested: dict[str, object], *more: str) -> str:
        suggestion.write_text(json.dumps(suggested))
        return gossamer("run", tmp_path / "m", "-p", STORY, "--max-tokens", "20", "--seed", "3", *more).out

    plain = run({})
    assert run({"temperature": 1.2, "repetition_penalty": 1.9}) == plain  # no "do_sample": not meant for use
    sampled = run({"do_sample": True, "temperature": 1.2, "top_k": 30})
    assert sampled != plain
    assert sampled == run({}, "--temperature", "1.2", "--top-k", "30")
    assert run({"do_sample": True, "temperature": 1.2, "top_k": 30}, "--temperature", "0") == plain
    for bad in ("hot", True, [1], 1e400, 10**400):
        suggestion.write_text(json.dumps({"do_sample": True, "temperature": bad}))
        done = gossamer("run", tmp_path / "m", "-p", STORY)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert "m/generation_config.json has 'temperature' = " in done.err
        assert "should be a number" in done.err


def test_keys_and_values_take_what_is_asked(tiny: Path) -> None:
    def kilobytes(kv: str) -> float:
        done = gossamer("run", tiny, "-p", "hi", "--kv", kv, "--max-tokens", "3")
        assert done.code == 0
        return float(re.search(r"up to ([\d.]+) MB for 1024", done.err)[1])

    assert kilobytes("int8/row") < kilobytes("f16") == kilobytes("bf16") < kilobytes("f32")


# ---------------------------------------------------------------- pipes, signals, places


def test_a_reader_that_leaves_is_no_error(tiny: Path) -> None:
    command = [sys.executable, "-m", "gossamer", "run", str(tiny), "-p", "hi", "--max-tokens", "900"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.close()
    assert "Traceback" not in process.communicate(timeout=PATIENCE)[1].decode()
    assert process.returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize("verb", [["run", "-p", "hi"], ["inspect"], ["inspect", "--json"]])
def test_an_output_on_a_full_disk_is_told(tiny: Path, verb: list[str]) -> None:
    command = [sys.executable, "-m", "gossamer", verb[0], str(tiny), *verb[1:]]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment(), check=False)
    last = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith("gossamer: the output cannot be written or read: No space left")
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.skipif(shutil.which("sh") is None, reason="there is no sh to close a stream with")
@pytest.mark.parametrize(("closed", "code"), [("<&-", 2), (">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 2)])
def test_closed_streams_do_not_matter(tiny: Path, closed: str, code: int) -> None:
    prompt = "" if "<" in closed else "-p hi"
    command = f'"{sys.executable}" -m gossamer run "{tiny}" {prompt} --max-tokens 3 {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, env=environment(), check=False)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr


def test_an_encoding_without_the_letters_spells_them_out(tiny: Path) -> None:
    asked = ["run", tiny, "-p", "hi", "--max-tokens", "30"]
    whole, spelt = gossamer(*asked).out, gossamer(*asked, env={"PYTHONIOENCODING": "ascii"}).out
    assert not whole.isascii()
    assert spelt == whole.encode("ascii", "backslashreplace").decode()
    shown = gossamer("inspect", tiny, "--json", env={"PYTHONIOENCODING": "ascii"})
    assert shown.json == gossamer("inspect", tiny, "--json").json


def test_ctrl_c_while_loading_ends_the_program(smollm2_gguf: Path) -> None:
    with start("run", "smollm2-135m", "--format", "int4/g32", "-p", "Tell a long story.") as process:
        line = process.stderr.readline()  # the last thing before the weights are loaded
        assert re.fullmatch(NEEDS, line), line
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Traceback" not in out + err


def test_the_memory_that_is_needed_is_told(smollm2_gguf: Path) -> None:
    done = gossamer("run", "smollm2-135m", "-p", "hi", "--context", "8192", "--kv", "f32", "--max-tokens", "2")
    # The file's tensors as they are, and 30 layers x 3 heads x 64 x 4 bytes for each key and each value.
    assert done.err.startswith("needs 96.6 MB for weights and up to 377.5 MB for 8192 tokens of keys and values\n")


def test_memory_that_is_not_there_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gossamer.engine.llm.available_memory", lambda: 300_000)
    assert main(["run", str(tiny), "-p", "hi"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "gossamer: the weights need 0 MB and 1024 tokens of keys and values 0 MB, but only 0 MB are free" in err
    assert main(["run", str(tiny), "-p", "hi", "--context", "256", "--max-tokens", "2"]) == 0
