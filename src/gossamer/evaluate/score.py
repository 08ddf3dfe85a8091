"""Quality on a text: perplexity, bits per byte, and the distance from another model's predictions.

The text is cut into windows of equal length, and each runs from an empty context. By default only the second half
of a window is scored, where every prediction has at least half a window of context.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.engine.llm import LLM
from gossamer.errors import GossamerError, UsageError
from gossamer.evaluate.divergence import Bucket, OurPredictions, measure
from gossamer.evaluate.texts import Text
from gossamer.evaluate.windows import ByteLengths, cut
from gossamer.models.load import Loaded, Progress

__all__ = ["SCORES", "Result", "evaluate", "noise_floor"]

F64 = npt.NDArray[np.float64]

SCORES = ("second-half", "all")


@dataclass(frozen=True)
class Result:
    """What a model scored on a text.

    ``perplexity`` is exp of the mean negative log-likelihood of the scored tokens, ``bits_per_byte`` their sum in
    bits over the UTF-8 bytes of exactly those tokens (comparable across tokenizers). ``nll_increase`` is the mean
    cost of a token here less that in the base, in nats: ln(perplexity / base_perplexity), with the standard error of
    the differences. ``kl_mean``, ``kl_p99`` (nats per token) and ``top1_agreement`` (0 to 1) are the divergence of
    the base model's predictions from this model's, KL(base || this), its 99th percentile, and how often both find
    the same token most likely. ``kl_halves`` are the means over the first and the second half of the windows: their
    difference is what another text of the kind would change. ``kl_by_confidence`` is the divergence by how sure the
    base was. All of these are None without a base. Standard errors are over windows, None for a single one.
    ``tokens`` are the scored ones; ``bytes`` are those of all packed matrices, norms and biases (the data section of
    a compressed folder), and ``bits_per_weight`` is 8 x ``bytes`` / parameters. ``formats`` counts the sites of each
    format.
    """

    model: str
    against: str | None
    perplexity: float
    perplexity_stderr: float | None
    bits_per_byte: float
    base_perplexity: float | None
    nll_increase: float | None
    nll_increase_stderr: float | None
    kl_mean: float | None
    kl_mean_stderr: float | None
    kl_p99: float | None
    kl_halves: tuple[float, float] | None
    kl_by_confidence: list[Bucket] | None
    top1_agreement: float | None
    tokens: int
    windows: int
    text: str
    text_sha256: str
    protocol: str
    bytes: int
    bits_per_weight: float
    formats: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Everything as a dictionary that ``json.dumps`` takes."""
        return asdict(self)


def formats_used(loaded: Loaded) -> dict[str, int]:
    """How many sites have each format, the most frequent first."""
    return dict(Counter(str(f) for f in loaded.formats.values()).most_common())


def evaluate(
    candidate: LLM,
    text: Text | str,
    *,
    against: LLM | None = None,
    tokens: int = 8192,
    window: int = 512,
    score: str = "second-half",
    bos: bool | None = None,
    progress: Progress | None = None,
) -> Result:
    """Scores a model on the first ``tokens`` tokens of a text, in windows of ``window`` tokens.

    Each window runs from an empty context. Where the model's tokenizer begins a text with a token (BOS), that
    token is the first of every window and is not scored; ``bos`` True or False decides otherwise. ``score`` is
    "second-half" or "all" (every token but a window's first). A last window that is not full is left out, unless it
    is the only one. With ``against``, the base model runs beside the candidate, window by window; both must have the
    same tokenizer.

    Raises UsageError for options that cannot work and a text that is too short, and GossamerError when a model
    gives predictions that are no numbers.
    """
    if score not in SCORES:
        raise UsageError(f"--score {score} is not known; choose {' or '.join(SCORES)}.")
    if window < 2 or tokens < 2:
        raise UsageError(f"--window {window} and --tokens {tokens} must each be at least 2, for a token to predict.")
    models = [candidate] if against is None else [candidate, against]
    for llm in models:
        if window > llm.context:
            raise UsageError(
                f"--window {window} is longer than the context of {_name(llm)}, which holds {llm.context} tokens; "
                "lower --window."
            )
    if isinstance(text, str):
        text = Text(text, "a text", hashlib.sha256(text.encode()).hexdigest())
    ids = cut(candidate.tokenizer, text.text, tokens, window, bos)
    if against is not None:
        _same_tokens(candidate, against, ids, text.text, tokens, window, bos)
    length = len(ids[0])
    short = len(ids) < tokens // window or length < min(window, tokens)
    first = 1 if score == "all" else max(1, length // 2)
    scored = [w[first:] for w in ids]
    base = None if against is None else OurPredictions(against)
    measured = measure(OurPredictions(candidate), base, ids, first, progress)
    lengths = ByteLengths(candidate.tokenizer)
    nbytes = sum(lengths[t] for w in scored for t in w)
    mean, stderr = _mean(measured.nll)
    perplexity = _perplexity(mean, candidate)
    total = float(np.concatenate(measured.nll).sum())
    kl_mean, kl_stderr = _mean(measured.kl) if base else (None, None)
    more, more_stderr = _mean([a - b for a, b in zip(measured.nll, measured.base_nll)]) if base else (None, None)
    return Result(
        model=_name(candidate),
        against=None if against is None else _name(against),
        perplexity=perplexity,
        perplexity_stderr=None if stderr is None else perplexity * stderr,
        bits_per_byte=total / math.log(2) / nbytes,
        base_perplexity=_perplexity(_mean(measured.base_nll)[0], against) if against is not None else None,
        nll_increase=more,
        nll_increase_stderr=more_stderr,
        kl_mean=kl_mean,
        kl_mean_stderr=kl_stderr,
        kl_p99=float(np.quantile(np.concatenate(measured.kl), 0.99)) if base else None,
        kl_halves=measured.halves() if base else None,
        kl_by_confidence=measured.buckets() if base else None,
        top1_agreement=float(np.concatenate(measured.same).mean()) if base else None,
        tokens=sum(map(len, scored)),
        windows=len(ids),
        text=text.description,
        text_sha256=text.sha256,
        protocol=_protocol(candidate, len(ids), length, score, bos) + (" The text ends there." if short else ""),
        bytes=candidate.loaded.data_bytes,
        bits_per_weight=candidate.loaded.bits_per_weight,
        formats=formats_used(candidate.loaded),
    )


def _name(llm: LLM) -> str:
    return llm.checkpoint.path.name


def noise_floor(
    base: LLM,
    text: Text | str,
    *,
    tokens: int = 8192,
    window: int = 512,
    score: str = "second-half",
    bos: bool | None = None,
    progress: Progress | None = None,
) -> Result:
    """The divergence of a model from itself run in another precision: what lies below it says nothing.

    The base is loaded once more with the same weights, its inputs in float32 where any site takes others, and in
    bfloat16 where all take float32. Options and errors as for ``evaluate``.
    """
    sites = base.loaded.formats
    inputs = "bf16" if all(str(fmt.input) == "f32" for fmt in sites.values()) else "f32"
    keep = [(name, f"{fmt.weight} @ {inputs}") for name, fmt in sites.items()]
    again = LLM(base.checkpoint, keep=keep, context=base.context, kv=base.kv_format)
    return evaluate(again, text, against=base, tokens=tokens, window=window, score=score, bos=bos, progress=progress)


def _protocol(llm: LLM, count: int, length: int, score: str, bos: bool | None) -> str:
    windows = f"{count} windows" if count > 1 else "1 window"
    what = "all predicted tokens are scored" if score == "all" else "the second half of each is scored"
    wanted = llm.tokenizer.add_bos if bos is None else bos
    head = "a BOS token first, not scored" if wanted else "no BOS token"
    return (
        f"{windows} of {length} tokens, each from an empty context ({head}); {what}; "
        f"keys and values in {llm.kv_format}."
    )


def _same_tokens(a: LLM, b: LLM, ids: list[list[int]], text: str, tokens: int, window: int, bos: bool | None) -> None:
    if a.config.vocab != b.config.vocab:
        raise UsageError(
            f"{_name(a)} predicts {a.config.vocab} tokens and {_name(b)} {b.config.vocab}, so their predictions "
            "cannot be compared; choose a base model with the same tokenizer."
        )
    if cut(b.tokenizer, text, tokens, window, bos) != ids:
        raise UsageError(
            f"{_name(a)} and {_name(b)} cut the text into different tokens, so their predictions cannot be "
            "compared; choose a base model with the same tokenizer."
        )


def _formats(llm: LLM) -> str:
    return ", ".join(formats_used(llm.loaded))


def _perplexity(nats: float, llm: LLM) -> float:
    if nats > 700:  # exp would overflow
        raise GossamerError(
            f"{_name(llm)} in {_formats(llm)} is broken: it misses each token by {nats:.0f} nats on average; "
            "check the checkpoint, or use a format with a larger range."
        )
    return math.exp(nats)


def _mean(per_window: list[F64]) -> tuple[float, float | None]:
    """The mean over all tokens and its standard error over windows, which are of equal length."""
    means = np.array([w.mean() for w in per_window])
    if len(means) == 1:
        return float(means[0]), None
    return float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))
