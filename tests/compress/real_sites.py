"""Linear sites of a real model with the inputs they see on a real text, by a plain float32 forward pass in numpy.

Rows and columns are multiplied with factors in [0.75, 1.33] (columns of W by c, the input by 1 / c), so that weights do
not lie on the 4-bit grid that the packaged file stores them on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from gossamer.compress.statistics import Statistics
from gossamer.models.checkpoint import open_checkpoint

LAYERS = 2
LENGTH = 512  # tokens of a sequence
SEQUENCES = 10  # every fifth one is held out
TEXT = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True)
class RealSite:
    """float32 w [rows, cols], what calibration says of its input, and held-out inputs [tokens, cols]."""

    w: np.ndarray
    stats: Statistics
    fresh: np.ndarray

    def output_error(self, values: np.ndarray) -> float:
        """On held-out tokens, relative to the mean square of the output."""
        y, error = self.fresh @ self.w.T, self.fresh @ (values - self.w).T
        return float((error.astype(np.float64) ** 2).sum() / (y.astype(np.float64) ** 2).sum())


def statistics(x: np.ndarray) -> Statistics:
    """Of inputs [tokens, cols]."""
    wide = x.astype(np.float64)
    size = np.abs(x)
    hessian = wide.T @ wide / len(x)
    return Statistics(
        tokens=len(x),
        hessian=((hessian + hessian.T) / 2).astype(np.float32),
        absmax=size.max(axis=0),
        mean_abs=size.mean(axis=0),
        mean=x.mean(axis=0),
        square=np.diagonal(hessian).astype(np.float32),
        samples=x[:: max(1, len(x) // 512)][:512],
    )


@lru_cache
def real_sites(path: Path) -> dict[str, RealSite]:
    """q, o, gate and down of the last of the first LAYERS layers of a llama in GGUF."""
    model = open_checkpoint(path)
    c, topology = model.config, model.topology

    def weight(name: str) -> np.ndarray:
        site = topology.site(name)
        return model.source(site).read(0, site.rows)

    gains = {v.name: model.vector(v) for v in topology.vectors}
    text = "\n\n".join(p.read_text() for p in sorted(TEXT.glob("*.md")))
    tokens = model.tokenizer().encode(text)[: SEQUENCES * LENGTH]
    assert len(tokens) == SEQUENCES * LENGTH
    h = weight("model.embed_tokens")[tokens].reshape(-1, LENGTH, c.hidden)
    d = c.head_dim
    angle = np.arange(LENGTH)[:, None] * c.ropes[0].theta ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + c.norm_eps) * gain

    def turn(x: np.ndarray) -> np.ndarray:
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    seen: dict[str, np.ndarray] = {}
    for i in range(LAYERS):
        base = f"model.layers.{i}"
        x = norm(h, gains[f"{base}.input_layernorm"])

        def heads(role: str, count: int, x: np.ndarray = x, base: str = base) -> np.ndarray:
            y = x @ weight(f"{base}.self_attn.{role}_proj").T
            return y.reshape(len(x), LENGTH, count, d).transpose(0, 2, 1, 3)

        q, k, v = turn(heads("q", c.heads)), turn(heads("k", c.kv_heads)), heads("v", c.kv_heads)
        k, v = (np.repeat(t, c.heads // c.kv_heads, axis=1) for t in (k, v))
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(np.float32(d))
        scores += np.triu(np.full((LENGTH, LENGTH), -np.inf, np.float32), 1)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        context = (p / p.sum(axis=-1, keepdims=True)) @ v
        context = context.transpose(0, 2, 1, 3).reshape(len(x), LENGTH, -1)
        h = h + context @ weight(f"{base}.self_attn.o_proj").T
        z = norm(h, gains[f"{base}.post_attention_layernorm"])
        gate = z @ weight(f"{base}.mlp.gate_proj").T
        hidden = gate / (1 + np.exp(-gate)) * (z @ weight(f"{base}.mlp.up_proj").T)
        h = h + hidden @ weight(f"{base}.mlp.down_proj").T
        seen = {"self_attn.q_proj": x, "self_attn.o_proj": context, "mlp.gate_proj": z, "mlp.down_proj": hidden}
    found = {}
    rng = np.random.default_rng(0)
    for name, x in seen.items():
        w = weight(f"model.layers.{LAYERS - 1}.{name}")
        columns, rows = (np.exp(rng.uniform(np.log(0.75), np.log(1.33), n)) for n in (w.shape[1], w.shape[0]))
        x = (x / columns).astype(np.float32)
        w = (w * columns * rows[:, None]).astype(np.float32)
        held_out = np.arange(SEQUENCES) % 5 == 4
        stats, fresh = statistics(x[~held_out].reshape(-1, w.shape[1])), x[held_out].reshape(-1, w.shape[1])
        found[name.split(".")[1].removesuffix("_proj")] = RealSite(w, stats, fresh)
    return found
