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
from gossamer.evaluate.score import noise_floor
from gossamer.evaluate.windows import ByteLengths, encode_start
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


def test_divergence_by_confidence_and_by_halves(llm, coarse):
    result = evaluate(coarse, PROSE, against=llm, tokens=288, window=96)
    ids = llm.tokenizer.encode(PROSE, bos=False)
    kl, sure, same, cost = [], [], [], []
    for start in (0, 96, 192):
        p = _log_softmax(llm.logits(ids[start : start + 96])[47:95])
        q = _log_softmax(coarse.logits(ids[start : start + 96])[47:95])
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        sure.append(np.exp(p.max(axis=1)))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
        cost.append((p - q)[np.arange(48), ids[start + 48 : start + 96]].mean())
    kl, sure, same = np.array(kl), np.array(sure), np.array(same)
    assert [(b.low, b.high) for b in result.kl_by_confidence] == [(0, 0.25), (0.25, 0.5), (0.5, 0.9), (0.9, 1)]
    assert sum(b.tokens for b in result.kl_by_confidence) == result.tokens == 144
    for bucket in result.kl_by_confidence:
        mask = (sure > bucket.low) & (sure <= bucket.high)
        assert bucket.tokens == mask.sum() > 0
        assert bucket.kl_mean == pytest.approx(kl[mask].mean(), rel=1e-5)
        assert bucket.top1_agreement == pytest.approx(same[mask].mean())
        # The jackknife over windows, which the linear approximation of a ratio is close to.
        left_out = [kl[k][mask[k]].mean() for k in ([1, 2], [0, 2], [0, 1])]
        jackknife = math.sqrt(2 / 3 * ((np.array(left_out) - np.mean(left_out)) ** 2).sum())
        assert bucket.kl_mean_stderr == pytest.approx(jackknife, rel=0.5)
    assert result.kl_halves == pytest.approx((kl[0].mean(), kl[1:].mean()), rel=1e-5)
    assert result.nll_increase == pytest.approx(np.mean(cost), rel=1e-5)
    assert result.nll_increase == pytest.approx(math.log(result.perplexity / result.base_perplexity), rel=1e-9)
    assert result.nll_increase_stderr == pytest.approx(np.std(cost, ddof=1) / math.sqrt(3), rel=1e-5)
    assert json.loads(json.dumps(result.to_json()))["kl_by_confidence"][0]["low"] == 0


def test_one_window_has_no_halves_and_an_empty_bucket_no_mean(llm, coarse):
    result = evaluate(coarse, PROSE, against=llm, tokens=8, window=8)
    assert result.kl_halves is None
    empty = [b for b in result.kl_by_confidence if not b.tokens]
    assert empty
    assert all(b.kl_mean is b.kl_mean_stderr is b.top1_agreement is None for b in empty)
    assert all(b.kl_mean_stderr is None for b in result.kl_by_confidence)


def test_noise_floor(llm, coarse):
    noise = noise_floor(llm, PROSE, tokens=96, window=96)
    assert list(noise.formats) == ["uint4/g32-m(f16) @ f32", "int8/g32 @ f32"]
    assert 0 < noise.kl_mean < 1e-3
    assert noise.kl_mean < 0.01 * evaluate(coarse, PROSE, against=llm, tokens=96, window=96).kl_mean
    back = noise_floor(LLM(llm.checkpoint, format="int4/g32 @ f32"), PROSE, tokens=32, window=32)
    assert list(back.formats) == ["int4/g32"]


def test_a_beginning_token_may_be_asked_for(llm):
    with_it = evaluate(llm, PROSE, tokens=64, window=64, bos=True)
    assert "a BOS token first" in with_it.protocol
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(PROSE, bos=False)[:63]]
    assert with_it.perplexity == pytest.approx(math.exp(_nll(llm, ids)[31:].mean()), rel=1e-9)
    assert evaluate(llm, PROSE, tokens=64, window=64, bos=False) == evaluate(llm, PROSE, tokens=64, window=64)
    other = copy.copy(llm)
    other.tokenizer = copy.copy(llm.tokenizer)
    other.tokenizer.bos_id = None
    with pytest.raises(UsageError, match="no beginning-of-text token"):
        evaluate(other, PROSE, bos=True)


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
    lengths = ByteLengths(llm.tokenizer)
    for text in (AWKWARD, PROSE):
        assert sum(lengths[i] for i in llm.tokenizer.encode(text, special=False)) == len(text.encode())


def test_byte_lengths_of_sentencepiece_tokens(gemma3_gguf):
    tokenizer = open_checkpoint(gemma3_gguf).tokenizer()
    lengths = ByteLengths(tokenizer)
    for text in (AWKWARD, PROSE):
        assert sum(lengths[i] for i in tokenizer.encode(text, special=False, bos=False)) == len(text.encode())


def test_encoding_a_part_gives_the_tokens_of_the_whole(llm):
    text = AWKWARD * 400
    whole = llm.tokenizer.encode(text, special=False, bos=False)
    for need in (1, 100, 1000):
        assert encode_start(llm.tokenizer, text, need) == whole[:need]
    assert encode_start(llm.tokenizer, text, len(whole) + 5) == whole


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
