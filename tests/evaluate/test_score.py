"""Perplexity, bits per byte and divergence, against float64 sums over whole rows of logits and published figures."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gossamer import ops
from gossamer.engine.llm import LLM
from gossamer.errors import GossamerError, UsageError
from gossamer.evaluate import Text, austen, evaluate
from gossamer.evaluate.score import _ByteLengths, _encode
from gossamer.models.checkpoint import open_checkpoint

# Long enough for 512 tokens; written for this test.
PROSE = "".join(
    f"On day {n} the keeper of the lighthouse wrote that the sea had been {mood}, counted {7 * n} gulls upon the "
    f"rocks, and left the {thing} by the door for whoever came next.\n"
    for n, mood, thing in zip(
        range(1, 17),
        ["calm", "restless", "grey", "loud", "patient", "green", "high", "kind"] * 2,
        ["lamp", "ledger", "kettle", "rope", "letter", "oilcan", "key", "broom", "coat"] * 2,
    )
)


@pytest.fixture(scope="module")
def llm(smollm2_gguf) -> LLM:
    return LLM(smollm2_gguf)


@pytest.fixture(scope="module")
def coarse(smollm2_gguf) -> LLM:
    return LLM(smollm2_gguf, format="int4/row @ int8/token")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def _nll(llm: LLM, ids: list[int]) -> np.ndarray:
    """float64 [len(ids) - 1]: minus the log-probability of each token but the first."""
    logp = _log_softmax(llm.logits(ids)[:-1])
    return -logp[np.arange(len(ids) - 1), ids[1:]]


def test_one_window_all_scored(llm):
    result = evaluate(llm, PROSE, tokens=384, window=384, score="all")
    ids = llm.tokenizer.encode(PROSE, bos=False)[:384]
    nll = _nll(llm, ids)
    assert result.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-9)
    scored = len(llm.tokenizer.decode(ids)) - len(llm.tokenizer.decode(ids[:1]))
    assert result.bits_per_byte == pytest.approx(nll.sum() / math.log(2) / scored, rel=1e-9)
    assert (result.tokens, result.windows) == (383, 1)
    assert result.perplexity_stderr is None
    assert result.kl_mean is result.kl_p99 is result.top1_agreement is result.base_perplexity is None
    assert "1 window of 384 tokens" in result.protocol
    assert "no BOS" in result.protocol


def test_second_half_of_several_windows(llm):
    seen = []
    result = evaluate(llm, PROSE, tokens=300, window=96, progress=lambda *p: seen.append(p))
    ids = llm.tokenizer.encode(PROSE, bos=False)
    windows = [_nll(llm, ids[i : i + 96])[47:] for i in (0, 96, 192)]  # the tokens 48 to 95 of each
    assert (result.tokens, result.windows) == (3 * 48, 3)
    assert result.perplexity == pytest.approx(math.exp(np.concatenate(windows).mean()), rel=1e-9)
    means = [w.mean() for w in windows]
    stderr = result.perplexity * np.std(means, ddof=1) / math.sqrt(3)
    assert result.perplexity_stderr == pytest.approx(stderr, rel=1e-9)
    nbytes = sum(len(llm.tokenizer.decode(ids[i + 48 : i + 96]).encode()) for i in (0, 96, 192))
    assert result.bits_per_byte == pytest.approx(result.tokens * math.log2(result.perplexity) / nbytes, rel=1e-9)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_model_does_not_differ_from_itself(llm):
    result = evaluate(llm, PROSE, against=llm, tokens=128, window=64)
    assert result.kl_mean == result.kl_p99 == result.kl_mean_stderr == 0.0
    assert result.top1_agreement == 1.0
    assert result.base_perplexity == result.perplexity


def test_divergence_from_the_base(llm, coarse):
    result = evaluate(coarse, PROSE, against=llm, tokens=192, window=96)
    ids = llm.tokenizer.encode(PROSE, bos=False)
    kl, same = [], []
    for start in (0, 96):
        p = _log_softmax(llm.logits(ids[start : start + 96])[47:95])
        q = _log_softmax(coarse.logits(ids[start : start + 96])[47:95])
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
    assert result.kl_mean == pytest.approx(np.mean(kl), rel=1e-6)
    assert result.kl_mean > 0.01
    assert result.kl_p99 == pytest.approx(np.quantile(np.concatenate(kl), 0.99), rel=1e-6)
    means = np.mean(kl, axis=1)
    assert result.kl_mean_stderr == pytest.approx(abs(means[0] - means[1]) / 2, rel=1e-6)
    assert result.top1_agreement == np.mean(same)
    assert 0 < result.top1_agreement < 1
    assert result.base_perplexity == pytest.approx(evaluate(llm, PROSE, tokens=192, window=96).perplexity)


def test_the_result_does_not_depend_on_threads(llm):
    before = ops.threads()
    try:
        results = []
        for threads in (1, 3):
            ops.set_threads(threads)
            results.append(evaluate(llm, PROSE, tokens=64, window=64))
    finally:
        ops.set_threads(before)
    assert results[0] == results[1]


def test_sizes_formats_and_json(llm):
    result = evaluate(llm, Text(PROSE, "a lighthouse", "abc"), tokens=16)
    assert result.windows == 1
    assert result.tokens == 8
    assert result.bytes == llm.checkpoint.data_bytes  # every tensor of the file, as it is stored there
    assert result.bits_per_weight == 8 * result.bytes / llm.loaded.topology.parameters
    assert 5 < result.bits_per_weight < 6
    assert result.formats == {"uint4/g32-m(f16)": 210, "int8/g32": 1}
    assert (result.text, result.text_sha256) == ("a lighthouse", "abc")
    assert json.loads(json.dumps(result.to_json()))["perplexity"] == result.perplexity


def test_a_text_shorter_than_asked_says_so(llm):
    ids = llm.tokenizer.encode(PROSE, bos=False)
    whole = evaluate(llm, PROSE, tokens=100_000, window=100)
    assert whole.windows == len(ids) // 100
    assert whole.protocol.endswith("The text ends there.")
    short = evaluate(llm, PROSE[:200], tokens=512, window=512, score="all")
    assert short.tokens == len(llm.tokenizer.encode(PROSE[:200], bos=False)) - 1
    assert short.protocol.endswith("The text ends there.")
    assert not evaluate(llm, PROSE, tokens=200, window=100).protocol.endswith("ends there.")


# ---------------------------------------------------------------- tokens and bytes

AWKWARD = (
    "na\u00efve \u2014 \u4f60\u597d  \U0001f916\U0001f1e8\U0001f1ed \ufffd\ufffd\n\n\tdef f(x):\r\n  return '\u00e9' "
    "<|im_start|>\x00 \u0928\u092e\u0938\u094d\u0924\u0947"
)


def test_byte_lengths_of_byte_level_tokens(llm):
    lengths = _ByteLengths(llm.tokenizer)
    for text in (AWKWARD, PROSE):
        assert sum(lengths[i] for i in llm.tokenizer.encode(text, special=False)) == len(text.encode())


def test_byte_lengths_of_sentencepiece_tokens(gemma3_gguf):
    tokenizer = open_checkpoint(gemma3_gguf).tokenizer()
    lengths = _ByteLengths(tokenizer)
    for text in (AWKWARD, PROSE):
        assert sum(lengths[i] for i in tokenizer.encode(text, special=False, bos=False)) == len(text.encode())


def test_encoding_a_part_gives_the_tokens_of_the_whole(llm):
    text = AWKWARD * 400
    whole = llm.tokenizer.encode(text, special=False, bos=False)
    for need in (1, 100, 1000):
        assert _encode(llm.tokenizer, text, need) == whole[:need]
    assert _encode(llm.tokenizer, text, len(whole) + 5) == whole


# ---------------------------------------------------------------- errors


def test_options_that_cannot_work(llm, monkeypatch):
    with pytest.raises(UsageError, match="--score most is not known; choose second-half or all"):
        evaluate(llm, PROSE, score="most")
    with pytest.raises(UsageError, match="--window 1"):
        evaluate(llm, PROSE, window=1)
    with pytest.raises(UsageError, match="holds 4096 tokens; lower --window"):
        evaluate(llm, PROSE, window=5000)
    for text in ("", "x"):
        with pytest.raises(UsageError, match="too few to score one"):
            evaluate(llm, text)


def test_models_that_cannot_be_compared(llm):
    other = copy.copy(llm)
    other.config = replace(llm.config, vocab=llm.config.vocab + 1)
    with pytest.raises(UsageError, match=r"predicts 49152 tokens .* 49153"):
        evaluate(llm, PROSE, against=other)
    other = copy.copy(llm)
    other.tokenizer = copy.copy(llm.tokenizer)
    other.tokenizer.encode = lambda text, **_: llm.tokenizer.encode(text.upper())
    with pytest.raises(UsageError, match="different tokens"):
        evaluate(llm, PROSE, against=other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_predictions_that_are_no_numbers(llm, monkeypatch, bad):
    whole = llm.transformer.logits

    def broken(hidden):
        logits = whole(hidden)
        logits[:, 7] = bad
        return logits

    monkeypatch.setattr(llm.transformer, "logits", broken)
    with pytest.raises(GossamerError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        evaluate(llm, PROSE, tokens=32, window=32)


# ---------------------------------------------------------------- independent figures


@pytest.fixture(scope="module")
def pride() -> str:
    """Lines 200 to 499 of Pride and Prejudice, counted from 0."""
    build = Path(__file__).parents[2] / "build" / "austen"
    for root in (build, Path("/")):
        path = root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
        if path.is_file():
            return "\n".join(austen(path, "pride").split("\n")[200:500])
    pytest.skip("Debian's package r-cran-janeaustenr is neither installed nor unpacked in build/austen")


def test_smollm2_agrees_with_an_independent_forward_pass(llm, pride):
    result = evaluate(llm, pride, tokens=384, window=384, score="all")
    assert result.perplexity == pytest.approx(20.5, rel=0.01)
    assert result.bits_per_byte == pytest.approx(1.211, rel=0.01)


def test_gemma3_agrees_with_an_independent_forward_pass(gemma3_gguf, pride):
    """Its tokenizer begins each window with a token that is not scored."""
    llm = LLM(gemma3_gguf)
    result = evaluate(llm, pride, tokens=384, window=384, score="all")
    assert result.perplexity == pytest.approx(22.9, rel=0.01)
    assert result.bits_per_byte == pytest.approx(1.187, rel=0.01)
    assert result.tokens == 383
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(pride, bos=False)[:383]]
    assert ids == llm.tokenizer.encode(pride)[:384]
    assert "a BOS token first, not scored" in result.protocol
