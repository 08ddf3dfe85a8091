"""The Python face of a loaded model: generate, chat, stream, logits.

llm = LLM("smollm2-135m", format="int4/g32 @ int8/token")
print(llm.generate("The capital of France is", max_tokens=8).text)
for piece in llm.stream("Once upon a time", max_tokens=64):
    print(piece, end="")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.checkpoints.names import resolve
from gossamer.engine.kv import BLOCK, KVPool, kv_bytes, kv_format
from gossamer.engine.kv import Sequence as KVSequence
from gossamer.errors import ResourceError, UsageError
from gossamer.formats import SiteFormat, parse
from gossamer.formats.dispatch import Leaf
from gossamer.limits import available_memory
from gossamer.models.checkpoint import Checkpoint, open_checkpoint
from gossamer.models.config import Config
from gossamer.models.load import Choose, Loaded, Progress, load, plan
from gossamer.models.topology import Site, Topology
from gossamer.models.transformer import MAX_TOKENS

if TYPE_CHECKING:
    from gossamer.checkpoints.tokenizer import Tokenizer

__all__ = ["LLM", "Completion", "Need", "Sampling", "chat_tokens", "check_length", "chooser"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Messages = Sequence[dict[str, Any]]

DEFAULT_CONTEXT = 4096  # tokens, when the model allows as many: longer costs memory only when it is used


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    ``temperature`` 0 takes the most likely token. The filters apply in the order repetition penalty, temperature,
    top-k, top-p, min-p; 0 (top_k), 1 (top_p), 0 (min_p) and 1 (repeat_penalty) leave them out. The penalty looks at
    the last 64 tokens. Equal seeds give equal texts.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, value: object, rule: str) -> None:
            if not ok:
                raise UsageError(f"{name} {value} is out of range: it must be {rule}.")

        need(0 <= self.temperature <= 100, "temperature", self.temperature, "between 0 and 100")
        need(0 <= self.top_k < 1 << 31, "top-k", self.top_k, "0 (off) or more")
        need(0 < self.top_p <= 1, "top-p", self.top_p, "above 0 and at most 1")
        need(0 <= self.min_p <= 1, "min-p", self.min_p, "between 0 and 1")
        need(0 < self.repeat_penalty <= 100, "repeat-penalty", self.repeat_penalty, "above 0 and at most 100")
        need(0 <= self.seed < 1 << 64, "seed", self.seed, "between 0 and 2^64 - 1")


PENALTY_SPAN = 64


@dataclass
class Completion:
    """A finished answer.

    ``finish`` is "stop" (the model ended its turn), "length" (``max_tokens`` reached), "context" (no room left),
    "cancelled" (the stream was closed) or what a caller that stopped it has said, and empty while it runs.
    Times are seconds: ``prefill_s`` for the part of the prompt that was computed (``computed_tokens``), ``decode_s``
    for all tokens after the first.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    prompt_tokens: int = 0
    computed_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def prefill_tps(self) -> float:
        return self.computed_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s and len(self.tokens) > 1 else 0.0


def matching(pattern: str, topology: Topology) -> list[Site]:
    """The sites whose name matches ``pattern``, or whose role it is. Raises UsageError when there are none."""
    found = [site for site in topology.sites if fnmatchcase(site.name, pattern) or site.role == pattern]
    if not found:
        roles = ", ".join(dict.fromkeys(site.role for site in topology.sites))
        raise UsageError(
            f"the pattern '{pattern}' matches no site; give a role ({roles}) or a name such as '*.mlp.down_proj'."
        )
    return found


def chooser(fmt: SiteFormat | None, keep: Sequence[tuple[str, SiteFormat]], topology: Topology) -> Choose:
    """The format of each site: the first pattern of ``keep`` that matches its name or role, else ``fmt``.

    Raises UsageError for a pattern that matches no site of ``topology``.
    """
    chosen: dict[str, SiteFormat] = {}
    for pattern, kept in keep:
        for site in matching(pattern, topology):
            chosen.setdefault(site.name, kept)
    return lambda site: chosen.get(site.name, fmt)


@dataclass(frozen=True)
class Need:
    """Memory a model is about to take, in bytes: weights, and keys and values of a full context."""

    weights: int
    kv: int
    context: int


def _check_memory(need: Need) -> None:
    available = available_memory()
    if available is not None and need.weights + need.kv > available:
        raise ResourceError(
            f"the weights need {need.weights / 1e6:.0f} MB and {need.context} tokens of keys and values "
            f"{need.kv / 1e6:.0f} MB, but only {available / 1e6:.0f} MB are free; choose a smaller format or --context."
        )


def chat_tokens(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """The tokens of a conversation in the tokenizer's template. Raises UsageError when it has none or refuses."""
    from gossamer.checkpoints.chat import render

    eos = tokenizer.token_text(tokenizer.eos_ids[0]) if tokenizer.eos_ids else ""
    bos = tokenizer.token_text(tokenizer.bos_id) if tokenizer.bos_id is not None else ""
    return tokenizer.encode(render(tokenizer.chat_template, list(messages), bos_token=bos, eos_token=eos))


def check_length(prompt: Sequence[int], context: int, config: Config) -> None:
    """Raises UsageError for a prompt that leaves no room for an answer in a context of ``context`` tokens."""
    if len(prompt) >= context:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens and the context holds {context}; "
            f"shorten it or raise --context (up to {config.context})."
        )


class LLM:
    """A model that runs.

    Args:
        model: a known name ("smollm2-135m"), a ``.gguf`` file, a folder, or a hub id.
        format: a format expression for every linear site, or None for the checkpoint's own.
        keep: (pattern, expression) pairs that override ``format`` for matching site names or roles.
        context: most tokens of prompt and answer together; None takes the smaller of 4096 and the model's own.
        kv: how keys and values are stored: f16, f32, bf16, int8/row or uint4/row.
        threads: None uses what the process's affinity and control group allow.
        before_load: is told the memory needed before any of it is taken.

    Raises:
        GossamerError: one sentence that says what is wrong.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint = "smollm2-135m",
        *,
        format: str | None = None,
        keep: Sequence[tuple[str, str]] = (),
        context: int | None = None,
        kv: str = "f16",
        threads: int | None = None,
        progress: Progress | None = None,
        before_load: Callable[[Need], None] | None = None,
    ) -> None:
        started = time.perf_counter()
        fmt = None if format is None else parse(format)
        kept = [(pattern, parse(text)) for pattern, text in keep]
        if threads is not None:
            ops.set_threads(threads)
        self.checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(resolve(str(model)))
        self.config = self.checkpoint.config
        self.context = self._context(context)
        self.kv_format = kv_format(kv)
        self.tokenizer = self.checkpoint.tokenizer()
        chosen = plan(self.checkpoint, chooser(fmt, kept, self.checkpoint.topology))
        need = Need(chosen.data_bytes, kv_bytes(self.config, self.context, self.kv_format), self.context)
        _check_memory(need)
        if before_load:
            before_load(need)
        self.loaded: Loaded = load(self.checkpoint, chosen.formats, progress)
        self.transformer = self.loaded.transformer
        self.load_s = time.perf_counter() - started
        self._sequence: KVSequence | None = None
        self._stored: list[int] = []  # the tokens whose keys and values the sequence holds

    def _context(self, asked: int | None) -> int:
        limit = self.config.context
        if asked is None:
            return min(DEFAULT_CONTEXT, limit)
        if not 1 <= asked <= limit:
            raise UsageError(f"--context {asked} is out of range: this model was made for 1 to {limit} tokens.")
        return asked

    def explain(self, name: str) -> list[Leaf]:
        """How the site ``name`` runs: ``Loaded.explain``."""
        return self.loaded.explain(name)

    # ------------------------------------------------------------ tokens to logits

    def new_sequence(self, tokens: int) -> KVSequence:
        """An empty sequence with room for ``tokens`` tokens, in a store of its own."""
        return KVSequence(KVPool(self.config, tokens, self.kv_format, sequences=1))

    def new_batch(self, count: int, tokens: int) -> list[KVSequence]:
        """``count`` empty sequences in one store, with room for ``tokens`` tokens each."""
        if count < 1:
            raise UsageError(f"a batch of {count} sequences was asked for; it needs at least 1.")
        whole = (max(tokens, 1) + BLOCK - 1) // BLOCK * BLOCK
        pool = KVPool(self.config, count * whole, self.kv_format, sequences=count)
        return [KVSequence(pool) for _ in range(count)]

    def feed(self, tokens: Sequence[int], sequence: KVSequence) -> Iterator[F32]:
        """Runs tokens after what ``sequence`` holds, in steps of at most 512.

        Yields float32 [n, hidden], the hidden states before the last norm: views that the next step overwrites.
        """
        yield from self._feed(self._checked(tokens), sequence)

    def _feed(self, ids: I32, sequence: KVSequence) -> Iterator[F32]:
        sequence.reserve(len(ids))
        for start in range(0, len(ids), MAX_TOKENS):
            part = ids[start : start + MAX_TOKENS]
            positions = np.arange(sequence.length, sequence.length + len(part), dtype=np.int32)
            hidden = self.transformer.hidden(part, positions, sequence)
            sequence.length += len(part)
            yield hidden

    def hidden(self, tokens: Sequence[int], sequence: KVSequence) -> Iterator[F32]:
        """As ``feed``, with arrays of their own."""
        for hidden in self.feed(tokens, sequence):
            yield hidden.copy()

    def logits(self, tokens: Sequence[int]) -> F32:
        """Next-token logits after each token of a text: float32 [tokens, vocabulary]."""
        ids = self._checked(tokens)
        parts = [self.transformer.logits(h) for h in self._feed(ids, self.new_sequence(len(ids)))]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    # ------------------------------------------------------------ several sequences

    def prefill_batch(self, sequences: Sequence[KVSequence], prompts: Sequence[Sequence[int]]) -> F32:
        """Runs prompts[i] after what sequences[i] holds; the logits after the last token of each: [N, vocabulary].

        The sequences are of one store (``new_batch``), each given once. Tokens of several share a step; what a
        sequence gets is bitwise what it gets alone. The result may be overwritten by the next call.
        """
        return self._run_batch(sequences, [self._checked(p) for p in prompts])

    def decode_batch(self, sequences: Sequence[KVSequence], tokens: Sequence[int] | I32) -> F32:
        """As ``prefill_batch``, for one token of each sequence."""
        return self._run_batch(sequences, list(self._checked(tokens).reshape(-1, 1)))

    def _run_batch(self, sequences: Sequence[KVSequence], parts: list[I32]) -> F32:
        if not parts or len(sequences) != len(parts):
            raise UsageError(
                f"{len(sequences)} sequences and tokens for {len(parts)} were given; give as many, and at least one."
            )
        pool = sequences[0].pool
        if any(s.pool is not pool for s in sequences) or len({s.row for s in sequences}) != len(sequences):
            raise UsageError("a batch needs sequences of one store, each given once; make them with new_batch.")
        for s, part in zip(sequences, parts):
            s.reserve(len(part))
        counts = np.array([len(part) for part in parts])
        ends = np.cumsum(counts)
        total = int(ends[-1])
        ids = np.concatenate(parts)
        rows = np.repeat(np.array([s.row for s in sequences], np.int32), counts)
        # A token's place in the batch, less where its sequence begins, plus what that holds already.
        shift = np.array([s.length for s in sequences]) - (ends - counts)
        positions = (np.arange(total) + np.repeat(shift, counts)).astype(np.int32)
        out = np.empty((0, 0), np.float32)
        for start in range(0, total, MAX_TOKENS):
            span = slice(start, min(start + MAX_TOKENS, total))
            hidden = self.transformer.step(ids[span], positions[span], rows[span], pool)
            ending = np.flatnonzero((ends > span.start) & (ends <= span.stop))
            if not len(ending):
                continue
            logits = self.transformer.logits(hidden[ends[ending] - 1 - start], copy=False)
            if len(ending) == len(parts):
                out = logits
            else:
                if not len(out):
                    out = np.empty((len(parts), self.config.vocab), np.float32)
                out[ending] = logits
        for s, part in zip(sequences, parts):
            s.length += len(part)
        return out

    def _checked(self, tokens: Sequence[int] | I32) -> I32:
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or len(ids) == 0:
            raise UsageError("there are no tokens to run; give a prompt that is not empty.")
        if ids.min() < 0 or ids.max() >= self.config.vocab:
            raise UsageError(
                f"token {int(ids.max() if ids.min() >= 0 else ids.min())} is outside the model's {self.config.vocab} "
                "tokens; was the text encoded with another tokenizer?"
            )
        return ids.astype(np.int32)

    # ------------------------------------------------------------ text

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
    ) -> Iterator[str]:
        """Yields the answer piece by piece; ``self.last`` is its Completion, whole when the iterator has ended.

        What cannot be run is refused by the call itself, before the first piece is asked for. ``progress`` is told
        the tokens of the prompt that are computed, and how many will be.
        """
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return self._run(tokens, max_tokens, sampling or Sampling(), progress)

    def generate(
        self, prompt: str | Sequence[int], *, max_tokens: int = 256, sampling: Sampling | None = None
    ) -> Completion:
        """Continues a text (or tokens) and returns the whole answer."""
        for _ in self.stream(prompt, max_tokens=max_tokens, sampling=sampling):
            pass
        return self.last

    def chat_tokens(self, messages: Messages) -> list[int]:
        """The tokens of a conversation in the model's own template, up to where the assistant speaks."""
        return chat_tokens(self.tokenizer, messages)

    def stream_chat(
        self, messages: Messages, *, max_tokens: int = 256, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """As ``stream``, for a list of {"role": ..., "content": ...}."""
        return self.stream(self.chat_tokens(messages), max_tokens=max_tokens, sampling=sampling)

    def chat(self, messages: Messages, *, max_tokens: int = 256, sampling: Sampling | None = None) -> Completion:
        """As ``generate``, for a list of {"role": ..., "content": ...}."""
        return self.generate(self.chat_tokens(messages), max_tokens=max_tokens, sampling=sampling)

    def _run(self, prompt: list[int], max_tokens: int, sampling: Sampling, progress: Progress | None) -> Iterator[str]:
        if max_tokens < 1:
            raise UsageError(f"max-tokens {max_tokens} is out of range: it must be at least 1.")
        check_length(prompt, self.context, self.config)
        self._checked(prompt)
        self.last = Completion(prompt_tokens=len(prompt))
        return self._pieces(prompt, max_tokens, sampling, progress, self.last)

    def _pieces(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling,
        progress: Progress | None,
        result: Completion,
    ) -> Iterator[str]:
        if self._sequence is None:
            self._sequence = self.new_sequence(self.context)
        shared = _common_prefix(self._stored, prompt[:-1])
        self._sequence.truncate(shared)
        self._stored = self._stored[:shared]
        started = time.perf_counter()
        *_, hidden = self._advance(
            prompt[shared:], self._sequence, progress
        )  # at least the last prompt token is always computed
        result.computed_tokens = len(prompt) - shared
        text = self.tokenizer.stream()
        history = list(prompt)
        logits = self.transformer.logits(hidden[-1:], copy=False)[0]
        token = self._sample(logits, history, sampling, 0)
        first = time.perf_counter()
        result.prefill_s = first - started
        try:
            while True:
                if token in self.tokenizer.eos_ids:
                    result.finish = "stop"
                    break
                history.append(token)
                result.tokens.append(token)
                if piece := text.push(token):
                    result.text += piece
                    yield piece
                if len(result.tokens) == max_tokens:
                    result.finish = "length"
                    break
                if len(history) >= self.context:
                    result.finish = "context"
                    break
                (hidden,) = self._advance([token], self._sequence)
                logits = self.transformer.logits(hidden, copy=False)[0]
                token = self._sample(logits, history, sampling, len(result.tokens))
                result.decode_s = time.perf_counter() - first
            if piece := text.flush():
                result.text += piece
                yield piece
        except GeneratorExit:
            # A caller that stopped for a reason of its own has said so already.
            result.finish = result.finish or "cancelled"
            raise

    def _advance(self, tokens: list[int], sequence: KVSequence, progress: Progress | None = None) -> Iterator[F32]:
        done = 0
        for hidden in self._feed(np.array(tokens, np.int32), sequence):
            self._stored += tokens[done : done + len(hidden)]
            done += len(hidden)
            if progress:
                progress(done, len(tokens))
            yield hidden

    def _sample(self, logits: F32, history: list[int], s: Sampling, step: int) -> int:
        recent = np.array(history[-PENALTY_SPAN:] if s.repeat_penalty != 1.0 else [], np.int32)
        token, _ = ops.sample(logits, recent, s.temperature, s.top_k, s.top_p, s.min_p, s.repeat_penalty, s.seed, step)
        return int(token)


def _common_prefix(a: list[int], b: list[int]) -> int:
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n
