"""Texts to calibrate on: the model's own, files, and what is refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gossamer import LLM
from gossamer.compress import calibration_text as module
from gossamer.compress.calibration_text import calibration_text, provenance
from gossamer.engine.llm import Sampling
from gossamer.errors import GossamerError, UsageError
from gossamer.models.checkpoint import Checkpoint, open_checkpoint

PROSE = "The quick brown fox jumps over the lazy dog, and nobody is surprised.\n"


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Checkpoint:
    return open_checkpoint(smollm2_gguf)


@pytest.fixture
def prose(tmp_path: Path) -> str:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE * 40, encoding="utf-8")
    return str(path)


def test_a_model_writes_its_own_text(smollm2: Checkpoint) -> None:
    """What a lone sequence gets from the engine with the same seed, up to the first end of a text."""
    steps: list[tuple[int, int]] = []
    found = calibration_text(smollm2, tokens=70, length=24, seed=7, progress=lambda *step: steps.append(step))
    assert [s.shape for s in found.sequences] == [(24,)] * 3
    assert found.tokens == 72
    assert steps == [(3 * (i + 1), 72) for i in range(24)]
    assert found.description == "text the model wrote itself, seed 7"
    llm = LLM(smollm2, context=64)
    newline = llm.tokenizer.encode("\n")
    for i, ids in enumerate(found.sequences):
        assert list(ids[: len(newline)]) == newline
        ends = np.flatnonzero(np.isin(ids, llm.tokenizer.eos_ids))
        for end in ends[ends < 23]:
            assert ids[end + 1] == newline[0]
        alone = list(newline)
        seed, until = (7 << 32) + i, int(ends[0]) if len(ends) else 24
        while len(alone) < until:
            *_, h = llm.feed(alone, llm.new_sequence(len(alone)))
            logits = llm.transformer.logits(h[-1:])[0]
            alone.append(llm._sample(logits, [], Sampling(temperature=1.0, seed=seed), len(alone)))
        assert list(ids[:until]) == alone


def test_equal_seeds_give_equal_texts(smollm2: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    first = calibration_text(smollm2, tokens=40, length=8)
    monkeypatch.setattr(module, "_BATCH", 2)
    again = calibration_text(smollm2, tokens=40, length=8)
    assert all(map(np.array_equal, first.sequences, again.sequences))
    assert first.sha256 == again.sha256
    digest = hashlib.sha256(b"5x8\n" + np.stack(first.sequences).astype("<i4").tobytes())
    assert first.sha256 == digest.hexdigest()
    other = calibration_text(smollm2, tokens=40, length=8, seed=1)
    assert other.sha256 != first.sha256
    assert len({s.tobytes() for s in first.sequences + other.sequences}) == 10


def test_a_text_goes_on_after_its_end(smollm2: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = smollm2.tokenizer()
    monkeypatch.setattr(module, "_sample", lambda *_: tokenizer.eos_ids[0])
    (ids,) = calibration_text(smollm2, tokens=6, length=6).sequences
    assert list(ids) == [*tokenizer.encode("\n"), tokenizer.eos_ids[0]] * 3


def test_a_model_with_a_first_token_begins_with_it(smollm2: Checkpoint, prose: str) -> None:
    tokenizer = smollm2.tokenizer()
    tokenizer.add_bos = True
    try:
        own = calibration_text(smollm2, tokens=8, length=8).sequences
        cut = calibration_text(smollm2, prose, tokens=40, length=20).sequences
    finally:
        tokenizer.add_bos = False
    assert own[0][0] == tokenizer.bos_id
    plain = tokenizer.encode(PROSE * 3)
    assert [list(s) for s in cut] == [[tokenizer.bos_id, *plain[:19]], [tokenizer.bos_id, *plain[19:38]]]


def test_a_file_is_cut_into_sequences(smollm2: Checkpoint, prose: str) -> None:
    found = calibration_text(smollm2, prose, tokens=100, length=30)
    assert np.concatenate(found.sequences).tolist() == smollm2.tokenizer().encode(PROSE * 40)[:120]
    assert [len(s) for s in found.sequences] == [30] * 4
    assert found.sequences[0].dtype == np.int32
    assert found.description == "prose.txt"
    about = provenance(smollm2, found)
    assert (about["tokens"], about["length"], about["text"]) == (120, 30, found.sha256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "sequences of 1 tokens"),
        ({"length": 9000}, "2 to 8192"),
        ({"tokens": 511}, "511 calibration tokens"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1 << 32}, "seed 4294967296"),
        ({"tokens": 4096}, r"the text '.*prose.txt' has 640 tokens, and calibration asks for 4,096"),
    ],
)
def test_numbers_that_cannot_work_are_refused(
    smollm2: Checkpoint, prose: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        calibration_text(smollm2, prose, **options)


def test_texts_that_are_not_there_are_refused(smollm2: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UsageError, match="0 tokens"):
        calibration_text(smollm2, str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="there is no text"):
        calibration_text(smollm2, str(tmp_path / "none"))


def test_a_tokenizer_of_another_model_is_refused(
    smollm2: Checkpoint, prose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "config", replace(smollm2.config, vocab=100))
    with pytest.raises(UsageError, match="tokenizer and weights from one model"):
        calibration_text(smollm2, prose, tokens=60, length=30)


def test_predictions_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(GossamerError, match="not numbers"):
        module._sample(np.full(8, np.nan, np.float32), np.zeros(0, np.int32), 0, 0)
