"""How alike two texts are, by hand, and that answers are compared as they are written."""

from __future__ import annotations

import copy
import json

import pytest

from gossamer.engine.llm import LLM
from gossamer.errors import UsageError
from gossamer.evaluate.similarity import PROMPTS, chrf, compare_generations, edit_similarity


@pytest.mark.parametrize(
    ("a", "b", "similarity"),
    [
        ([], [], 1),
        ([1], [], 0),
        ([1, 2, 3], [1, 2, 3], 1),
        ([1, 2, 3, 4], [1, 3, 4], 3 / 4),
        ([1, 2, 3, 4], [2, 3, 4, 5], 1 / 2),
        (list(b"kitten"), list(b"sitting"), 4 / 7),
    ],
)
def test_edit_similarity(a, b, similarity):
    assert edit_similarity(a, b) == pytest.approx(similarity)
    assert edit_similarity(b, a) == pytest.approx(similarity)


def test_chrf_by_hand():
    assert chrf("", " \n") == 1
    assert chrf("the cat", "the  cat\n") == 1
    assert chrf("abc", "xyz") == 0
    assert chrf("", "abc") == 0
    # Letters of "ab" in "abc": precision 2/2, recall 2/3; pairs: 1/1 and 1/2; triples: none of ours, so 0 and 0/1.
    p, r = (1 + 1 + 0) / 3, (2 / 3 + 1 / 2 + 0) / 3
    assert chrf("ab", "abc") == pytest.approx(5 * p * r / (4 * p + r))
    assert chrf("abc", "ab", beta=1) == pytest.approx(chrf("ab", "abc", beta=1))
    assert chrf("aab", "ab", order=1) == pytest.approx(5 * (2 / 3) / (4 * 2 / 3 + 1))  # a repeated letter counts once


@pytest.fixture(scope="module")
def llm(smollm2_gguf) -> LLM:
    return LLM(smollm2_gguf, context=256)


def test_answers(llm, smollm2_gguf):
    coarse = LLM(smollm2_gguf, format="int4/row @ int8/token", context=256)
    seen = []
    found = compare_generations(coarse, llm, PROMPTS[:2], max_tokens=8, progress=lambda *p: seen.append(p))
    assert (found.prompts, found.max_tokens, seen) == (2, 8, [(1, 2), (2, 2)])
    assert 0 <= found.same_prefix < 8
    assert 0 <= found.edit < 1
    assert 0 < found.chrf < 1
    assert found.identical == 0
    prompt, theirs, ours = found.answers[1]
    assert prompt == PROMPTS[1]
    assert theirs == llm.chat([{"role": "user", "content": prompt}], max_tokens=8).text
    assert ours == coarse.chat([{"role": "user", "content": prompt}], max_tokens=8).text
    assert json.loads(json.dumps(found.to_json()))["prompts"] == 2


def test_a_model_writes_like_itself(llm):
    found = compare_generations(llm, llm, PROMPTS[:1], max_tokens=4)
    assert (found.same_prefix, found.identical, found.edit, found.chrf) == (4, 1, 1, 1)
    assert found.edit_stderr is None


def test_answers_that_cannot_be_compared(llm):
    with pytest.raises(UsageError, match="no prompts"):
        compare_generations(llm, llm, [])
    other = copy.copy(llm)
    other.tokenizer = copy.copy(llm.tokenizer)
    other.tokenizer.chat_template = None
    with pytest.raises(UsageError, match="different tokens"):
        compare_generations(other, llm)
