"""The Python API on the packaged real model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from gossamer import LLM, Sampling, ops
from gossamer.errors import FormatError, ResourceError, UsageError


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> LLM:
    return LLM("smollm2-135m", context=512)


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_answers_a_question(llm: LLM) -> None:
    answer = llm.chat(QUESTION, max_tokens=32)
    assert "Paris" in answer.text
    assert answer.finish == "stop"
    assert answer.prompt_tokens == len(llm.chat_tokens(QUESTION))
    assert answer.prefill_tps > 0
    assert answer.decode_tps > 0


def test_continues_text(llm: LLM) -> None:
    assert llm.generate("The capital of France is", max_tokens=4).text.startswith(" Paris")


def test_streaming_is_the_whole_answer(llm: LLM) -> None:
    pieces = list(llm.stream_chat(QUESTION, max_tokens=32))
    assert len(pieces) > 3
    assert "".join(pieces) == llm.last.text == llm.chat(QUESTION, max_tokens=32).text


def test_history_is_not_computed_twice(llm: LLM) -> None:
    first = llm.chat(QUESTION, max_tokens=32)
    more = [*QUESTION, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And of Italy?"}]
    second = llm.chat(more, max_tokens=32)
    assert second.computed_tokens < second.prompt_tokens - first.prompt_tokens + 8
    fresh = LLM("smollm2-135m", context=512).chat(more, max_tokens=32)
    assert fresh.tokens == second.tokens


def test_a_closed_stream_leaves_a_usable_model(llm: LLM) -> None:
    whole = llm.generate("Once upon a time", max_tokens=24)
    stream = llm.stream("Once upon a time", max_tokens=24)
    next(stream)
    stream.close()
    assert llm.last.finish == "cancelled"
    assert llm.generate("Once upon a time", max_tokens=24).tokens == whole.tokens


def test_logits_do_not_depend_on_threads_or_chunks(llm: LLM) -> None:
    tokens = llm.tokenizer.encode("def area(radius):\n    return 3.14159 * radius ** 2\n" * 12)[:150]
    whole = llm.logits(tokens)
    before = ops.threads()
    try:
        ops.set_threads(1)
        assert np.array_equal(llm.logits(tokens), whole)
    finally:
        ops.set_threads(before)
    for size in (1, 7, 64):
        sequence = llm.new_sequence(len(tokens))
        parts = [
            llm.transformer.logits(h)
            for start in range(0, len(tokens), size)
            for h in llm.hidden(tokens[start : start + size], sequence)
        ]
        assert np.array_equal(np.concatenate(parts), whole), f"chunks of {size} change the logits"


PROMPTS = ["The capital of France is", "def area(radius):", "Once upon a time, there was", "2 + 2 =", "A list:"]


@pytest.mark.parametrize(("count", "threads"), [(1, 1), (1, 2), (7, 2), (32, 1), (32, 2)])
def test_a_batch_gives_what_each_sequence_gives_alone(count: int, threads: int) -> None:
    llm = LLM("smollm2-135m", format="int4/g32 @ int8/token", context=64)
    prompts = [llm.tokenizer.encode(PROMPTS[i % 5] + " and so on" * (i % 4)) for i in range(count)]
    texts = [p + [(7 * i + j) % 1000 for j in range(3)] for i, p in enumerate(prompts)]
    before = ops.threads()
    try:
        ops.set_threads(threads)
        sequences = llm.new_batch(count, 40)
        logits = [llm.prefill_batch(sequences, prompts).copy()]
        for j in range(3):
            logits.append(llm.decode_batch(sequences, [(7 * i + j) % 1000 for i in range(count)]).copy())
    finally:
        ops.set_threads(before)
    assert [s.length for s in sequences] == [len(t) for t in texts]
    for i in sorted({0, count // 2, count - 1}):
        alone = llm.logits(texts[i])[-4:]
        for j in range(4):
            assert np.array_equal(logits[j][i], alone[j]), (i, j)


def test_prompts_longer_than_a_step(llm: LLM) -> None:
    prompts = [[(3 * i + j) % 900 + 5 for j in range(n)] for i, n in enumerate((300, 512, 1, 250))]
    sequences = llm.new_batch(4, 512)
    got = llm.prefill_batch(sequences, prompts)
    for row, tokens in zip(got.copy(), prompts):
        assert np.array_equal(row, llm.logits(tokens)[-1])


def test_batches_that_cannot_run(llm: LLM) -> None:
    a, b = llm.new_batch(2, 32)
    with pytest.raises(UsageError, match="tokens for 1"):
        llm.decode_batch([a, b], [5])
    with pytest.raises(UsageError, match="each given once"):
        llm.decode_batch([a, a], [5, 6])
    with pytest.raises(UsageError, match="one store"):
        llm.decode_batch([a, llm.new_sequence(4)], [5, 6])
    with pytest.raises(UsageError, match="outside the model's"):
        llm.decode_batch([a, b], [5, 10**6])
    with pytest.raises(UsageError, match="at least 1"):
        llm.new_batch(0, 32)
    with pytest.raises(UsageError, match="at least one"):
        llm.prefill_batch([], [])
    with pytest.raises(ResourceError, match="do not fit"):
        llm.prefill_batch([a, b], [[5] * 40, [6] * 40])
    assert (a.length, b.length) == (0, 0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_children_generate_the_same(llm: LLM) -> None:
    """A server's workers: the model is loaded once, then the process forks."""
    want = llm.generate("Once upon a time", max_tokens=8).tokens
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = 3
            try:
                status = 0 if llm.generate("Once upon a time", max_tokens=8).tokens == want else 1
            finally:
                os._exit(status)
        children.append(child)
    assert llm.generate("Once upon a time", max_tokens=8).tokens == want
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def test_sampling_is_reproducible(llm: LLM) -> None:
    def sample(seed: int) -> list[int]:
        how = Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=seed)
        return llm.generate("My favourite animal is", max_tokens=24, sampling=how).tokens

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_stops_at_length_and_context(llm: LLM) -> None:
    assert llm.generate("One two three", max_tokens=3).finish == "length"
    small = LLM("smollm2-135m", context=24)
    prompt = small.tokenizer.encode("one two three four five six seven eight nine ten")
    answer = small.generate(prompt, max_tokens=100)
    assert answer.finish in ("context", "stop")
    assert len(answer.tokens) + len(prompt) <= 24


# The model runs with bf16 inputs: a changed last bit of a key flips roundings further on, which alone costs about
# 2e-4 nats (measured: f32 keys against f16 ones), so nothing can come closer than that.
@pytest.mark.parametrize(("kv", "bound"), [("f32", 1e-3), ("bf16", 2e-3), ("int8/row", 2e-2)])
def test_kv_formats_change_little(llm: LLM, kv: str, bound: float) -> None:
    tokens = llm.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 6)
    other = LLM("smollm2-135m", kv=kv)
    divergence, same = np.empty(len(tokens)), np.empty(len(tokens), np.uint8)
    ops.divergence(llm.logits(tokens), other.logits(tokens), divergence, same)
    assert 0 < divergence.mean() < bound


@pytest.mark.parametrize(
    ("make", "error", "needle"),
    [
        (lambda llm: llm.generate("", max_tokens=4), UsageError, "no tokens"),
        (lambda llm: llm.generate("hi", max_tokens=0), UsageError, "max-tokens 0"),
        (lambda llm: llm.generate([10**6], max_tokens=4), UsageError, "outside the model's"),
        (lambda llm: llm.generate([5] * 600, max_tokens=4), UsageError, "context holds 512"),
        (lambda llm: LLM("smollm2-135m", context=10**6), UsageError, "1 to 8192"),
        (lambda llm: LLM("smollm2-135m", kv="int3"), FormatError, "int8/row"),
        (lambda llm: LLM("smollm2-135m", format="int5/q32"), FormatError, "q32"),
        (lambda llm: LLM("smollm2-135m", keep=[("nothing", "bf16")]), UsageError, "matches no site"),
        (lambda llm: LLM("smollm2-135m", threads=0), UsageError, "1 to 256"),
        (lambda llm: Sampling(top_p=0), UsageError, "top-p"),
        (lambda llm: Sampling(temperature=-1), UsageError, "temperature"),
    ],
)
def test_bad_calls_say_what_is_wrong(llm: LLM, make, error, needle) -> None:
    with pytest.raises(error) as caught:
        make(llm)
    assert needle in str(caught.value)


def test_too_little_memory_is_told_before_loading(smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.engine.llm.available_memory", lambda: 10_000_000)
    with pytest.raises(ResourceError, match="only 10 MB are free"):
        LLM("smollm2-135m")
