"""The compiled module. Call it through ``gossamer.ops``.

Every array is C-contiguous. M counts tokens; activations are float32. A wrong type, shape, index or option is a
ValueError or TypeError and nothing is written. The interpreter lock is released while a kernel runs. Results are
bitwise the same for any number of threads, and for a token in whatever batch or chunk it comes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

_F32 = npt.NDArray[np.float32]
_F64 = npt.NDArray[np.float64]
_I32 = npt.NDArray[np.int32]
_U8 = npt.NDArray[np.uint8]
_Pool = npt.NDArray[Any]  # float32, float16, bfloat16 as uint16, or uint8 codes with scales
_Scale = npt.NDArray[Any]

class Weight:
    """A packed matrix and the arrays it reads, which it keeps alive: see kernels/linear.h for the layout."""

    def __init__(
        self,
        code: str,
        rows: int,
        cols: int,
        codes: _U8,
        high: _U8 | None,
        scale: str,
        scales: _U8 | None,
        offset: str,
        offsets: _U8 | None,
        group: int,
        bias: _F32 | None,
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    def refuse(self, input: str) -> str | None:
        """Why no kernel multiplies this weight with inputs of this format, or None."""

def isa() -> str:
    """The instruction-set level in use."""

def isa_supported() -> list[str]:
    """The levels this machine runs, ascending."""

def set_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(n: int) -> None: ...
def linear(x: _F32, weights: list[Weight], outs: list[_F32], input: str) -> None:
    """outs[i] [M, rows_i] = x [M, cols] W_i^T + b_i, the input rounded once to ``input`` (f32, bf16, int8/token)."""

def decode_rows(weight: Weight, ids: npt.NDArray[np.int64], out: _F32) -> None:
    """out [n, cols] = rows ``ids`` of the matrix."""

def rmsnorm(x: _F32, gain: _F32, eps: float, out: _F32) -> None:
    """out [M, D] = x / sqrt(mean(x^2) + eps) * gain [D]; ``out`` may be ``x``."""

def rope(x: _F32, cos: _F32, sin: _F32) -> None:
    """Rotates x [M, heads, d] in place by cos, sin [M, r/2]: element i < r/2 with element i + r/2."""

def gated(kind: str, gate: _F32, up: _F32, out: _F32) -> None:
    """out [M, F] = act(gate) * up with act "silu", "gelu" or "gelu_tanh"; ``out`` may be ``gate``."""

def add(x: _F32, y: _F32) -> None:
    """x += y."""

def scale(x: _F32, s: float) -> None:
    """x *= s."""

def softcap(x: _F32, cap: float) -> None:
    """x = cap * tanh(x / cap)."""

def kv_write(
    k: _F32,
    v: _F32,
    positions: _I32,
    sequence: _I32,
    tables: _I32,
    K: _Pool,
    V: _Pool,
    k_scale: _Scale | None,
    v_scale: _Scale | None,
) -> None:
    """Stores k, v [M, kv_heads, d] (d at most 4096) at ``positions`` [M] of the sequences that ``sequence`` [M] names.

    ``tables`` [sequences, max_blocks] lists the blocks of each sequence: position p lies in block p // B, slot p % B,
    with B a multiple of 16. A row is one position of one head. The pools, by the type of K (and of its scales):

    - float32, float16: K [blocks, kv_heads, d, B], V [blocks, kv_heads, B, d];
    - bfloat16 (uint16): K [blocks, kv_heads, ceil(d/2), B, 2], V [blocks, kv_heads, B/2, d, 2];
    - int8 (uint8 code = q + 128, float32 scales [blocks, kv_heads, B]): value scale * (code - 128), scale max|x| / 127;
      K [blocks, kv_heads, ceil(d/4), B, 4], V [blocks, kv_heads, B/4, d, 4];
    - uint4 (uint8, float16 scales and minima [blocks, kv_heads, 2, B]): value scale * code + minimum, scale
      (max - min) / 15, both rounded outwards; K [blocks, kv_heads, ceil(d/8), B, 4], V [blocks, kv_heads, B/8, d, 4];
      of the eight codes in four bytes the low nibbles come first.
    """

def attention(
    q: _F32,
    positions: _I32,
    sequence: _I32,
    tables: _I32,
    K: _Pool,
    V: _Pool,
    k_scale: _Scale | None,
    v_scale: _Scale | None,
    out: _F32,
    lse: _F32 | None,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """out [M, heads, d]: each query attends to its sequence's stored keys at p - window < j <= p (window 0: all).

    ``positions`` [M] holds p, or -1 for a query that sees nothing; ``sequence`` and ``tables`` as in ``kv_write``. A
    call may mix sequences that bring many tokens with others that bring one; tokens of one sequence that lie next to
    each other share the reading of its keys. ``lse`` [M, heads] takes the natural log of the sum of exponentials, so
    that partial results can be merged. Online softmax (Milakov & Gimelshein 2018), cut only at fixed absolute
    positions. Over bfloat16 pools queries and weights are rounded to bfloat16; over codes they are 16-bit integers per
    row (and per 256 positions), and the sums are exact.
    """

def sample(
    logits: _F32,
    recent: _I32,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repeat_penalty: float,
    seed: int,
    step: int,
) -> tuple[int, float]:
    """A token and its log-probability. The draw depends on (seed, step) alone. NaN logits are a RuntimeError."""

def nll(logits: _F32, targets: _I32, out: _F64) -> None:
    """out [M] = -log softmax(logits [M, V])[target], in nats."""

def divergence(base: _F32, other: _F32, kl: _F64, same_top: _U8) -> None:
    """kl [M] = KL(softmax(base) || softmax(other)) in nats; same_top [M] tells whether both agree on the best."""

def read_bandwidth(bytes: int, seconds: float) -> float:
    """GB/s (1e9) at which all threads read a buffer of anonymous memory; the best of several inner loops."""

def probe_release() -> None:
    """Gives the probe's buffer back."""
