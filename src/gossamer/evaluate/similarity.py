"""How alike two models write: greedy answers of a base and of a candidate to the same prompts.

A divergence is measured on a given text; here each model goes its own way, so that one different token may change all
that follow it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gossamer.engine.llm import LLM
from gossamer.errors import UsageError
from gossamer.models.load import Progress

__all__ = ["PROMPTS", "Similarity", "chrf", "compare_generations", "edit_similarity"]

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "What is the capital of France, and what is it known for?",
    "Write a short story about a lighthouse keeper and a lost ship.",
    "List five things to pack for a week of hiking.",
    "How does a bicycle stay upright?",
    "Write a Python function that returns the largest number in a list.",
    "Translate into French: The library opens at nine in the morning.",
    "What is 17 times 6? Show each step.",
    "Summarise the water cycle for a ten-year-old.",
    "Give three reasons to learn a musical instrument.",
    "Describe the difference between weather and climate.",
    "Write a polite email asking to move a meeting to Thursday.",
)


@dataclass(frozen=True)
class Similarity:
    """Means over the prompts, with standard errors (None for a single one).

    ``same_prefix``: tokens that both answers begin with; ``identical``: share of answers that are equal throughout;
    ``edit``: 1 less the edit distance in tokens by the length of the longer answer; ``chrf``: the character n-gram
    F-score of the candidate's text against the base's, 0 to 1. ``answers`` holds (prompt, base's, candidate's).
    """

    prompts: int
    max_tokens: int
    same_prefix: float
    same_prefix_stderr: float | None
    identical: float
    edit: float
    edit_stderr: float | None
    chrf: float
    chrf_stderr: float | None
    answers: tuple[tuple[str, str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as a dictionary that ``json.dumps`` takes."""
        return asdict(self)


def compare_generations(
    candidate: LLM,
    base: LLM,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_tokens: int = 64,
    progress: Progress | None = None,
) -> Similarity:
    """Both models answer each prompt with their likeliest tokens, in the chat template where the base has one.

    Raises UsageError without prompts, for tokenizers that differ, and for what ``LLM.generate`` refuses.
    """
    if not prompts:
        raise UsageError("there are no prompts to answer; give at least one.")
    prefixes, edits, scores, answers = [], [], [], []
    for done, prompt in enumerate(prompts):
        ids = _tokens(base, prompt)
        if _tokens(candidate, prompt) != ids:
            raise UsageError(
                f"{candidate.checkpoint.path.name} and {base.checkpoint.path.name} read the prompt as different "
                "tokens, so their answers cannot be compared; choose a base model with the same tokenizer."
            )
        theirs = base.generate(ids, max_tokens=max_tokens)
        ours = candidate.generate(ids, max_tokens=max_tokens)
        prefixes.append(_same_prefix(ours.tokens, theirs.tokens))
        edits.append(edit_similarity(ours.tokens, theirs.tokens))
        scores.append(chrf(ours.text, theirs.text))
        answers.append((prompt, theirs.text, ours.text))
        if progress:
            progress(done + 1, len(prompts))
    prefix, prefix_stderr = _mean(prefixes)
    edit, edit_stderr = _mean(edits)
    score, score_stderr = _mean(scores)
    return Similarity(
        prompts=len(prompts),
        max_tokens=max_tokens,
        same_prefix=prefix,
        same_prefix_stderr=prefix_stderr,
        identical=sum(e == 1.0 for e in edits) / len(edits),
        edit=edit,
        edit_stderr=edit_stderr,
        chrf=score,
        chrf_stderr=score_stderr,
        answers=tuple(answers),
    )


def _tokens(llm: LLM, prompt: str) -> list[int]:
    if llm.tokenizer.chat_template is None:
        return llm.tokenizer.encode(prompt, special=False)
    return llm.chat_tokens([{"role": "user", "content": prompt}])


def _same_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def edit_similarity(a: Sequence[int], b: Sequence[int]) -> float:
    """1 - Levenshtein distance / length of the longer; 1 for two empty sequences."""
    if not a and not b:
        return 1.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return 1 - row[-1] / max(len(a), len(b))


def chrf(text: str, reference: str, order: int = 6, beta: float = 2.0) -> float:
    """chrF of Popovic (2015), section 2: 0 to 1, whitespace left out, recall weighted ``beta`` times as precision.

    Precision and recall are means over n-grams of 1 to ``order`` characters; a length that neither text reaches is
    left out. Two texts without characters are equal.
    """
    a, b = "".join(text.split()), "".join(reference.split())
    if not a and not b:
        return 1.0
    precision, recall = [], []
    for n in range(1, order + 1):
        ours, theirs = (Counter(s[i : i + n] for i in range(len(s) - n + 1)) for s in (a, b))
        if not ours and not theirs:
            break
        common = (ours & theirs).total()
        precision.append(common / ours.total() if ours else 0.0)
        recall.append(common / theirs.total() if theirs else 0.0)
    p, r = sum(precision) / len(precision), sum(recall) / len(recall)
    return (1 + beta**2) * p * r / (beta**2 * p + r) if p and r else 0.0


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    x = np.asarray(values, np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
