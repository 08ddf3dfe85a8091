"""How likely a model finds given continuations of given contexts, many at once.

Each distinct context is computed once for up to MEMBERS continuations: these run after it in turn, and the keys and
values are cut back to the context in between. Several contexts share every step. What a pair gets does not depend on
what else is asked, nor in which order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.checkpoints.tokenizer import Tokenizer
from gossamer.engine.kv import BLOCK, KVPool
from gossamer.engine.kv import Sequence as KVSequence
from gossamer.engine.llm import LLM
from gossamer.errors import GossamerError, UsageError
from gossamer.models.load import Progress
from gossamer.models.transformer import HEAD_ROWS, MAX_TOKENS

__all__ = ["Pair", "Scored", "encode_pair", "loglikelihoods"]

F32 = npt.NDArray[np.float32]

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of the context, at least one, and of the continuation

MEMBERS = 8  # continuations that run after one computed context; more compute it again
LANES = 32  # contexts in memory at once
TOKENS = 4096  # room for keys and values, unless one pair needs more


@dataclass(frozen=True)
class Scored:
    """``logprob`` is the sum over the continuation's ``tokens`` tokens in nats; ``greedy``: each was the likeliest."""

    logprob: float
    tokens: int
    greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, *, special: bool = False) -> Pair:
    """The tokens of both, cut where the context's own tokens end; spaces that end the context go to the other.

    An empty context becomes the token that begins or ends a text, as in the lm-evaluation-harness. ``special`` reads
    special tokens that are written in the text as such.
    """
    kept = context.rstrip()
    context, continuation = kept, context[len(kept) :] + continuation
    if not context:
        begin = tokenizer.bos_id if tokenizer.bos_id is not None else next(iter(tokenizer.eos_ids), None)
        if begin is None:
            raise UsageError("this tokenizer has no token that begins or ends a text, so the context may not be empty.")
        return [begin], tokenizer.encode(continuation, special=special, bos=False)
    head = tokenizer.encode(context, special=special)
    return head, tokenizer.encode(context + continuation, special=special)[len(head) :]


def loglikelihoods(llm: LLM, pairs: Sequence[Pair], *, progress: Progress | None = None) -> list[Scored]:
    """Scores each continuation after its context: results in the order of ``pairs``.

    Raises UsageError for an empty context or continuation and for a pair longer than the model's context, and
    GossamerError when the model gives predictions that are no numbers.
    """
    for context, continuation in pairs:
        if not len(context) or not len(continuation):
            raise UsageError("a context and its continuation need at least one token each to be scored.")
        if len(context) + len(continuation) - 1 > llm.config.context:  # the last token is only predicted
            raise UsageError(
                f"{len(context)} tokens with {len(continuation)} after them were to be scored, but the model was made "
                f"for {llm.config.context}; leave out the long ones."
            )
        if not all(0 <= token < llm.config.vocab for tokens in (context, continuation) for token in tokens):
            raise UsageError(
                f"a token is outside the model's {llm.config.vocab}; was the text encoded with another tokenizer?"
            )
    lanes = _lanes(pairs)
    if not lanes:
        return []
    room = max(TOKENS, max(lane.room for lane in lanes))
    pool = KVPool(llm.config, room, llm.kv_format, sequences=LANES)
    results: list[Scored | None] = [None] * len(pairs)
    done = 0
    for batch in _batches(lanes, room):
        sequences = [KVSequence(pool) for _ in batch]
        for index, scored in _run(llm, batch, sequences, pairs):
            results[index] = scored
            done += 1
        for sequence in sequences:
            sequence.close()
        if progress:
            progress(done, len(pairs))
    return [r for r in results if r is not None]


@dataclass
class _Lane:
    """A context and which pairs use it."""

    context: tuple[int, ...]
    members: list[int] = field(default_factory=list)
    room: int = 0  # tokens of keys and values, in whole blocks


def _lanes(pairs: Sequence[Pair]) -> list[_Lane]:
    lanes: list[_Lane] = []
    filling: dict[tuple[int, ...], _Lane] = {}
    for index, (context, continuation) in enumerate(pairs):
        key = tuple(context)
        lane = filling.get(key)
        if lane is None or len(lane.members) == MEMBERS:
            lane = filling[key] = _Lane(key)
            lanes.append(lane)
        lane.members.append(index)
        tokens = len(context) + len(continuation) - 1
        lane.room = max(lane.room, -(-tokens // BLOCK) * BLOCK)
    return lanes


def _batches(lanes: Sequence[_Lane], room: int) -> Iterator[list[_Lane]]:
    batch: list[_Lane] = []
    free = room
    for lane in lanes:
        if batch and (lane.room > free or len(batch) == LANES):
            yield batch
            batch, free = [], room
        batch.append(lane)
        free -= lane.room
    if batch:
        yield batch


def _run(
    llm: LLM, batch: Sequence[_Lane], sequences: Sequence[KVSequence], pairs: Sequence[Pair]
) -> Iterator[tuple[int, Scored]]:
    last = [hidden[-1:] for hidden in _feed(llm, sequences, [lane.context for lane in batch])]
    for turn in range(max(len(lane.members) for lane in batch)):
        members = [(i, lane.members[turn]) for i, lane in enumerate(batch) if turn < len(lane.members)]
        hidden = {i: [last[i]] for i, _ in members}
        longer = [(i, pairs[index][1]) for i, index in members if len(pairs[index][1]) > 1]
        fed = _feed(llm, [sequences[i] for i, _ in longer], [c[:-1] for _, c in longer])
        for (i, _), rows in zip(longer, fed):
            hidden[i].append(rows)
            sequences[i].truncate(len(batch[i].context))
        targets = np.concatenate([np.asarray(pairs[index][1], np.int32) for _, index in members])
        nll, greedy = _judge(llm, np.concatenate([rows for i, _ in members for rows in hidden[i]]), targets)
        at = 0
        for _, index in members:
            span = slice(at, at + len(pairs[index][1]))
            at = span.stop
            yield index, Scored(-float(nll[span].sum()), span.stop - span.start, bool(greedy[span].all()))


def _feed(llm: LLM, sequences: Sequence[KVSequence], parts: Sequence[Sequence[int]]) -> list[F32]:
    """Runs parts[i] after what sequences[i] holds, of one pool; hidden states float32 [len(parts[i]), hidden] each."""
    if not sequences:
        return []
    for sequence, part in zip(sequences, parts):
        sequence.reserve(len(part))
    counts = [len(part) for part in parts]
    ids = np.concatenate([np.asarray(part, np.int32) for part in parts])
    rows = np.repeat(np.array([s.row for s in sequences], np.int32), counts)
    positions = np.concatenate([np.arange(s.length, s.length + n) for s, n in zip(sequences, counts)]).astype(np.int32)
    out = np.empty((len(ids), llm.config.hidden), np.float32)
    for start in range(0, len(ids), MAX_TOKENS):
        span = slice(start, min(start + MAX_TOKENS, len(ids)))
        out[span] = llm.transformer.step(ids[span], positions[span], rows[span], sequences[0].pool)
    for sequence, count in zip(sequences, counts):
        sequence.length += count
    return np.split(out, np.cumsum(counts)[:-1])


def _judge(
    llm: LLM, hidden: F32, targets: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Minus the log-probability of each target, and whether it was the likeliest token."""
    nll, greedy = np.empty(len(targets)), np.empty(len(targets), np.bool_)
    for start in range(0, len(targets), HEAD_ROWS):
        span = slice(start, min(start + HEAD_ROWS, len(targets)))
        logits = llm.transformer.logits(hidden[span], copy=False)
        ops.nll(logits, targets[span], nll[span])
        greedy[span] = logits.argmax(axis=1) == targets[span]
    if not np.isfinite(nll).all():
        raise GossamerError(
            f"{llm.checkpoint.path.name} predicts values that are not numbers (NaN or infinity); check the checkpoint, "
            "or use a format with a larger range."
        )
    return nll, greedy
