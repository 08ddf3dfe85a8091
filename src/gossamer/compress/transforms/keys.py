"""Scales moved from keys to queries, so that keys are easier to store in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from gossamer.compress.edits import Edited
from gossamer.compress.maps import Diagonal
from gossamer.compress.statistics import Statistics
from gossamer.compress.transforms.base import Transform
from gossamer.compress.transforms.ranges import read
from gossamer.compress.transforms.smooth import check_width
from gossamer.errors import UsageError
from gossamer.models.topology import Attention

__all__ = ["BalanceKeys", "key_sizes", "smooth_attention"]

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BalanceKeys(Transform):
    """Queries times factors and keys divided by them, equal within each rotary pair.

    ``factors`` float64 [kv_heads, head_dim / 2]; they go into the rows of the two sites. Where the model has norms over
    heads they go into those gains, which all heads share, and so must the factors: [1, head_dim / 2].
    """

    where: str  # the key site
    factors: F64

    name: ClassVar[str] = "balance keys"

    def edit(self, edited: Edited) -> None:
        attention = _attention(edited, self.where)
        normed = attention.k_norm is not None
        wanted = (1 if normed else attention.kv_heads, attention.head_dim // 2)
        if self.factors.shape != wanted:
            raise UsageError(f"the keys of '{self.where}' take factors {list(wanted)}, not {list(self.factors.shape)}.")
        whole = np.concatenate([self.factors, self.factors], axis=1).reshape(-1)
        if attention.k_norm is not None and attention.q_norm is not None:
            edited.map_gain(attention.k_norm, Diagonal(1 / whole))
            edited.map_gain(attention.q_norm, Diagonal(whole))
        else:
            edited.map_output(attention.k, Diagonal(1 / whole))
            edited.map_output(attention.q, Diagonal(attention.spread(whole)))

    def describe(self) -> str:
        low, high = self.factors.min(), self.factors.max()
        return f"smooth attention: {self.where} divided by {low:.4g} to {high:.4g}, its queries multiplied"


def smooth_attention(edited: Edited, statistics: Mapping[str, Statistics], alpha: float = 0.5) -> list[BalanceKeys]:
    """lambda = (largest key of the channel)^alpha, in every layer with statistics.

    SmoothAttention (QServe, Lin et al. 2024, section 4.2). A rotary pair shares one lambda, from the largest length of
    the pair over the sampled tokens: what either of its channels reaches at some position. Pairs that are always zero
    keep 1.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha {alpha:g} of smoothed attention is out of range: it must be between 0 and 1.")
    found = []
    for attention in edited.topology.attention:
        site = edited.topology.site(attention.k)
        if site.shares in statistics:
            check_width(statistics[site.shares], site)
            size = key_sizes(edited, attention, statistics[site.shares])
            if attention.k_norm is not None:
                size = size.max(axis=0, keepdims=True)
            found.append(BalanceKeys(attention.k, np.where(size > 0, np.maximum(size, 1e-5), 1.0) ** alpha))
    return found


def key_sizes(edited: Edited, attention: Attention, statistics: Statistics) -> F64:
    """The largest length of each rotary pair of the keys over the sampled tokens, float64 [kv_heads, head_dim / 2]."""
    site = edited.topology.site(attention.k)
    keys = (statistics.samples @ read(edited, site).T).astype(np.float64)
    bias = edited.bias(site)
    if bias is not None:
        keys += bias
    keys = keys.reshape(-1, attention.kv_heads, attention.head_dim)
    if attention.k_norm is not None:
        gain = next(edited.vector(v) for v in edited.topology.vectors if v.name == attention.k_norm)
        keys *= gain / np.sqrt(np.square(keys).mean(axis=2, keepdims=True) + edited.config.norm_eps)
    half = attention.head_dim // 2
    lengths: F64 = np.hypot(keys[:, :, :half], keys[:, :, half:])
    largest: F64 = lengths.max(axis=0)
    return largest


def _attention(edited: Edited, key: str) -> Attention:
    for attention in edited.topology.attention:
        if attention.k == key:
            return attention
    raise UsageError(f"'{key}' does not make the keys of an attention.")
