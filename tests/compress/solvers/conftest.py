"""Real sites: a layer of SmolLM2 with what they read, on text for calibration and on other text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

LENGTH = 128  # tokens of a sequence
CALIBRATION, HELD_OUT = 20, 4  # sequences


@dataclass(frozen=True)
class Real:
    """w float32 [rows, cols]; hessian E[x x^T] over the calibration tokens; held: inputs on other text."""

    name: str
    w: np.ndarray
    hessian: np.ndarray
    held: np.ndarray
    tokens: int

    def error(self, values: np.ndarray) -> float:
        """The squared output error on held-out tokens, relative to the output."""
        return float(np.square((values - self.w) @ self.held.T).sum() / np.square(self.w @ self.held.T).sum())


@pytest.fixture(scope="session")
def real(smollm2_gguf: Path) -> list[Real]:
    """The seven sites of layer 1, moved off the 4-bit grid of the file by factors between inputs and columns."""
    from pydoc_data.topics import topics

    from gossamer.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(smollm2_gguf)
    config, topology = checkpoint.config, checkpoint.topology
    prose = "\n".join(topics[name] for name in sorted(topics))  # the reference manual, which every Python carries
    ids = checkpoint.tokenizer().encode(prose[:40000])
    ids = np.array(ids[: (CALIBRATION + HELD_OUT) * LENGTH]).reshape(-1, LENGTH)
    sources = {s.name: checkpoint.source(s) for s in topology.sites}
    gains = {v.name: checkpoint.vector(v) for v in topology.vectors if v.layer in (0, 1)}
    table = sources["model.embed_tokens"]
    rng = np.random.default_rng(0)
    h = np.stack([table.read(i, i + 1)[0] for i in ids.ravel()]).reshape(*ids.shape, -1)
    found = []
    for layer in (0, 1):
        weights = {s.role: sources[s.name].read(0, s.rows) for s in topology.sites if s.layer == layer}
        inputs, h = _layer(config, weights, gains, f"model.layers.{layer}", h)
    for role, x in inputs.items():
        flat = x.reshape(-1, x.shape[-1])
        factor = np.exp(rng.uniform(np.log(0.75), np.log(1.33), x.shape[-1])).astype(np.float32)
        flat, cut = flat / factor, CALIBRATION * LENGTH
        hessian = (flat[:cut].T @ flat[:cut] / np.float32(cut)).astype(np.float32)
        found.append(Real(role, weights[role] * factor, hessian, flat[cut:], cut))
    return found


def _layer(config, weights, gains, base, h):
    """What each site of a layer reads, and the hidden states after it."""
    inputs = {}

    def norm(x, name):
        return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5) * gains[f"{base}.{name}"]

    def linear(role, x):
        inputs[role] = x
        return x @ weights[role].T

    n, length, dim = len(h), h.shape[1], config.head_dim
    x = norm(h, "input_layernorm")
    q, k, v = (linear(r, x).reshape(n, length, -1, dim).swapaxes(1, 2) for r in "qkv")
    angle = np.arange(length)[:, None] * 1e5 ** (-np.arange(0, dim, 2) / dim)
    cos, sin = (np.tile(f(angle), 2).astype(np.float32) for f in (np.cos, np.sin))

    def turn(t):
        return t * cos + np.concatenate([-t[..., dim // 2 :], t[..., : dim // 2]], axis=-1) * sin

    shared = config.heads // config.kv_heads
    q, k, v = turn(q), np.repeat(turn(k), shared, axis=1), np.repeat(v, shared, axis=1)
    score = q @ k.swapaxes(2, 3) / np.float32(np.sqrt(dim))
    score[..., np.triu(np.ones((length, length), bool), 1)] = -np.inf
    score = np.exp(score - score.max(axis=-1, keepdims=True))
    score /= score.sum(axis=-1, keepdims=True)
    h = h + linear("o", (score @ v).swapaxes(1, 2).reshape(n, length, -1))
    x = norm(h, "post_attention_layernorm")
    gate, up = linear("gate", x), linear("up", x)
    return inputs, h + linear("down", gate / (1 + np.exp(-gate)) * up)
