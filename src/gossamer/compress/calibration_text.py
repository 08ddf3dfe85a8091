"""The text a model is calibrated on: what the model itself writes (nothing to download), a named text, or a file.

    self                 sampled from the model at temperature 1 with a fixed seed (as LLM-QAT does, Liu et al. 2023)
    boolq, emma, ...     the texts of ``gossamer.evaluate.texts``
    anything else        the path of a UTF-8 file

Sequences have equal lengths and run from an empty context, as the windows of an evaluation do; where the model's
tokenizer begins a text with a token (BOS), that token is the first of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.compress.calibrate import fingerprint
from gossamer.errors import GossamerError, UsageError
from gossamer.evaluate.windows import encode_start
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.load import Progress

if TYPE_CHECKING:
    from gossamer.checkpoints.tokenizer import Tokenizer
    from gossamer.engine.llm import LLM

__all__ = ["LENGTH", "SELF", "TOKENS", "CalibrationText", "calibration_text", "provenance"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

SELF = "self"
TOKENS, LENGTH = 65536, 512  # of all sequences, and of each, unless other numbers are asked for
_BATCH = 32  # sequences that the model writes at once; what it writes does not depend on it
_KV_BYTES = 1 << 30  # of keys and values at once: fewer sequences where these are large


@dataclass(frozen=True)
class CalibrationText:
    """Token ids, int32 [length] for each sequence, where they come from in a few words, and the SHA-256 of the ids
    (little-endian, after the shape)."""

    sequences: list[I32]
    description: str
    sha256: str

    @property
    def tokens(self) -> int:
        return sum(len(s) for s in self.sequences)


def calibration_text(
    checkpoint: Checkpoint,
    source: str = SELF,
    *,
    tokens: int = TOKENS,
    length: int = LENGTH,
    seed: int = 0,
    fmt: str | None = None,
    progress: Progress | None = None,
) -> CalibrationText:
    """Sequences of ``length`` tokens, ``tokens`` in all (rounded up to whole sequences).

    ``seed`` (0 to 2^32 - 1) and ``fmt``, the format expression the model runs in while it writes (None: the
    checkpoint's own), matter to ``self`` alone; ``progress`` is told the tokens written and in all.

    Raises UsageError for numbers that cannot work, a text that is not there or too short, and tokens that the model
    does not have (a tokenizer of another model); ResourceError when the model does not fit into memory.
    """
    if not 2 <= length <= checkpoint.config.context:
        raise UsageError(
            f"calibration sequences of {length} tokens were asked for; this model takes 2 to "
            f"{checkpoint.config.context}."
        )
    if tokens < length:
        raise UsageError(f"{tokens} calibration tokens do not fill one sequence of {length}; ask for more.")
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"seed {seed} is out of range: it must be between 0 and 2^32 - 1.")
    count = -(-tokens // length)
    if source == SELF:
        description = f"text the model wrote itself, seed {seed}" + (f", in {fmt}" if fmt else "")
        sequences = _written(checkpoint, count, length, seed, fmt, progress)
    else:
        from gossamer.evaluate.texts import text

        found = text(source)
        description = found.description
        sequences = _cut(checkpoint.tokenizer(), found.text, count, length, source)
    _check_vocabulary(sequences, checkpoint)
    digest = hashlib.sha256(f"{count}x{length}\n".encode())
    for ids in sequences:
        digest.update(ids.astype("<i4").tobytes())
    return CalibrationText(sequences, description, digest.hexdigest())


def provenance(checkpoint: Checkpoint, text: CalibrationText) -> dict[str, Any]:
    """What statistics are of, for ``save_statistics``: hashes of model, tokenizer and text, and the text's size."""
    return {
        "model": fingerprint(checkpoint),
        "tokenizer": hashlib.sha256(checkpoint.tokenizer().to_json().encode()).hexdigest(),
        "text": text.sha256,
        "tokens": text.tokens,
        "length": len(text.sequences[0]),
    }


def _check_vocabulary(sequences: Sequence[I32], checkpoint: Checkpoint) -> None:
    highest = max(int(ids.max()) for ids in sequences)
    if highest >= checkpoint.config.vocab:
        raise UsageError(
            f"the tokenizer of {checkpoint.path.name} gives token {highest}, but the model has "
            f"{checkpoint.config.vocab} tokens; take tokenizer and weights from one model."
        )


# ---------------------------------------------------------------- a text that is there


def _cut(tokenizer: Tokenizer, text: str, count: int, length: int, source: str) -> list[I32]:
    head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    size = length - len(head)
    ids = encode_start(tokenizer, text, count * size)
    if len(ids) < count * size:
        raise UsageError(
            f"the text '{source}' has {len(ids):,} tokens, and calibration asks for {count * size:,}; "
            "give a longer text or ask for fewer tokens."
        )
    return [np.array(head + ids[i * size : (i + 1) * size], np.int32) for i in range(count)]


# ---------------------------------------------------------------- a text the model writes


def _written(
    checkpoint: Checkpoint, count: int, length: int, seed: int, fmt: str | None, progress: Progress | None
) -> list[I32]:
    from gossamer.engine.kv import kv_bytes
    from gossamer.engine.llm import LLM

    llm = LLM(checkpoint, format=fmt, context=length)
    opening = _opening(llm.tokenizer)
    batch = max(1, min(_BATCH, _KV_BYTES // kv_bytes(llm.config, length, llm.kv_format)))
    sequences: list[I32] = []
    while (first := len(sequences)) < count:
        seeds = [(seed << 32) + i for i in range(first, min(first + batch, count))]
        ids = np.empty((len(seeds), length), np.int32)
        for step in _write(llm, opening, seeds, ids):
            if progress:
                progress(first * length + step * len(seeds), count * length)
        sequences += list(ids)
    return sequences


def _opening(tokenizer: Tokenizer) -> list[int]:
    """What a text begins with, and the next one after an end: BOS where the model's texts have one, or a new line."""
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    newline = tokenizer.encode("\n", bos=False)
    if not newline:
        raise UsageError(
            "this model's tokenizer has no token for a new line to begin a text of its own with; "
            "give a text to calibrate on."
        )
    return newline


def _write(llm: LLM, opening: Sequence[int], seeds: Sequence[int], ids: I32) -> Iterator[int]:
    """Fills ``ids`` [sequences, length], one sampled text a seed; yields the tokens of each that are there so far."""
    count, length = ids.shape
    sequences = llm.new_batch(count, length)
    given = [list(opening) for _ in seeds]  # what each sequence goes on with before the model is asked
    none = np.zeros(0, np.int32)
    logits: F32 | None = None
    for step in range(length):
        for i, seed in enumerate(seeds):
            if given[i]:
                ids[i, step] = given[i].pop(0)
                continue
            assert logits is not None  # a text has an opening
            ids[i, step] = token = _sample(logits[i], none, seed, step)
            if token in llm.tokenizer.eos_ids:
                given[i] = list(opening)
        yield step + 1
        if step + 1 < length:
            logits = llm.decode_batch(sequences, ids[:, step].copy())


def _sample(logits: F32, recent: I32, seed: int, step: int) -> int:
    try:
        token, _ = ops.sample(logits, recent, 1.0, 0, 1.0, 0.0, 1.0, seed, step)
    except RuntimeError:
        raise GossamerError(
            "the model predicts values that are not numbers (NaN or infinity), so it cannot write its own text; "
            "check the checkpoint."
        ) from None
    return int(token)
