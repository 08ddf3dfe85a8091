"""A step's results, bitwise: replayed or run at once, in chunks, beside other sequences, with any number of threads."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import configs
import numpy as np
import pytest

from gossamer import ops
from gossamer.engine.kv import KVPool, Sequence
from gossamer.errors import UsageError
from gossamer.formats import ArraySource, encode, parse
from gossamer.formats.dispatch import make_runner
from gossamer.models.config import Config
from gossamer.models.topology import describe
from gossamer.models.transformer import MAX_TOKENS, Buffers, Transformer

FORMATS = ("int4/g32 @ int8/token", "bf16", "int8/g16")


def tiny(family: str) -> Transformer:
    """A random model whose sites have different formats and inputs."""
    windowed = {"sliding_window": 24} if family in ("mistral", "gemma3") else {}
    layers = {"num_hidden_layers": 7, "vocab_size": 331} if family == "gemma3" else {"vocab_size": 331}
    config = configs.read(family, **windowed, **layers)
    random = np.random.default_rng(7)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    topology, runners = describe(config), {}
    for i, site in enumerate(topology.sites):
        fmt = parse(FORMATS[i % len(FORMATS)])
        weights = normal(site.rows, site.cols) * np.float32(2 / site.cols**0.5)
        runners[site.name] = make_runner(
            encode(fmt.weight, ArraySource(weights)), fmt, normal(site.rows) if site.bias else None
        )
    return Transformer(config, runners, {v.name: 1 + normal(v.size) / 4 for v in topology.vectors})


@pytest.fixture(scope="module", params=["gemma3", "llama", "mistral", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return tiny(request.param)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = ops.threads()
    yield
    ops.set_threads(before)


def prompt(config: Config, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab, length, np.int32)


def chunked(model: Transformer, tokens: np.ndarray, size: int, sequence: Sequence | None = None) -> np.ndarray:
    """The hidden states of one sequence, run in chunks."""
    s = sequence or Sequence(KVPool(model.config, len(tokens), sequences=1))
    parts = []
    for part in np.split(tokens, range(size, len(tokens), size)):
        s.reserve(len(part))
        parts.append(model.hidden(part, np.arange(s.length, s.length + len(part), dtype=np.int32), s).copy())
        s.length += len(part)
    return np.concatenate(parts)


@pytest.mark.parametrize("count", [1, 2, 45])
def test_replay_is_what_runs_at_once(model: Transformer, count: int) -> None:
    c = model.config
    tokens = prompt(c, count, 1)
    sequences = [Sequence(KVPool(c, count, sequences=1)) for _ in range(2)]
    for s in sequences:
        s.reserve(count)
    b = Buffers(c, count)
    b.tokens[:], b.positions[:] = tokens, np.arange(count)
    model.trace(b, sequences[0].pool)
    hidden = model.hidden(tokens, b.positions, sequences[1])
    assert np.isfinite(hidden).all()
    assert np.array_equal(hidden, b.h)
    for i in range(c.layers):
        ours, theirs = (s.pool.layer(i) for s in sequences)
        assert np.array_equal(ours.k, theirs.k)
        assert np.array_equal(ours.v, theirs.v)


def test_threads_and_chunks_change_nothing(model: Transformer) -> None:
    tokens = prompt(model.config, 150, 2)
    ops.set_threads(1)
    whole = chunked(model, tokens, len(tokens))
    for threads in (1, 2, 3):
        ops.set_threads(threads)
        for size in (1, 7, 64, 150):
            assert np.array_equal(chunked(model, tokens, size), whole), (threads, size)


@pytest.mark.parametrize("count", [2, 7, 32])
def test_what_shares_a_step_changes_nothing(model: Transformer, count: int) -> None:
    """Prompts of several lengths and single tokens of sequences that are under way, in one step."""
    c = model.config
    alone, tokens, taken = [], [], [0] * count
    for i in range(count):
        tokens.append(prompt(c, 40 + i % 3, 100 + i))
        alone.append(chunked(model, tokens[i], 64))
    pool = KVPool(c, count * 64, sequences=count)
    sequences = [Sequence(pool) for _ in range(count)]
    for step in range(4):
        sizes = [1 if (i + step) % 2 else 3 + i % 7 for i in range(count)]
        parts = [t[n : n + size] for t, n, size in zip(tokens, taken, sizes)]
        positions = [np.arange(n, n + len(p), dtype=np.int32) for n, p in zip(taken, parts)]
        rows = [np.full(len(p), s.row, np.int32) for s, p in zip(sequences, parts)]
        order = np.random.default_rng(step).permutation(count)
        for s, p in zip(sequences, parts):
            s.reserve(len(p))
            s.length += len(p)
        got = model.step(*(np.concatenate([x[i] for i in order]) for x in (parts, positions, rows)), pool)
        at = 0
        for i in order:
            n = len(parts[i])
            assert np.array_equal(got[at : at + n], alone[i][taken[i] : taken[i] + n]), (step, i)
            taken[i] += n
            at += n


def test_logits_of_many_rows_are_those_of_each(model: Transformer) -> None:
    hidden = chunked(model, prompt(model.config, 150, 3), 150)
    whole = model.logits(hidden)
    assert whole.shape == (150, model.config.vocab)
    for rows in (slice(0, 1), slice(60, 67), slice(149, 150)):
        assert np.array_equal(model.logits(hidden[rows]), whole[rows])
        assert np.array_equal(model.logits(hidden[rows], copy=False), whole[rows])
    kept = model.logits(hidden[:2])
    model.logits(hidden[5:7])
    assert np.array_equal(kept, whole[:2])


def test_steps_of_no_or_too_many_tokens(model: Transformer) -> None:
    pool = KVPool(model.config, 1024)
    row = Sequence(pool).row
    for count in (0, MAX_TOKENS + 1):
        with pytest.raises(UsageError, match=f"{count} tokens"):
            model.step(np.zeros(count, np.int32), np.arange(count, dtype=np.int32), row, pool)


def test_a_step_into_room_that_was_not_reserved_is_refused(model: Transformer) -> None:
    s = Sequence(KVPool(model.config, 64))
    with pytest.raises(ValueError, match="block"):
        model.hidden(np.zeros(3, np.int32), np.arange(3, dtype=np.int32), s)


def test_a_store_that_is_gone_takes_its_program_along() -> None:
    model = tiny("llama")
    s = Sequence(KVPool(model.config, 32))
    keys = weakref.ref(s.pool.layer(0).k)
    chunked(model, prompt(model.config, 5, 0), 5, s)
    del s
    gc.collect()
    assert keys() is None
