"""One decoder layer forward and backward in numpy, float32: linear maps with biases, RMSNorm, rotary positions, grouped
attention with a window, a gated MLP. What each step does forward is what ``models/layer.py`` does with kernels.

Arrays are float32 [tokens, width] of one sequence from position 0; d(x) stands for the gradient of the loss for x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gossamer.errors import UnsupportedError
from gossamer.models.config import Config
from gossamer.models.topology import Site

__all__ = ["Activations", "ReverseLayer", "Visit", "norm", "norm_back"]

F32 = npt.NDArray[np.float32]

Visit = Callable[[Site, F32, F32], None]  # a site, its input [n, cols], d(its output) [n, rows]


def norm(x: F32, gain: F32, eps: float) -> F32:
    """RMSNorm over the last axis."""
    return x * _inverse_rms(x, eps) * gain


def norm_back(dy: F32, x: F32, gain: F32, eps: float) -> F32:
    """d(x) of y = x r gain with r = 1 / sqrt(mean(x^2) + eps): r (t - x r mean(t x r)) with t = d(y) gain."""
    r = _inverse_rms(x, eps)
    unit, t = x * r, dy * gain
    out: F32 = r * (t - unit * np.mean(t * unit, axis=-1, keepdims=True))
    return out


def _inverse_rms(x: F32, eps: float) -> F32:
    square = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    out: F32 = 1 / np.sqrt(square + np.float32(eps))
    return out


# ---------------------------------------------------------------- the gate


def _silu(x: F32) -> tuple[F32, F32]:
    """The activation and its derivative."""
    with np.errstate(over="ignore"):  # exp of a large negative: 1 / inf = 0 is right
        s: F32 = np.exp(-x)
    s += 1
    np.reciprocal(s, out=s)
    return x * s, s * (1 + x * (1 - s))


def _gelu_tanh(x: F32) -> tuple[F32, F32]:
    c, k = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)
    x2 = x * x
    t = np.tanh(c * x * (1 + k * x2))
    half: F32 = np.float32(0.5) * (1 + t)
    slope: F32 = half + np.float32(0.5) * x * (1 - t * t) * c * (1 + 3 * k * x2)
    return x * half, slope


_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}


# ---------------------------------------------------------------- the layer


@dataclass
class Activations:
    """What a layer computed on its way forward.

    ``q``, ``k`` and ``v`` are [n, heads, d] as attention takes them, ``raw_q`` and ``raw_k`` as their sites gave them.
    ``raw_attn`` and ``raw_mlp`` are what the blocks gave before their norms, None where no norm follows.
    """

    h: F32
    x: F32
    raw_q: F32
    raw_k: F32
    q: F32
    k: F32
    v: F32
    a: F32
    raw_attn: F32 | None
    h_mid: F32
    x_mid: F32
    gate: F32
    up: F32
    gated: F32
    raw_mlp: F32 | None

    @staticmethod
    def bytes(c: Config, tokens: int) -> int:
        """About what one layer's take."""
        heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim
        return 4 * tokens * (6 * c.hidden + 3 * heads + 3 * kv_heads + 3 * c.ffn)


class ReverseLayer:
    """Layer ``index`` with its sites' ``weights`` float32 [rows, cols], ``biases`` [rows] and norms' ``vectors``."""

    def __init__(
        self,
        config: Config,
        sites: list[Site],
        weights: Mapping[str, F32],
        biases: Mapping[str, F32],
        vectors: Mapping[str, F32],
    ) -> None:
        if config.activation not in _ACTIVATIONS:
            raise UnsupportedError(
                f"gradients are not known for the activation '{config.activation}'; "
                f"they are for {' and '.join(_ACTIVATIONS)}."
            )
        index = sites[0].layer
        assert index is not None
        self.c, self.eps = config, config.norm_eps
        self.sites = {site.role: site for site in sites}
        self.w = {site.role: weights[site.name] for site in sites}
        self.b = {site.role: biases.get(site.name) for site in sites}
        self.rope, self.window = config.ropes[index], config.windows[index]
        base = f"model.layers.{index}"
        after = vectors[f"{base}.post_attention_layernorm"]
        self.attn_norm = vectors[f"{base}.input_layernorm"]
        self.mlp_norm = vectors[f"{base}.pre_feedforward_layernorm"] if config.post_norms else after
        self.attn_post = after if config.post_norms else None
        self.mlp_post = vectors[f"{base}.post_feedforward_layernorm"] if config.post_norms else None
        self.q_norm = vectors[f"{base}.self_attn.q_norm"] if config.qk_norm else None
        self.k_norm = vectors[f"{base}.self_attn.k_norm"] if config.qk_norm else None

    def _linear(self, role: str, x: F32) -> F32:
        y: F32 = x @ self.w[role].T
        bias = self.b[role]
        return y if bias is None else y + bias

    def forward(self, h: F32) -> tuple[F32, Activations]:
        """The hidden states after the layer, and what ``backward`` needs."""
        n, eps = len(h), self.eps
        x = norm(h, self.attn_norm, eps)
        raw_q, raw_k, v = (self._linear(p, x).reshape(n, -1, self.c.head_dim) for p in "qkv")
        q = raw_q if self.q_norm is None else norm(raw_q, self.q_norm, eps)
        k = raw_k if self.k_norm is None else norm(raw_k, self.k_norm, eps)
        cos, sin = self._angles(n)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        a = self._attend(q, k, v).reshape(n, -1)
        y = raw_attn = self._linear("o", a)
        if self.attn_post is not None:
            y = norm(y, self.attn_post, eps)
        h_mid = h + y
        x_mid = norm(h_mid, self.mlp_norm, eps)
        gate, up = self._linear("gate", x_mid), self._linear("up", x_mid)
        gated = _ACTIVATIONS[self.c.activation](gate)[0] * up
        y = raw_mlp = self._linear("down", gated)
        if self.mlp_post is not None:
            y = norm(y, self.mlp_post, eps)
        post = self.c.post_norms
        kept = Activations(
            h, x, raw_q, raw_k, q, k, v, a, raw_attn if post else None, h_mid, x_mid, gate, up, gated,
            raw_mlp if post else None,
        )  # fmt: skip
        return h_mid + y, kept

    def backward(self, dh: F32, s: Activations, visit: Visit, first: bool) -> F32:
        """d(h before the layer) of d(h after it); the ``first`` layer's is not needed, and d(h after) is returned."""
        n, eps, w = len(dh), self.eps, self.w
        dy = dh if s.raw_mlp is None or self.mlp_post is None else norm_back(dh, s.raw_mlp, self.mlp_post, eps)
        visit(self.sites["down"], s.gated, dy)
        d_gated = dy @ w["down"]
        value, slope = _ACTIVATIONS[self.c.activation](s.gate)
        d_gate, d_up = d_gated * s.up * slope, d_gated * value
        visit(self.sites["gate"], s.x_mid, d_gate)
        visit(self.sites["up"], s.x_mid, d_up)
        dx: F32 = d_gate @ w["gate"]
        dx += d_up @ w["up"]
        dh = dh + norm_back(dx, s.h_mid, self.mlp_norm, eps)

        dy = dh if s.raw_attn is None or self.attn_post is None else norm_back(dh, s.raw_attn, self.attn_post, eps)
        visit(self.sites["o"], s.a, dy)
        dq, dk, dv = self._attend_back((dy @ w["o"]).reshape(s.q.shape), s)
        cos, sin = self._angles(n)
        dq, dk = _rotate(dq, cos, -sin), _rotate(dk, cos, -sin)
        if self.q_norm is not None and self.k_norm is not None:
            dq = norm_back(dq, s.raw_q, self.q_norm, eps)
            dk = norm_back(dk, s.raw_k, self.k_norm, eps)
        parts = dict(zip("qkv", (d.reshape(n, -1) for d in (dq, dk, dv))))
        for role, d in parts.items():
            visit(self.sites[role], s.x, d)
        if first:
            return dh
        dx = parts["q"] @ w["q"]
        for role in "kv":
            dx += parts[role] @ w[role]
        return dh + norm_back(dx, s.h, self.attn_norm, eps)

    # ------------------------------------------------------------ attention

    def _angles(self, n: int) -> tuple[F32, F32]:
        angle = np.arange(n, dtype=np.float32)[:, None] * self.rope.inverse_frequencies(self.c.head_dim)
        return np.cos(angle)[:, None], np.sin(angle)[:, None]

    def _groups(self, q: F32, k: F32) -> Iterator[tuple[slice, int, F32]]:
        """The query heads of each key head, and their attention weights [heads, n, n]: a group at a time in memory."""
        n, each = len(q), self.c.heads // self.c.kv_heads
        distance = np.arange(n)[:, None] - np.arange(n)
        hidden = (distance < 0) | (distance >= self.window if self.window else False)
        for g in range(self.c.kv_heads):
            heads = slice(g * each, (g + 1) * each)
            p = q[:, heads].swapaxes(0, 1) @ (k[:, g].T * np.float32(self.c.scale))
            p[:, hidden] = -np.inf
            p -= p.max(axis=-1, keepdims=True)
            np.exp(p, out=p)
            p /= p.sum(axis=-1, keepdims=True)
            yield heads, g, p

    def _attend(self, q: F32, k: F32, v: F32) -> F32:
        out = np.empty(q.shape, np.float32)
        for heads, g, p in self._groups(q, k):
            out[:, heads] = (p @ v[:, g]).swapaxes(0, 1)
        return out

    def _attend_back(self, da: F32, s: Activations) -> tuple[F32, F32, F32]:
        """d(q), d(k), d(v) as attention took them."""
        dq, dk, dv = (np.empty(x.shape, np.float32) for x in (s.q, s.k, s.v))
        scale = np.float32(self.c.scale)
        for heads, g, p in self._groups(s.q, s.k):
            d = da[:, heads].swapaxes(0, 1)  # [heads, n, d]
            dv[:, g] = np.tensordot(p, d, ((0, 1), (0, 1)))
            ds = d @ s.v[:, g].T
            ds -= np.einsum("hij,hij->hi", ds, p)[..., None]
            ds *= p
            ds *= scale
            dq[:, heads] = (ds @ s.k[:, g]).swapaxes(0, 1)
            dk[:, g] = np.tensordot(ds, s.q[:, heads].swapaxes(0, 1), ((0, 1), (0, 1)))
        return dq, dk, dv


def _rotate(x: F32, cos: F32, sin: F32) -> F32:
    """Rotary positions of x [n, heads, d] by cos, sin [n, 1, d/2]; -sin rotates back."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
