"""Quality on a text: perplexity, bits per byte, and the distance from another model's predictions.

The text is cut into windows of equal length, and each runs from an empty context. By default only the second half
of a window is scored, where every prediction has at least half a window of context.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.checkpoints.tokenizer import Tokenizer
from gossamer.engine.llm import LLM
from gossamer.errors import GossamerError, UsageError
from gossamer.evaluate.texts import Text
from gossamer.models.load import Loaded, Progress
from gossamer.models.transformer import HEAD_ROWS

__all__ = ["SCORES", "Result", "evaluate"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

SCORES = ("second-half", "all")
_MARGIN = 64  # tokens at the end of a cut text that are not used: the cut may have changed them


@dataclass(frozen=True)
class Result:
    """What a model scored on a text.

    ``perplexity`` is exp of the mean negative log-likelihood of the scored tokens, ``bits_per_byte`` their sum in
    bits over the UTF-8 bytes of exactly those tokens (comparable across tokenizers). ``kl_mean``, ``kl_p99`` (nats
    per token) and ``top1_agreement`` (0 to 1) are the divergence of the base model's predictions from this
    model's, KL(base || this), its 99th percentile, and how often both find the same token most likely; None
    without a base. Standard errors are over windows, None for a single one. ``tokens`` are the scored ones;
    ``bytes`` are those of all packed matrices, norms and biases (the data section of a compressed folder), and
    ``bits_per_weight`` is 8 x ``bytes`` / parameters. ``formats`` counts the sites of each format.
    """

    model: str
    against: str | None
    perplexity: float
    perplexity_stderr: float | None
    bits_per_byte: float
    base_perplexity: float | None
    kl_mean: float | None
    kl_mean_stderr: float | None
    kl_p99: float | None
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
    progress: Progress | None = None,
) -> Result:
    """Scores a model on the first ``tokens`` tokens of a text, in windows of ``window`` tokens.

    Each window runs from an empty context. Where the model's tokenizer begins a text with a token (BOS), that
    token is the first of every window and is not scored. ``score`` is "second-half" or "all" (every token but a
    window's first). A last window that is not full is left out, unless it is the only one. With ``against``, the
    base model runs beside the candidate, window by window; both must have the same tokenizer.

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
    ids = _windows(candidate, text.text, tokens, window)
    if against is not None:
        _same_tokens(candidate, against, ids, text.text, tokens, window)
    length = len(ids[0])
    short = len(ids) < tokens // window or length < min(window, tokens)
    first = 1 if score == "all" else max(1, length // 2)
    scored = [w[first:] for w in ids]

    nll, base_nll, kl, same = [], [], [], []
    for done, w in enumerate(ids):
        part = _score_window(candidate, against, w, first)
        nll.append(part.nll)
        if part.base_nll is not None:
            base_nll.append(part.base_nll)
            kl.append(part.kl)
            same.append(part.same)
        if progress:
            progress(done + 1, len(ids))

    lengths = _ByteLengths(candidate.tokenizer)
    nbytes = sum(lengths[t] for w in scored for t in w)
    mean, stderr = _mean(nll)
    perplexity = _perplexity(mean, candidate)
    total = float(np.concatenate(nll).sum())
    kl_mean, kl_stderr = _mean(kl) if kl else (None, None)
    return Result(
        model=_name(candidate),
        against=None if against is None else _name(against),
        perplexity=perplexity,
        perplexity_stderr=None if stderr is None else perplexity * stderr,
        bits_per_byte=total / math.log(2) / nbytes,
        base_perplexity=_perplexity(_mean(base_nll)[0], against) if against is not None else None,
        kl_mean=kl_mean,
        kl_mean_stderr=kl_stderr,
        kl_p99=float(np.quantile(np.concatenate(kl), 0.99)) if kl else None,
        top1_agreement=float(np.concatenate(same).mean()) if same else None,
        tokens=sum(map(len, scored)),
        windows=len(ids),
        text=text.description,
        text_sha256=text.sha256,
        protocol=_protocol(candidate, len(ids), length, score) + (" The text ends there." if short else ""),
        bytes=candidate.loaded.data_bytes,
        bits_per_weight=candidate.loaded.bits_per_weight,
        formats=formats_used(candidate.loaded),
    )


def _name(llm: LLM) -> str:
    return llm.checkpoint.path.name


def _protocol(llm: LLM, count: int, length: int, score: str) -> str:
    windows = f"{count} windows" if count > 1 else "1 window"
    what = "all predicted tokens are scored" if score == "all" else "the second half of each is scored"
    bos = "a BOS token first, not scored" if llm.tokenizer.add_bos else "no BOS token"
    return (
        f"{windows} of {length} tokens, each from an empty context ({bos}); {what}; keys and values in {llm.kv_format}."
    )


# ---------------------------------------------------------------- tokens


def _windows(llm: LLM, text: str, tokens: int, window: int) -> list[list[int]]:
    """The text as windows of token ids, BOS included where the tokenizer adds one."""
    head = [llm.tokenizer.bos_id] if llm.tokenizer.add_bos and llm.tokenizer.bos_id is not None else []
    size = min(window, tokens) - len(head)  # text tokens of a window
    count = max(1, tokens // window)
    ids = _encode(llm.tokenizer, text, size * count)
    if len(ids) + len(head) < 2:
        raise UsageError(f"the text has {len(ids)} tokens, too few to score one; give a longer text.")
    return [head + ids[i * size : (i + 1) * size] for i in range(max(1, len(ids) // size))]


def _encode(tokenizer: Tokenizer, text: str, need: int) -> list[int]:
    """The first ``need`` tokens of the text, or all of a shorter one, without BOS.

    Only a prefix is encoded: it doubles until there are enough tokens and some to spare, for those before a cut
    may differ from those of the whole text.
    """
    characters = 8 * (need + _MARGIN)
    while True:
        ids = tokenizer.encode(text[:characters], special=False, bos=False)
        if characters >= len(text) or len(ids) >= need + _MARGIN:
            return ids[:need]
        characters *= 2


def _same_tokens(a: LLM, b: LLM, ids: list[list[int]], text: str, tokens: int, window: int) -> None:
    if a.config.vocab != b.config.vocab:
        raise UsageError(
            f"{_name(a)} predicts {a.config.vocab} tokens and {_name(b)} {b.config.vocab}, so their predictions "
            "cannot be compared; choose a base model with the same tokenizer."
        )
    if _windows(b, text, tokens, window) != ids:
        raise UsageError(
            f"{_name(a)} and {_name(b)} cut the text into different tokens, so their predictions cannot be "
            "compared; choose a base model with the same tokenizer."
        )


class _ByteLengths(dict[int, int]):
    """How many UTF-8 bytes of text a token stands for, found when it is first asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> int:
        text = self.tokenizer.token_text(token)
        length = len(text.encode())
        if "\ufffd" in text:  # a part of a character, or the character U+FFFD itself
            piece = self.tokenizer.inner.id_to_token(token)
            if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece's byte tokens
                length = 1
            elif "\ufffd" not in piece:  # byte-level BPE writes each byte as one character
                length = len(piece)
        self[token] = length
        return length


# ---------------------------------------------------------------- predictions


@dataclass(frozen=True)
class _Scores:
    """Of the scored tokens of one window: float64 [tokens] each, ``same`` bool."""

    nll: F64
    base_nll: F64 | None
    kl: F64
    same: npt.NDArray[np.bool_]


def _score_window(candidate: LLM, against: LLM | None, ids: list[int], first: int) -> _Scores:
    """Scores ids[first:], each from what stands before it. Never holds more than 64 rows of logits a model."""
    count = len(ids) - first
    nll, base_nll, kl = np.empty(count), np.empty(count), np.zeros(count)
    same = np.ones(count, np.uint8)
    streams = [_predictions(m, ids, first) for m in ((candidate,) if against is None else (candidate, against))]
    at = 0
    for parts in zip(*streams, strict=True):
        span = slice(at, at + len(parts[0]))
        at = span.stop
        targets = np.array(ids[first:][span], np.int32)
        ops.nll(parts[0], targets, nll[span])
        if against is not None:
            ops.nll(parts[1], targets, base_nll[span])
            ops.divergence(parts[1], parts[0], kl[span], same[span])
    for llm, values in ((candidate, nll), (against, base_nll)):
        if llm is not None and not np.isfinite(values).all():
            raise GossamerError(
                f"{_name(llm)} predicts values that are not numbers (NaN or infinity) in {_formats(llm)}; "
                "check the checkpoint, or use a format with a larger range."
            )
    return _Scores(nll, None if against is None else base_nll, kl, same.astype(np.bool_))


def _formats(llm: LLM) -> str:
    return ", ".join(formats_used(llm.loaded))


def _perplexity(nats: float, llm: LLM) -> float:
    if nats > 700:  # exp would overflow
        raise GossamerError(
            f"{_name(llm)} in {_formats(llm)} is broken: it misses each token by {nats:.0f} nats on average; "
            "check the checkpoint, or use a format with a larger range."
        )
    return math.exp(nats)


def _predictions(llm: LLM, ids: list[int], first: int) -> Iterator[F32]:
    """Logits from which ids[first], ids[first + 1], ... are predicted: float32 [up to 64, vocabulary] each time."""
    sequence = llm.new_sequence(len(ids))
    start = 0
    for hidden in llm.feed(ids, sequence):
        low = max(first - 1 - start, 0)
        high = min(len(ids) - 1 - start, len(hidden))
        for r in range(low, high, HEAD_ROWS):
            yield llm.transformer.logits(hidden[r : min(r + HEAD_ROWS, high)])
        start += len(hidden)


def _mean(per_window: list[F64]) -> tuple[float, float | None]:
    """The mean over all tokens and its standard error over windows, which are of equal length."""
    means = np.array([w.mean() for w in per_window])
    if len(means) == 1:
        return float(means[0]), None
    return float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))
