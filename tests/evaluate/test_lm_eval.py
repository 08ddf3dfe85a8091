"""The adapter for the lm-evaluation-harness, called as the harness calls it, against our own scores."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from gossamer.engine.llm import LLM
from gossamer.errors import UsageError
from gossamer.evaluate.loglikelihood import encode_pair, loglikelihoods

if find_spec("lm_eval") is None:
    pytest.skip("the package 'lm-eval' is not installed", allow_module_level=True)

from lm_eval.api.instance import Instance

from gossamer.evaluate.lm_eval import GossamerLM


@pytest.fixture(scope="module")
def model(smollm2_gguf) -> GossamerLM:
    return GossamerLM(LLM(smollm2_gguf, context=96))


def _asked(kind: str, *arguments: object) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_loglikelihood(model):
    texts = [("The capital of France is", " Paris"), ("The capital of France is", " Rome"), ("", "Once upon a time")]
    found = model.loglikelihood(_asked("loglikelihood", *texts))
    own = loglikelihoods(model.llm, [encode_pair(model.tokenizer, *t) for t in texts])
    assert found == [(s.logprob, s.greedy) for s in own]
    assert found[0][0] > found[1][0]
    assert found[0][1]


def test_a_long_context_loses_its_beginning(model):
    context, continuation = "one two three four five six seven eight nine ten " * 20, "eleven"
    ((logprob, _),) = model.loglikelihood(_asked("loglikelihood", (context, continuation)))
    tokens, answer = encode_pair(model.tokenizer, context, continuation)
    (own,) = loglikelihoods(model.llm, [(tokens[-(97 - len(answer)) :], answer)])
    assert logprob == own.logprob
    with pytest.raises(UsageError, match=r"a continuation has .* and the context holds 96"):
        model.loglikelihood(_asked("loglikelihood", ("a", " b" * 100)))


def test_rolling(model):
    short, long = "The quick brown fox jumps over the lazy dog.", "All work and no play makes Jack a dull boy. " * 20
    first, second, third = model.loglikelihood_rolling(_asked("loglikelihood_rolling", (short,), (long,), ("",)))
    begin, ids = encode_pair(model.tokenizer, "", short)
    assert first == loglikelihoods(model.llm, [(begin, ids)])[0].logprob
    assert third == 0
    ids = encode_pair(model.tokenizer, "", long)[1]
    assert 2 * 96 < len(ids) < 3 * 96
    pairs = [(begin, ids[:96]), (ids[95:96], ids[96:192]), (ids[-97:192], ids[192:])]
    assert second == sum(s.logprob for s in loglikelihoods(model.llm, pairs))


def test_generate_until(model):
    prompt = "1, 2, 3, 4, 5,"
    whole = model.llm.generate(prompt, max_tokens=12).text
    options = ({"until": [], "max_gen_toks": 12}, {"until": ["9", "8"], "max_gen_toks": 12}, {"until": ","})
    found = model.generate_until(_asked("generate_until", *((prompt, o) for o in options)))
    assert found[0] == whole
    assert found[1] == whole.partition("8")[0]
    assert found[2] == whole.partition(",")[0]
    drawn = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 5.0}
    (sampled,) = model.generate_until(_asked("generate_until", (prompt, drawn)))
    assert not whole.startswith(sampled)


def test_chat_template(model):
    history = [{"role": "user", "content": "Hello"}]
    assert model.apply_chat_template(history).endswith("<|im_start|>assistant\n")
    assert model.apply_chat_template(history, add_generation_prompt=False).endswith("Hello<|im_end|>\n")
    assert "im_start" in model.chat_template()
    assert model.tokenizer_name == "SmolLM2-135M-Instruct.Q4_1.gguf"
