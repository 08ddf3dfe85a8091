"""Layers run alone give bitwise what the whole model gives, and tell what their sites read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gossamer import ops
from gossamer.errors import UsageError
from gossamer.formats import parse
from gossamer.models.checkpoint import Checkpoint, open_checkpoint
from gossamer.models.layerwise import LayerRun, embed, layer_runners, layer_vectors, unpack_layer

oracle = pytest.importorskip("oracle", reason="the oracle needs torch and transformers (make env installs them)")
tiny_models = oracle.tiny_models

FAMILIES = ("Llama, biases", "Mistral, window of 31", "Qwen3", "Gemma 3, window of 24")


def prompts(vocab: int) -> list[np.ndarray]:
    """Sequences of 1, 40 and 530 tokens: more than a step, more than a window."""
    random = np.random.default_rng(3)
    return [random.integers(0, vocab, n, np.int32) for n in (1, 530, 40)]


def whole(checkpoint: Checkpoint, tokens: np.ndarray, fmt: str) -> np.ndarray:
    llm = oracle.LLM(checkpoint, format=fmt, keep=[("embed", "f32 @ f32")], kv="f32", context=len(tokens))
    return np.concatenate([h.copy() for h in llm.feed(tokens, llm.new_sequence(len(tokens)))])


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    model = next(t for t in tiny_models.TINY if t.name == request.param)
    folder = tmp_path_factory.mktemp("model")
    oracle_model = model.model()
    oracle_model.config.max_position_embeddings = 1024
    return open_checkpoint(tiny_models.write_folder(oracle_model, folder))


@pytest.mark.parametrize("fmt", ["f32 @ f32", "int4/g16 @ int8/token"])
def test_layer_by_layer_is_the_whole_model(tiny: Checkpoint, fmt: str) -> None:
    sequences = prompts(tiny.config.vocab)
    states = embed(tiny, sequences)
    for i in range(tiny.config.layers):
        runners = layer_runners(tiny, i, None, parse(fmt))
        layer = LayerRun(tiny.config, i, runners, layer_vectors(tiny, i))
        states = [layer.run(h) for h in states]
    for tokens, h in zip(sequences, states):
        assert np.array_equal(h, whole(tiny, tokens, fmt))


def test_a_tap_hears_what_the_sites_read(tiny: Checkpoint) -> None:
    """Every group once, in execution order; a site run on what was told gives what the layer computed."""
    tokens = prompts(tiny.config.vocab)[2]
    (h,) = embed(tiny, [tokens])
    heard: dict[str, np.ndarray] = {}

    def tap(name: str, x: np.ndarray) -> None:
        assert name not in heard
        heard[name] = x.copy()

    layer = LayerRun.of(tiny, 0)
    out = layer.run(h, tap)
    assert np.array_equal(out, layer.run(h))  # listening changes nothing
    sites = [s for s in tiny.topology.sites if s.layer == 0]
    assert list(heard) == list(dict.fromkeys(s.shares for s in sites))
    assert all(heard[s.shares].shape == (len(tokens), s.cols) for s in sites)
    if tiny.config.post_norms:
        return
    down = next(s for s in sites if s.role == "down")
    runners = layer_runners(tiny, 0, unpack_layer(tiny, 0))
    o = next(s for s in sites if s.role == "o")
    rebuilt = h.copy()
    for site in (o, down):
        ops.linear(heard[site.shares], [runners[site.name].site], [rebuilt], epilogue="add")
        if site is o:
            mlp = np.empty_like(h)
            ops.rmsnorm(
                rebuilt,
                tiny.vector(next(v for v in tiny.topology.vectors if v.role == "mlp_norm")),
                tiny.config.norm_eps,
                mlp,
            )
            assert np.array_equal(mlp, heard["model.layers.0.mlp.input"])
    assert np.array_equal(rebuilt, out)


def test_pieces_of_long_sequences_come_in_order(tiny: Checkpoint) -> None:
    (h,) = embed(tiny, [prompts(tiny.config.vocab)[1]])
    parts: list[np.ndarray] = []
    LayerRun.of(tiny, 0).run(h, lambda name, x: parts.append(x.copy()) if name.endswith("attn.input") else None)
    assert [len(p) for p in parts] == [512, 18]
    norm = next(v for v in tiny.topology.vectors if v.role == "attn_norm")
    normed = np.empty_like(h)
    ops.rmsnorm(h, tiny.vector(norm), tiny.config.norm_eps, normed)
    assert np.array_equal(np.concatenate(parts), normed)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "no text"), ([[]], "0 tokens"), ([[0] * 1025], "1025 tokens"), ([[3, -1]], "token -1"), ([[331]], "331")],
)
def test_what_a_model_cannot_read_is_refused(tiny: Checkpoint, tokens: list[list[int]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        embed(tiny, [np.array(t, np.int32) for t in tokens])


def test_states_of_another_width_are_refused(tiny: Checkpoint) -> None:
    with pytest.raises(UsageError, match="takes"):
        LayerRun.of(tiny, 0).run(np.zeros((3, tiny.config.hidden + 1), np.float32))


def test_smollm2(smollm2_gguf: Path) -> None:
    checkpoint, llm = open_checkpoint(smollm2_gguf), oracle.load(smollm2_gguf)
    tokens = np.arange(100, 160, dtype=np.int32)
    (h,) = embed(checkpoint, [tokens])
    for i in range(checkpoint.config.layers):
        h = LayerRun.of(checkpoint, i).run(h)
    theirs = np.concatenate([x.copy() for x in llm.feed(tokens, llm.new_sequence(len(tokens)))])
    assert np.array_equal(h, theirs)
