"""The reverse pass against torch's automatic differentiation: inputs, gradients of outputs and of weights, losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.compress import gradients
from gossamer.compress.fisher import FisherDiagonal, OutputFisher, RowSalience
from gossamer.compress.gradients import Reverse, fisher_labels, sweep
from gossamer.errors import UnsupportedError, UsageError
from gossamer.formats import ArraySource, RowSource
from gossamer.models.checkpoint import Checkpoint, open_checkpoint
from gossamer.models.family import to_hf
from gossamer.models.topology import Site

oracle = pytest.importorskip("oracle", reason="the oracle needs torch and transformers (make env installs them)")
tiny_models, torch = oracle.tiny_models, oracle.torch

TOLERANCE = 1e-4  # of the norm of a site's gradient


class Part(Checkpoint):
    """The first layers of a checkpoint, with the first tokens of its vocabulary."""

    def __init__(self, whole: Checkpoint, layers: int, vocab: int) -> None:
        self.whole, self.path, self.family = whole, whole.path, whole.family
        c = whole.config
        self.config = replace(c, layers=layers, vocab=vocab, ropes=c.ropes[:layers], windows=c.windows[:layers])

    def native(self, site: Site) -> Any:
        return self.whole.native(site)

    def source(self, site: Site) -> RowSource:
        source = self.whole.source(self.whole.topology.site(site.name))
        return ArraySource(source.read(0, site.rows))

    def vector(self, vector: Any) -> np.ndarray:
        return self.whole.vector(vector)

    def bias(self, site: Site) -> np.ndarray | None:
        return self.whole.bias(site)

    def tensors(self) -> Iterator[Any]:
        return self.whole.tensors()

    def _read_tokenizer(self) -> Any:
        return self.whole.tokenizer()


def oracle_of(checkpoint: Checkpoint) -> Any:
    """The same weights in transformers."""
    entries = to_hf(checkpoint.config)
    config = oracle.transformers.AutoConfig.for_model(**entries)
    config._attn_implementation = "eager"
    model = oracle.transformers.AutoModelForCausalLM.from_config(config).eval()
    topology, state = checkpoint.topology, {}
    for site in topology.sites:
        state[f"{site.name}.weight"] = checkpoint.source(site).read(0, site.rows)
    for vector in topology.vectors:
        gain = checkpoint.vector(vector)
        state[f"{vector.name}.weight"] = gain - np.float32(1) if checkpoint.config.norm_plus_one else gain
    missing = model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}  # where it is tied
    return model


@dataclass
class Found:
    x: np.ndarray
    dy: np.ndarray


def autograd(model: Any, tokens: np.ndarray, labels: np.ndarray) -> tuple[float, dict[str, Found], dict[str, Any]]:
    """The loss, what each linear layer reads with d(its output), and the gradients of all weights."""
    kept: dict[str, Any] = {}
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            output.retain_grad()
            kept[name] = (inputs[0], output)

        return keep

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            handles.append(module.register_forward_hook(hook(name)))
    model.zero_grad()
    logits = model(torch.from_numpy(tokens[None].astype(np.int64))).logits[0]
    target = torch.from_numpy(labels.astype(np.int64))
    loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=-1)
    loss.backward()
    for handle in handles:
        handle.remove()
    found = {name: Found(x[0].detach().numpy(), y.grad[0].numpy()) for name, (x, y) in kept.items()}
    return loss.item(), found, {name: m.weight.grad.numpy() for name, m in model.named_modules() if name in kept}


def ours(reverse: Reverse, tokens: np.ndarray, labels: Any) -> tuple[float, dict[str, Found]]:
    found: dict[str, Found] = {}

    def visit(site: Site, x: np.ndarray, dy: np.ndarray) -> None:
        assert site.name not in found
        assert x.dtype == dy.dtype == np.float32
        found[site.name] = Found(x.copy(), dy.copy())

    return reverse.run(tokens, labels, visit), found


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check(checkpoint: Checkpoint, model: Any, tokens: np.ndarray) -> None:
    next_tokens = np.append(tokens[1:], -1).astype(np.int32)
    loss, expected, weights = autograd(model, tokens, next_tokens)
    our_loss, found = ours(Reverse(checkpoint), tokens, "next")
    assert our_loss == pytest.approx(loss, rel=1e-5)
    blocks = [s for s in checkpoint.topology.sites if s.layer is not None]
    assert set(found) == set(expected) == {s.name for s in blocks}
    for site in blocks:
        f, e = found[site.name], expected[site.name]
        assert f.x.shape == (len(tokens), site.cols)
        assert f.dy.shape == (len(tokens), site.rows)
        assert distance(f.x, e.x) <= TOLERANCE, site.name
        assert distance(f.dy, e.dy) <= TOLERANCE, site.name
        assert distance(f.dy.T @ f.x, weights[site.name]) <= TOLERANCE, site.name


def random_tokens(vocab: int, n: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, n, np.int32)


@pytest.mark.parametrize("tiny", tiny_models.TINY, ids=lambda tiny: tiny.name)
def test_random_models_of_every_family(tiny: Any, tmp_path: Path) -> None:
    """Biases, norms on q and k, norms after blocks, windows that are shorter than the text, tied and untied heads."""
    model = tiny.model()
    check(open_checkpoint(tiny_models.write_folder(model, tmp_path)), model, random_tokens(tiny_models.VOCAB, 75))


def test_smollm2(smollm2_gguf: Path) -> None:
    part = Part(open_checkpoint(smollm2_gguf), 4, 8192)
    tokens = np.array([t for t in part.tokenizer().encode("It was a bright cold day in April. " * 6) if t < 8192])
    check(part, oracle_of(part), tokens.astype(np.int32))


def test_gemma3(gemma3_gguf: Path) -> None:
    """The sixth layer sees everything and has a RoPE of its own."""
    part = Part(open_checkpoint(gemma3_gguf), 7, 8192)
    check(part, oracle_of(part), random_tokens(8192, 60))


# ---------------------------------------------------------------- memory, labels, errors


@pytest.fixture(scope="module", params=["Llama, biases", "Gemma 3, window of 24"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Checkpoint]:
    model = next(t for t in tiny_models.TINY if t.name == request.param).model()
    return model, open_checkpoint(tiny_models.write_folder(model, tmp_path_factory.mktemp("model")))


def test_little_memory_changes_nothing(small: tuple[Any, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations computed again, weights read again."""
    tokens = random_tokens(tiny_models.VOCAB, 40)
    loss, expected = ours(Reverse(small[1]), tokens, "next")
    monkeypatch.setattr(gradients, "KEPT", gradients.Activations.bytes(small[1].config, 40) * 2)
    monkeypatch.setattr(gradients, "available_memory", lambda: 1000)
    reverse = Reverse(small[1])
    same_loss, found = ours(reverse, tokens, "next")
    assert len(reverse._layers) == 1
    assert same_loss == loss
    for name, e in expected.items():
        assert np.array_equal(found[name].x, e.x)
        assert np.array_equal(found[name].dy, e.dy)


def test_logits_in_pieces_are_the_same(small: tuple[Any, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(tiny_models.VOCAB, 40)
    loss, expected = ours(Reverse(small[1]), tokens, "next")
    monkeypatch.setattr(gradients, "_LOGITS", 4 * tiny_models.VOCAB * 7)
    monkeypatch.setattr(gradients, "_COLUMNS", 100)
    reverse = Reverse(small[1])
    same_loss, found = ours(reverse, tokens, "next")
    assert same_loss == pytest.approx(loss, rel=1e-6)
    for name, e in expected.items():
        assert distance(found[name].dy, e.dy) <= 1e-5
    labels = reverse.sample(tokens, 3)
    monkeypatch.undo()
    assert np.array_equal(labels, reverse.sample(tokens, 3))


def test_any_labels(small: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = small
    tokens, labels = random_tokens(tiny_models.VOCAB, 30), random_tokens(tiny_models.VOCAB, 30, 9)
    labels[[0, 7, 8]] = -1
    loss, expected, _ = autograd(model, tokens, labels)
    our_loss, found = ours(Reverse(checkpoint), tokens, labels)
    assert our_loss == pytest.approx(loss, rel=1e-5)
    for name, e in expected.items():
        assert distance(found[name].dy, e.dy) <= TOLERANCE


def test_sampled_labels_follow_the_model(small: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = small
    tokens, reverse = random_tokens(tiny_models.VOCAB, 20), Reverse(checkpoint)
    draws = np.stack([fisher_labels(reverse, tokens, seed) for seed in range(300)])
    assert np.array_equal(draws[5], fisher_labels(reverse, tokens, 5))
    with torch.no_grad():
        p = torch.softmax(model(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].double(), -1).numpy()
    for i, row in enumerate(p):
        best = int(row.argmax())
        wanted, had = row[best], float((draws[:, i] == best).mean())
        assert abs(had - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / 300) + 1e-9
    likely = np.take_along_axis(p, draws.T, axis=1)
    assert likely.mean() == pytest.approx((p**2).sum(axis=1).mean(), rel=0.1)


@pytest.mark.parametrize(
    ("tokens", "labels", "message"),
    [
        ([5, 331], "next", "token 331"),
        ([], "next", "0 tokens"),
        ([5], "next", "no label"),
        ([5, 6], [-1, -1], "no label"),
        ([5, 6], [1], "one for each"),
        ([5, 6], [1, 331], "below 331"),
        ([5, 6], [1, -2], "below 331"),
    ],
)
def test_what_has_no_loss_is_refused(
    small: tuple[Any, Checkpoint], tokens: list[int], labels: Any, message: str
) -> None:
    targets = labels if isinstance(labels, str) else np.array(labels, np.int32)
    with pytest.raises(UsageError, match=message):
        Reverse(small[1]).run(np.array(tokens, np.int32), targets, lambda *_: None)


def test_unknown_activations_are_refused(small: tuple[Any, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small[1], "config", replace(small[1].config, activation="gelu"))
    with pytest.raises(UnsupportedError, match="'gelu'"):
        Reverse(small[1])


# ---------------------------------------------------------------- what is kept of gradients


def test_accumulators_are_sums_over_sequences(small: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = small
    sequences = [random_tokens(tiny_models.VOCAB, n, n) for n in (20, 33, 41)]
    blocks = [s for s in checkpoint.topology.sites if s.layer is not None]
    random = np.random.default_rng(0)
    delta = {s.name: random.normal(0, 0.05, (s.rows, s.cols)).astype(np.float32) for s in blocks[3:9]}
    some = {s.name for s in blocks[:4]}
    fisher, part = FisherDiagonal(), FisherDiagonal(some)
    salience, outputs, moments = RowSalience(delta), OutputFisher(), OutputFisher(some, full=True)
    steps: list[tuple[int, int]] = []
    losses = sweep(
        checkpoint, sequences, [fisher, part, salience, outputs, moments], progress=lambda *s: steps.append(s)
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    wanted = [autograd(model, t, np.append(t[1:], -1).astype(np.int32)) for t in sequences]
    assert losses == pytest.approx([w[0] for w in wanted], rel=1e-5)
    diagonal, rows, squares, full = fisher.result(), salience.result(), outputs.result(), moments.moments()
    assert set(part.result()) == set(full) == some
    assert set(rows) == set(delta)
    assert outputs.moments() == {}
    for site in blocks:
        gradient = [w[2][site.name].astype(np.float64) for w in wanted]
        exact = sum(g**2 for g in gradient) / 3
        assert distance(diagonal[site.name], exact) <= 2e-4
        summed = np.concatenate([w[1][site.name].dy * len(t) for w, t in zip(wanted, sequences)]).astype(np.float64)
        assert distance(squares[site.name], (summed**2).mean(axis=0)) <= 2e-4
        if site.name in delta:
            steps_ = [(g * delta[site.name]).sum(axis=1) for g in gradient]
            assert distance(rows[site.name], sum(np.abs(d + d**2 / 2) for d in steps_)) <= 2e-4
        if site.name in some:
            assert np.array_equal(part.result()[site.name], diagonal[site.name])
            assert distance(full[site.name], summed.T @ summed / len(summed)) <= 2e-4


def test_salience_is_what_a_small_change_costs(small: tuple[Any, Checkpoint]) -> None:
    """The loss after one row's weights change, against its first-order part."""
    model, checkpoint = small
    tokens = random_tokens(tiny_models.VOCAB, 60)
    site = next(s for s in checkpoint.topology.sites if s.role == "o" and s.layer == 2)
    delta = np.random.default_rng(1).normal(0, 1e-3, (site.rows, site.cols)).astype(np.float32)
    salience = RowSalience({site.name: delta})
    (before,) = sweep(checkpoint, [tokens], [salience])
    row = int(np.argmax(salience.result()[site.name]))
    weight = model.get_submodule(site.name).weight
    labels = np.append(tokens[1:], -1).astype(np.int32)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[row] += torch.from_numpy(delta[row])
    after, _, _ = autograd(model, tokens, labels)
    with torch.no_grad():
        weight.copy_(kept)
    assert abs(after - before) == pytest.approx(salience.result()[site.name][row], rel=0.1)


def test_sampled_labels_in_a_sweep(small: tuple[Any, Checkpoint]) -> None:
    sequences = [random_tokens(tiny_models.VOCAB, 20, n) for n in range(2)]
    fisher, again, other = OutputFisher(), OutputFisher(), OutputFisher()
    losses = [sweep(small[1], sequences, [f], sampled=s) for f, s in ((fisher, 4), (again, 4), (other, 7))]
    assert losses[0] == losses[1] != losses[2]
    reverse = Reverse(small[1])
    labels = [fisher_labels(reverse, t, 4 + i) for i, t in enumerate(sequences)]
    assert losses[0] == [reverse.run(t, y, lambda *_: None) for t, y in zip(sequences, labels)]


def test_a_change_of_another_shape_is_refused(small: tuple[Any, Checkpoint]) -> None:
    site = next(s for s in small[1].topology.sites if s.role == "up")
    with pytest.raises(UsageError, match=site.name):
        sweep(small[1], [random_tokens(331, 9)], [RowSalience({site.name: np.zeros((3, 3), np.float32)})])
