"""Statistics of real forward passes against transformers' own, and what calibration needs of memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from gossamer.compress.calibrate import (
    HEAD,
    advance,
    calibrate,
    calibration_bytes,
    collect,
    fingerprint,
    groups,
    head_statistics,
)
from gossamer.errors import UsageError
from gossamer.models.checkpoint import Checkpoint, open_checkpoint
from gossamer.models.layerwise import LayerRun, embed

oracle = pytest.importorskip("oracle", reason="the oracle needs torch and transformers (make env installs them)")
tiny_models, torch = oracle.tiny_models, oracle.torch

_INPUTS = {"q_proj": "self_attn.input", "o_proj": "self_attn.context", "gate_proj": "mlp.input"}
_INPUTS |= {"down_proj": "mlp.hidden"}


@pytest.fixture(scope="module", params=["Llama, biases", "Gemma 3, window of 24", "Qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[oracle.Any, Checkpoint]:
    theirs = next(t for t in tiny_models.TINY if t.name == request.param).model()
    return theirs, open_checkpoint(tiny_models.write_folder(theirs, tmp_path_factory.mktemp("model")))


def texts(vocab: int, *lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [random.integers(0, vocab, n, np.int32) for n in lengths or (90, 41, 200)]


def heard(theirs: oracle.Any, sequences: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What the oracle's linear layers read, all sequences, by the names of groups."""
    found: dict[str, list[np.ndarray]] = {}
    handles = []
    for name, module in theirs.named_modules():
        base, _, kind = name.rpartition(".")
        group = HEAD if name == "lm_head" else f"{base.rpartition('.')[0]}.{_INPUTS.get(kind)}"
        if kind in _INPUTS or name == "lm_head":
            handles.append(
                module.register_forward_hook(
                    lambda m, x, y, group=group: found.setdefault(group, []).append(x[0][0].numpy().copy())
                )
            )
    with torch.no_grad():
        for tokens in sequences:
            theirs(torch.tensor(tokens[None].astype(np.int64)))
    for handle in handles:
        handle.remove()
    return {group: np.concatenate(parts) for group, parts in found.items()}


def test_statistics_are_those_of_what_the_sites_read(model: tuple[oracle.Any, Checkpoint]) -> None:
    theirs, checkpoint = model
    sequences, steps = texts(checkpoint.config.vocab), []
    layers = list(calibrate(checkpoint, sequences, samples=60, progress=lambda *step: steps.append(step)))
    n = checkpoint.config.layers
    assert steps == [(i + 1, n) for i in range(n)]
    assert len(layers) == n + 1
    for i in range(n):
        assert list(layers[i]) == list(groups(checkpoint.topology, i))
    found = {name: s for layer in layers for name, s in layer.items()}
    expected = heard(theirs, sequences)
    assert set(found) == set(expected)
    for name, x in expected.items():
        s, exact = found[name], x.astype(np.float64)
        size = np.abs(exact).max()
        assert s.tokens == len(x)
        assert s.hessian is not None
        assert np.abs(s.hessian - exact.T @ exact / len(x)).max() <= 1e-4 * size**2
        assert np.abs(s.absmax - np.abs(x).max(axis=0)).max() <= 1e-4 * size
        assert np.abs(s.mean - exact.mean(axis=0)).max() <= 1e-4 * size
        assert np.abs(s.mean_abs - np.abs(exact).mean(axis=0)).max() <= 1e-4 * size
        assert np.abs(s.samples - x[np.arange(60) * len(x) // 60]).max() <= 1e-4 * size


def test_order_and_grouping_of_sequences_change_little(model: tuple[oracle.Any, Checkpoint]) -> None:
    _, checkpoint = model
    sequences = texts(checkpoint.config.vocab, 90, 41, 200, 512, 7)
    layer = LayerRun.of(checkpoint, 0)
    forth = collect(layer, embed(checkpoint, sequences))
    back = collect(layer, embed(checkpoint, sequences[::-1]))
    for name, s in forth.items():
        assert s.hessian is not None
        sizes = np.sqrt(np.outer(s.square, s.square)) + 1e-30
        assert np.abs((s.hessian - back[name].hessian) / sizes).max() <= 1e-6
        assert np.array_equal(s.absmax, back[name].absmax)


def test_collecting_moves_the_states_only_when_asked(model: tuple[oracle.Any, Checkpoint]) -> None:
    _, checkpoint = model
    sequences = texts(checkpoint.config.vocab)
    layer, states = LayerRun.of(checkpoint, 1), embed(checkpoint, sequences)
    before, after = [h.copy() for h in states], [layer.run(h) for h in states]
    some = collect(layer, states, hessian=False, samples=0, only={"model.layers.1.mlp.hidden"})
    assert list(some) == ["model.layers.1.mlp.hidden"]
    assert some["model.layers.1.mlp.hidden"].hessian is None
    assert all(map(np.array_equal, states, before))
    collect(layer, states, hessian=False, move=True)
    assert all(map(np.array_equal, states, after))
    advance(layer, before)
    assert all(map(np.array_equal, before, after))


def test_numbers_that_are_none_name_their_input(model: tuple[oracle.Any, Checkpoint]) -> None:
    _, checkpoint = model
    states = embed(checkpoint, texts(checkpoint.config.vocab))
    states[1][3, 4] = np.nan
    with pytest.raises(UsageError, match=r"'model.layers.0.self_attn.input': column \d+"):
        collect(LayerRun.of(checkpoint, 0), states)
    with pytest.raises(UsageError, match=f"'{HEAD}'"):
        head_statistics(checkpoint, states)


def test_tokens_of_another_tokenizer_are_refused(model: tuple[oracle.Any, Checkpoint]) -> None:
    with pytest.raises(UsageError, match="another tokenizer"):
        next(calibrate(model[1], [np.array([1, 5000], np.int32)]))


def test_memory_is_what_was_estimated(smollm2_gguf: Path) -> None:
    """Two layers of the real model over 4,096 tokens."""
    checkpoint = open_checkpoint(smollm2_gguf)
    sequences = [np.arange(512, dtype=np.int32) + i for i in range(8)]
    tracemalloc.start()
    try:
        for found in islice(calibrate(checkpoint, sequences), 2):
            found.clear()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.5 * (expected := calibration_bytes(checkpoint.config, 4096)) <= peak <= expected * 1.15


def test_a_fingerprint_tells_models_apart(model: tuple[oracle.Any, Checkpoint], tmp_path: Path) -> None:
    theirs, checkpoint = model
    first = fingerprint(checkpoint)
    assert first == fingerprint(open_checkpoint(checkpoint.path))
    weight = next(m for name, m in theirs.named_modules() if name.endswith("layers.1.mlp.up_proj")).weight
    with torch.no_grad():
        kept = weight.clone()
        weight *= 1.001
        other = open_checkpoint(tiny_models.write_folder(theirs, tmp_path))
        weight.copy_(kept)
    assert fingerprint(other) != first
    other.config = replace(checkpoint.config, norm_eps=1e-3)
    assert fingerprint(other) != first
