"""Which kernel runs a site, and why the others do not. A pure function of format, shape and input.

``Runner`` is what a model calls: a fused kernel when one takes the format, else decode once and multiply in
float32, which is correct for every format and named by ``inspect`` and ``bench`` as unfused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.formats.dense import Dense
from gossamer.formats.expression import SiteFormat
from gossamer.formats.node import ArraySource, Packed, encode

__all__ = ["Runner", "make_runner"]

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Runner:
    """A linear site ready to run: the compiled weight, its input format, and why it is unfused (or None)."""

    weight: ops.Weight
    input: str
    packed: Packed
    refused: str | None

    @property
    def rows(self) -> int:
        return self.packed.shape[0]

    def look_up(self, ids: npt.NDArray[np.int64]) -> F32:
        """Rows ``ids`` of the matrix: float32 [n, columns]. A tied table is looked up and multiplied with."""
        out = np.empty((len(ids), self.packed.shape[1]), np.float32)
        ops.decode_rows(self.weight, ids, out)
        return out


def make_runner(packed: Packed, fmt: SiteFormat, bias: F32 | None = None) -> Runner:
    """Picks the kernel for a packed matrix. ``bias`` is float32 [rows] or None."""
    rows, cols = packed.shape
    kernel = packed.format.kernel(packed.arrays, rows, cols)
    refused: str | None
    if kernel is None:
        refused = f"no kernel reads {packed.format}"
    else:
        weight = ops.make_weight(kernel, rows, cols, bias)
        refused = ops.refuse(weight, fmt.input)
        if refused is None:
            return Runner(weight, fmt.input, packed, None)
    plain = encode(Dense("f32"), ArraySource(packed.decode()))
    kernel = plain.format.kernel(plain.arrays, rows, cols)
    assert kernel is not None  # plain float32 always has a kernel
    return Runner(ops.make_weight(kernel, rows, cols, bias), "f32", packed, refused)


def linear(runners: list[Runner], x: F32, outs: list[npt.NDArray[Any]]) -> None:
    """outs[i] = x W_i^T + b_i for sites that share their input; one call for each input format among them."""
    if all(r.input == runners[0].input for r in runners):
        ops.linear(x, [r.weight for r in runners], outs, runners[0].input)
        return
    for runner, out in zip(runners, outs):
        ops.linear(x, [runner.weight], [out], runner.input)
