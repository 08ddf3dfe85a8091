"""Typed calls into the compiled kernels: the only importer of ``gossamer._kernels``.

All activations are float32, C-contiguous. Outputs are arguments, so a caller can reuse its buffers. Each call
runs at once on a team of threads (``set_threads``); results do not depend on how many. What each kernel computes,
with shapes and errors, is documented in ``_kernels.pyi``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gossamer.errors import KernelError, UsageError
from gossamer.limits import default_threads

try:
    from gossamer import _kernels
except ImportError as error:  # pragma: no branch
    raise KernelError(
        f"the compiled module gossamer._kernels cannot be loaded ({error}); build it with 'make run' or "
        "'pip install .'."
    ) from error

__all__ = [
    "Kernel",
    "Weight",
    "add",
    "attention",
    "decode_rows",
    "divergence",
    "dot_peak",
    "gated",
    "isa",
    "isa_supported",
    "kv_write",
    "linear",
    "make_weight",
    "nll",
    "probe_release",
    "read_bandwidth",
    "refuse",
    "rmsnorm",
    "rope",
    "sample",
    "scale",
    "set_isa",
    "set_threads",
    "threads",
]

F32: TypeAlias = npt.NDArray[np.float32]
I32: TypeAlias = npt.NDArray[np.int32]
Weight: TypeAlias = _kernels.Weight


@dataclass(frozen=True)
class Kernel:
    """A packed matrix in the words of the kernels: see kernels/linear.h."""

    code: str
    codes: npt.NDArray[Any]
    high: npt.NDArray[Any] | None = None
    scale: str = "none"
    scales: npt.NDArray[Any] | None = None
    offset: str = "symmetric"
    offsets: npt.NDArray[Any] | None = None
    group: int = 0


def make_weight(kernel: Kernel, rows: int, cols: int, bias: F32 | None = None) -> Weight:
    """A weight that keeps its arrays alive; raises ValueError when their sizes do not fit the shape."""

    def raw(a: npt.NDArray[Any] | None) -> npt.NDArray[np.uint8] | None:
        return None if a is None else a.view(np.uint8)

    return _kernels.Weight(
        kernel.code,
        rows,
        cols,
        kernel.codes.view(np.uint8),
        raw(kernel.high),
        kernel.scale,
        raw(kernel.scales),
        kernel.offset,
        raw(kernel.offsets),
        kernel.group,
        None if bias is None else np.ascontiguousarray(bias, np.float32),
    )


def refuse(weight: Weight, input: str) -> str | None:
    """Why the kernels cannot run this weight with this input format, or None."""
    return weight.refuse(input)


def set_threads(n: int) -> None:
    """Uses ``n`` threads (1 to 256) from the next call on."""
    if not 1 <= n <= 256:
        raise UsageError(f"--threads {n} is out of range: choose 1 to 256.")
    _kernels.set_threads(n)


def set_isa(name: str) -> None:
    """Runs the kernels of one level; raises UsageError when this machine lacks it."""
    if name not in _kernels.isa_supported():
        raise UsageError(
            f"instruction set '{name}' is not one this machine runs; it has {', '.join(_kernels.isa_supported())}."
        )
    _kernels.set_isa(name)


isa = _kernels.isa
isa_supported = _kernels.isa_supported
threads = _kernels.threads
linear = _kernels.linear
decode_rows = _kernels.decode_rows
rmsnorm = _kernels.rmsnorm
rope = _kernels.rope
gated = _kernels.gated
add = _kernels.add
scale = _kernels.scale
kv_write = _kernels.kv_write
attention = _kernels.attention
sample = _kernels.sample
nll = _kernels.nll
divergence = _kernels.divergence
read_bandwidth = _kernels.read_bandwidth
dot_peak = _kernels.dot_peak
probe_release = _kernels.probe_release
if _forced := os.environ.get("GOSSAMER_ISA"):
    try:
        set_isa(_forced)
    except UsageError as error:
        raise UsageError(f"GOSSAMER_ISA is set wrongly: {error}") from None
set_threads(default_threads())
