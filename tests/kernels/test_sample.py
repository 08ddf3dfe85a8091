"""Sampling and evaluation of logits, at every instruction-set level."""

from __future__ import annotations

import numpy as np
import pytest

kernels = pytest.importorskip("gossamer._kernels")


@pytest.fixture(params=kernels.isa_supported(), autouse=True)
def level(request):
    before, threads = kernels.isa(), kernels.threads()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)
    kernels.set_threads(threads)


def draw(logits, recent=(), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, seed=0, step=0):
    return kernels.sample(
        np.asarray(logits, np.float32), np.asarray(recent, np.int32), temperature, top_k, top_p, min_p,
        repeat_penalty, seed, step,
    )  # fmt: skip


def log_softmax(x):
    x = np.asarray(x, np.float64)
    top = x.max(axis=-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(axis=-1, keepdims=True))


def allowed(logits, temperature, top_k, top_p, min_p):
    """The probabilities after all filters, by full sorting."""
    p = np.exp(log_softmax(np.asarray(logits, np.float64) / temperature))
    order = np.lexsort((np.arange(len(p)), -np.asarray(logits)))
    if top_k:
        order = order[:top_k]
    if top_p < 1:
        share = np.cumsum(p[order]) / p[order].sum()
        order = order[: int(np.searchsorted(share, top_p)) + 1]
    order = [i for i in order if p[i] >= min_p * p.max()]
    out = np.zeros_like(p)
    out[order] = p[order]
    return out / out.sum()


LOGITS = np.array(
    [1.0, -0.5, 2.0, 0.3, 0.3, -3.0, 1.4, 0.0, 2.0, -1.0, 0.9, 0.2, -0.2, 1.1, 0.6, -2.0, 0.4], np.float32
)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.3),
     (1.0, 8, 0.7, 0.2), (1.0, 1, 1.0, 0.0), (1.0, 0, 1e-9, 0.0), (2.0, 100, 0.95, 0.05)],
)  # fmt: skip
def test_frequencies(temperature, top_k, top_p, min_p):
    want = allowed(LOGITS, temperature, top_k, top_p, min_p)
    n = 6000
    counts = np.bincount(
        [
            draw(LOGITS, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=7, step=i)[0]
            for i in range(n)
        ],
        minlength=len(LOGITS),
    )
    assert np.all(counts[want == 0] == 0)
    live = want > 0
    chi2 = ((counts[live] - n * want[live]) ** 2 / (n * want[live])).sum()
    degrees = live.sum() - 1
    assert chi2 <= degrees + 4.5 * np.sqrt(2 * degrees) + 6  # beyond the 99.99th percentile


def test_unfiltered_draws_over_a_large_vocabulary():
    x = np.full(20000, -np.inf, np.float32)
    live = [0, 4095, 4096, 9000, 19999]
    x[live] = [0.0, 1.0, 0.5, -1.0, 0.2]
    tokens = [draw(x, seed=9, step=i)[0] for i in range(3000)]
    want = np.exp(log_softmax(x[live]))
    np.testing.assert_allclose([tokens.count(i) / 3000 for i in live], want, atol=0.035)


def test_seeds_are_independent():
    """Over seeds at one step, and over pairs of neighbouring seeds, the draws are uniform."""
    flat = np.zeros(4, np.float32)
    tokens = np.array([draw(flat, seed=s, step=3)[0] for s in range(8000)])
    for values, cells in ((tokens, 4), (tokens[::2] * 4 + tokens[1::2], 16)):
        counts = np.bincount(values, minlength=cells)
        chi2 = ((counts - len(values) / cells) ** 2 / (len(values) / cells)).sum()
        assert chi2 < cells + 4.5 * np.sqrt(2 * cells) + 6


def test_the_same_counter_gives_the_same_token():
    x = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    first = [draw(x, top_p=0.9, seed=5, step=i) for i in range(30)]
    kernels.set_threads(2)
    assert first == [draw(x, top_p=0.9, seed=5, step=i) for i in range(30)]
    assert len({token for token, _ in first}) > 20
    assert draw(x, seed=2**64 - 1, step=2**64 - 1)[0] in range(3000)


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 4097, 50000])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(40, 1.0, 0.0), (0, 0.9, 0.0), (300, 0.5, 0.01), (0, 1.0, 0.1)])
def test_filters_on_large_vocabularies(vocab, top_k, top_p, min_p):
    for spread in (0.01, 3.0):
        x = (np.random.default_rng(vocab).standard_normal(vocab) * spread).astype(np.float32)
        want = allowed(x, 0.8, min(top_k, vocab), top_p, min_p)
        for step in range(20):
            token, logprob = draw(x, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p, seed=1, step=step)
            assert want[token] > 0
            assert logprob == pytest.approx(log_softmax(x.astype(np.float64) / np.float32(0.8))[token], abs=1e-9)


def test_ties_keep_the_lowest_index():
    flat = np.zeros(1000, np.float32)
    assert {draw(flat, top_k=3, seed=1, step=i)[0] for i in range(200)} == {0, 1, 2}
    assert {draw(flat, top_p=0.0029, seed=1, step=i)[0] for i in range(200)} == {0, 1, 2}


def test_greedy():
    x = np.random.default_rng(0).standard_normal(5001).astype(np.float32)
    x[[4000, 77, 5000]] = 9.5
    token, logprob = draw(x, temperature=0.0, top_k=5, top_p=0.1)
    assert token == 77
    assert logprob == pytest.approx(log_softmax(x)[77], abs=1e-9)


def test_repeat_penalty():
    x = np.array([2.0, 1.0, -1.0, -3.0], np.float32)
    # 2 / 4 = 0.5 falls below 1; -1 * 4 = -4; a duplicate counts once
    assert draw(x, recent=[0, 0, 2], temperature=0.0, repeat_penalty=4.0) == (1, pytest.approx(log_softmax(x)[1]))
    counts = np.bincount(
        [draw(x, recent=[0, 0, 2], repeat_penalty=4.0, seed=3, step=i)[0] for i in range(4000)], minlength=4
    )
    want = np.exp(log_softmax([0.5, 1.0, -4.0, -3.0]))
    np.testing.assert_allclose(counts / 4000, want, atol=0.03)
    assert draw(x, recent=[1, 2], top_k=1, repeat_penalty=4.0)[0] == 0
    assert x.tolist() == [2.0, 1.0, -1.0, -3.0]  # the logits stay as they are


def test_forbidden_tokens_are_never_drawn():
    x = np.full(100, -np.inf, np.float32)
    x[[13, 57]] = [1.0, 0.0]
    for options in ({}, {"top_k": 50}, {"top_p": 0.999999}, {"min_p": 1e-9}, {"temperature": 1e-30}):
        assert {draw(x, seed=2, step=i, **options)[0] for i in range(100)} <= {13, 57}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_poisoned_logits(bad):
    for temperature in (0.0, 1.0):
        x = np.zeros(33, np.float32)
        x[32] = bad
        with pytest.raises(RuntimeError, match="logits hold"):
            draw(x, temperature=temperature)
        with pytest.raises(RuntimeError, match="all logits"):
            draw(np.full(5, -np.inf), temperature=temperature)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"temperature": np.nan}, {"temperature": np.inf}, {"top_k": -1}, {"top_p": 0.0},
     {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": np.nan}, {"repeat_penalty": 0.0}, {"repeat_penalty": np.inf},
     {"recent": [4]}, {"recent": [-1]}, {"logits": []}, {"logits": [[1.0]]}],
)  # fmt: skip
def test_hostile_sampling(options):
    with pytest.raises(ValueError, match=r"\w+ .*\w"):
        draw(**{"logits": [1.0, 2.0, 3.0, 4.0], **options})


@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 16, 33, 1000])
def test_nll_and_divergence(vocab):
    rng = np.random.default_rng(vocab)
    base = (rng.standard_normal((9, vocab)) * 5).astype(np.float32)
    other = base + (rng.standard_normal((9, vocab)) * 0.5).astype(np.float32)
    base[3], other[4] = base[3] + 5e4, other[4] - 5e4  # a shift of a row changes nothing that rounding does not
    targets = rng.integers(0, vocab, 9).astype(np.int32)
    out, kl, same = np.empty(9), np.empty(9), np.empty(9, np.uint8)
    kernels.nll(base, targets, out)
    lb, lo = log_softmax(base), log_softmax(other)
    np.testing.assert_allclose(out, -lb[np.arange(9), targets], rtol=1e-12, atol=1e-12)
    kernels.divergence(base, other, kl, same)
    np.testing.assert_allclose(kl, (np.exp(lb) * (lb - lo)).sum(axis=1), rtol=1e-10, atol=1e-12)
    assert np.array_equal(same.astype(bool), base.argmax(axis=1) == other.argmax(axis=1))
    kernels.divergence(base, base, kl, same)
    assert np.all(kl == 0)
    assert np.all(same == 1)


def test_small_divergences_are_exact():
    base = np.random.default_rng(0).standard_normal((2, 4000)).astype(np.float32)
    other = (base + np.random.default_rng(1).standard_normal(base.shape) * 1e-4).astype(np.float32)
    lb, lo = log_softmax(base), log_softmax(other)
    kl, same = np.empty(2), np.empty(2, np.uint8)
    kernels.divergence(base, other, kl, same)
    np.testing.assert_allclose(kl, (np.exp(lb) * (lb - lo)).sum(axis=1), rtol=1e-6)
    assert np.all(kl < 1e-8)


def test_infinities_and_nan_in_evaluation():
    base = np.array([[0.0, -np.inf, 1.0], [0.0, 1.0, 2.0], [0.0, np.nan, 1.0]], np.float32)
    other = np.array([[0.0, -np.inf, 1.0], [0.0, -np.inf, 2.0], [0.0, 0.0, 1.0]], np.float32)
    out, kl, same = np.empty(3), np.empty(3), np.empty(3, np.uint8)
    kernels.divergence(base, other, kl, same)
    assert kl[0] == 0
    assert kl[1] == np.inf
    assert np.isnan(kl[2])
    assert same.tolist() == [1, 1, 0]
    kernels.nll(base, np.array([1, 1, 1], np.int32), out)
    assert out[0] == np.inf
    assert np.isnan(out[2])


def test_evaluation_does_not_depend_on_threads():
    rng = np.random.default_rng(0)
    base, other = (rng.standard_normal((50, 1001)).astype(np.float32) for _ in range(2))
    targets = rng.integers(0, 1001, 50).astype(np.int32)

    def run():
        out, kl, same = np.empty(50), np.empty(50), np.empty(50, np.uint8)
        kernels.nll(base, targets, out)
        kernels.divergence(base, other, kl, same)
        return out, kl, same

    kernels.set_threads(1)
    one = run()
    kernels.set_threads(2)
    for a, b in zip(one, run()):
        assert np.array_equal(a, b)


def test_hostile_evaluation():
    x, out, same = np.zeros((2, 5), np.float32), np.empty(2), np.empty(2, np.uint8)
    for targets in ([0, 5], [-1, 0], [0], [0, 1, 2]):
        with pytest.raises(ValueError, match="targets"):
            kernels.nll(x, np.array(targets, np.int32), out)
    with pytest.raises(ValueError, match="targets"):
        kernels.nll(x, np.array([0, 1], np.int64), out)
    with pytest.raises(ValueError, match="out"):
        kernels.nll(x, np.array([0, 1], np.int32), np.empty(2, np.float32))
    with pytest.raises(ValueError, match="columns"):
        kernels.nll(np.zeros((2, 0), np.float32), np.array([0, 1], np.int32), out)
    with pytest.raises(ValueError, match="other"):
        kernels.divergence(x, x[:1], out, same)
    with pytest.raises(ValueError, match="same_top"):
        kernels.divergence(x, x, out, same.astype(bool).view(np.int8))
