"""Typed calls into the compiled kernels: the only importer of ``gossamer._kernels``.

All activations are float32, C-contiguous. Outputs are arguments, so a caller can reuse its buffers. A call runs at
once on a team of threads (``set_threads``), or becomes a step of the program that this thread records (``record``);
results depend neither on which nor on how many threads. What each kernel computes, with shapes and errors, is
documented in ``_kernels.pyi``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    "Input",
    "Kernel",
    "Mask",
    "Program",
    "Scales",
    "Site",
    "Weight",
    "add",
    "angles",
    "attention",
    "decode_rows",
    "divergence",
    "dot_peak",
    "embed",
    "fwht",
    "gated",
    "isa",
    "isa_supported",
    "kv_write",
    "linear",
    "make_weight",
    "nll",
    "planes_linear",
    "planes_paths",
    "planes_sums",
    "probe_release",
    "read_bandwidth",
    "record",
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
Program: TypeAlias = _kernels.Program
Input: TypeAlias = _kernels.Input
Mask: TypeAlias = _kernels.Mask
Site: TypeAlias = _kernels.Site


@dataclass(frozen=True)
class Scales:
    """The scales or minima of a packed matrix: [rows or row tiles, groups], see docs/formats.md.

    ``kind``: "f32", "f16", "bf16", "e8m0", "e4m3" with ``values``, or "nested" with the matrix ``nested``.
    """

    kind: str
    values: npt.NDArray[Any] | None = None
    nested: Kernel | None = None


@dataclass(frozen=True)
class Kernel:
    """A packed matrix in the words of the kernels; arrays as docs/formats.md lays them out.

    A stored weight is s * value(c), s * (c - z) with ``zeros``, or s * c - m with ``mins``, in float32.
    """

    code: str  # "f32", "f16", "bf16", or "u1" to "u8": the bits of a stored code
    values: npt.NDArray[Any] | None = None  # dense
    q8: npt.NDArray[Any] | None = None  # the fields of a code
    q4: npt.NDArray[Any] | None = None
    q2: npt.NDArray[Any] | None = None
    q1: npt.NDArray[Any] | None = None
    zero: float = 0  # value(c) = step * c - zero without a table
    step: float = 1
    table: npt.NDArray[Any] | None = None  # value(c): float32 [2^B], or per row [panel][2^B][16 rows]
    table_per_row: bool = False
    group: int = 0  # columns per group (a row: its padded width); 0: dense
    tile_rows: int = 1  # rows that share a scale: 1, a multiple of 16, or the padded row count
    scales: Scales | None = None  # None: dense, kmeans
    zeros: npt.NDArray[Any] | None = None  # stored zero points
    zero_bits: int = 0  # 4 or 8
    mins: Scales | None = None


def make_weight(kernel: Kernel, rows: int, cols: int) -> Weight:
    """A weight that keeps its arrays alive; raises ValueError when their sizes do not fit the shape."""

    def raw(a: npt.NDArray[Any] | None) -> npt.NDArray[np.uint8] | None:
        return None if a is None else a.view(np.uint8)

    arrays: dict[str, Any] = {name: raw(getattr(kernel, name)) for name in ("values", "q8", "q4", "q2", "q1", "zeros")}
    arrays |= {"step": kernel.step, "zero": kernel.zero, "group": kernel.group, "tile_rows": kernel.tile_rows}
    arrays |= {"zero_bits": kernel.zero_bits, "table_per_row": int(kernel.table_per_row)}
    if kernel.table is not None:
        arrays["table"] = np.require(kernel.table, np.float32, ["C", "A"]).ravel()
    groups = -(-cols // kernel.group) if kernel.group else 1
    for name, kind, scales in (("scales", "scale", kernel.scales), ("mins", "min", kernel.mins)):
        if scales is not None:
            arrays |= {kind: scales.kind, name: raw(scales.values)}
            if scales.nested is not None:
                arrays[f"{name}_nested"] = make_weight(scales.nested, -(-rows // kernel.tile_rows), groups)
    return Weight(kernel.code, rows, cols, arrays)


def linear(
    x: F32,
    sites: list[Site],
    outs: list[F32],
    extras: list[list[F32]] | None = None,
    gain: F32 | None = None,
    eps: float = 0.0,
    epilogue: str = "store",
) -> None:
    """outs[i] = x W_i^T + b_i for sites that share their input x float32 [tokens, cols].

    With ``gain`` [cols], x is normalised first (``rmsnorm``). ``epilogue``: "store"; "add" adds to what ``outs`` hold;
    "silu", "gelu" or "gelu_tanh" with two sites and one output gives act(first) * second. ``extras[i]`` are the further
    inputs [tokens, n] that parts of site i read.
    """
    _kernels.linear(x, sites, outs, extras or [], gain, eps, epilogue)


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


@contextmanager
def record(capacity: int) -> Iterator[Program]:
    """Records the ops that this thread calls inside the block, in place of running them.

    Every op is given arrays of ``capacity`` tokens: a first axis of ``capacity`` or a multiple (heads of a token).
    ``program.run(n)`` then runs them all for the first n tokens (0 to ``capacity``), natively and with the
    interpreter lock released, on the arrays' contents at that time; step inputs are changed in place between runs. The
    program keeps the arrays alive. It is one thread's at a time.

    Raises ValueError for what cannot be recorded: other lengths, functions that are no ops, a recording inside
    another. When the block raises, nothing stays recorded.
    """
    program = _kernels.Program(capacity)
    program.begin()
    complete = False
    try:
        yield program
        complete = True
    finally:
        program.end(complete)


isa = _kernels.isa
isa_supported = _kernels.isa_supported
threads = _kernels.threads
decode_rows = _kernels.decode_rows
embed = _kernels.embed
angles = _kernels.angles
rmsnorm = _kernels.rmsnorm
rope = _kernels.rope
gated = _kernels.gated
add = _kernels.add
scale = _kernels.scale
fwht = _kernels.fwht
kv_write = _kernels.kv_write
attention = _kernels.attention
sample = _kernels.sample
nll = _kernels.nll
planes_linear = _kernels.planes_linear
planes_paths = _kernels.planes_paths
planes_sums = _kernels.planes_sums
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
