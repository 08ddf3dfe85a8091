"""The compiled module. Call it through ``gossamer.ops``.

Every array is C-contiguous. M counts tokens; activations are float32. A wrong type, shape, index or option is a
ValueError or TypeError and nothing is written. The interpreter lock is released while a kernel runs. Results are
bitwise the same for any number of threads, and for a token in whatever batch or chunk it comes.

Functions marked (op) can be recorded in a ``Program``; the others refuse to be called while one is.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

_F32 = npt.NDArray[np.float32]
_F64 = npt.NDArray[np.float64]
_I32 = npt.NDArray[np.int32]
_I8 = npt.NDArray[np.int8]
_U8 = npt.NDArray[np.uint8]
_Pool = npt.NDArray[Any]  # float32, float16, bfloat16 as uint16, or uint8 codes with scales
_Scale = npt.NDArray[Any]

class Weight:
    """A packed matrix and the arrays it reads, which it keeps alive: see docs/formats.md for the layout.

    ``number`` is "f32", "f16", "bf16" or "u1" to "u8"; ``arrays`` holds what ``ops.make_weight`` says.
    """

    def __init__(self, number: str, rows: int, cols: int, arrays: dict[str, Any]) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    def path(self, input: Input) -> tuple[str, str | None]:
        """How it is multiplied with such inputs, "int8", "bf16" or "f32", and why not faster, or None."""

class Mask:
    """Sparse entries: ``starts`` uint32 [panels + 1], ``index`` and ``values`` as bytes, of ``kind`` "f32", "f16",
    "bf16" or "int8", which ``scale`` multiplies. A column that does not exist is a ValueError."""

    def __init__(
        self, rows: int, cols: int, starts: npt.NDArray[np.uint32], index: _U8, kind: str, values: _U8, scale: float
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...

class Input:
    """What inputs are rounded to: a number, the columns of a group (0: a token), a static scale (0: dynamic) and the
    size from which elements stay out (0: none)."""

    def __init__(self, rounding: str, group: int, fixed: float, outlier: float) -> None: ...

class Site:
    """The rows of a linear site: blocks of rows, each a sum of parts."""

    def __init__(self, rows: int, cols: int, bias: _F32 | None) -> None: ...
    def block(self, index: npt.NDArray[np.uint32] | None) -> None:
        """Opens a block of the rows ``index``, or of all."""

    def part(self, matrix: Weight | Mask, input: Input, extra: int, extra_cols: int, steps: list[Any]) -> None:
        """Adds a matrix to the block. It multiplies the site's input, or ``extra`` of a call (-1: none) of
        ``extra_cols`` columns, after ``steps``: ("gather", uint32 [n]), ("multiply", float32 [n]) or ("hadamard",
        order, signs float32 [n] or None)."""

    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def blocks(self) -> int: ...

class Program:
    """A list of ops over arrays that it keeps; made by ``ops.record``."""

    def __init__(self, capacity: int) -> None: ...
    def begin(self) -> None:
        """From now on, ops that this thread calls are appended here."""

    def end(self, complete: bool) -> None:
        """Ends the recording; if it is not complete, everything is dropped and the program cannot run."""

    def run(self, tokens: int) -> None:
        """Runs all ops for the first ``tokens`` (0 to ``capacity``) tokens. A step input that an op cannot take is a
        ValueError before anything is written."""

    @property
    def capacity(self) -> int: ...
    def __len__(self) -> int:
        """How many ops were recorded."""

def isa() -> str:
    """The instruction-set level in use."""

def isa_supported() -> list[str]:
    """The levels this machine runs, ascending."""

def set_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(n: int) -> None: ...
def linear(
    x: _F32, sites: list[Site], outs: list[_F32], extras: list[list[_F32]], gain: _F32 | None, eps: float, epilogue: str
) -> None:
    """(op) outs[i] [M, rows_i] = x [M, cols] W_i^T + b_i; the rest as ``ops.linear`` says."""

def embed(weight: Weight, ids: _I32, out: _F32) -> None:
    """(op) out [M, cols] = rows ``ids`` [M] of the matrix."""

def decode_rows(weight: Weight, ids: npt.NDArray[np.int64], out: _F32) -> None:
    """out [n, cols] = rows ``ids`` of the matrix."""

def rmsnorm(x: _F32, gain: _F32, eps: float, out: _F32) -> None:
    """(op) out [M, D] = x / sqrt(mean(x^2) + eps) * gain [D]; ``out`` may be ``x``."""

def angles(positions: _I32, frequencies: _F32, cos: _F32, sin: _F32) -> None:
    """(op) cos, sin [M, n] of the angles positions [M] * frequencies [n], float32 products; correctly rounded but for
    about one in a million."""

def rope(q: _F32, k: _F32, cos: _F32, sin: _F32) -> None:
    """(op) Rotates q [M, heads, d] and k [M, kv_heads, d] in place by cos, sin [M, r/2]: element i < r/2 with element
    i + r/2."""

def gated(kind: str, gate: _F32, up: _F32, out: _F32) -> None:
    """(op) out [M, F] = act(gate) * up with act "silu", "gelu" or "gelu_tanh"; ``out`` may be ``gate``."""

def add(x: _F32, y: _F32) -> None:
    """(op) x += y."""

def scale(x: _F32, s: float) -> None:
    """(op) x *= s."""

def softcap(x: _F32, cap: float) -> None:
    """(op) x = cap * tanh(x / cap)."""

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
    """(op) Stores k, v [M, kv_heads, d] (d at most 4096) at ``positions`` [M] of the sequences ``sequence`` [M].

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
    """(op) out [M, heads, d]: each query attends to its sequence's stored keys at p - window < j <= p (window 0: all).

    ``positions`` [M] holds p, or -1 for a query that sees nothing; ``sequence`` and ``tables`` as in ``kv_write``. A
    call may mix sequences that bring many tokens with others that bring one; tokens of one sequence that lie next to
    each other share the reading of its keys. ``lse`` [M, heads] takes the natural log of the sum of exponentials, so
    that partial results can be merged. Online softmax (Milakov & Gimelshein 2018), cut only at fixed absolute
    positions. Over bfloat16 pools queries and weights are rounded to bfloat16; over codes they are 16-bit integers per
    row (and per 256 positions), and the sums are exact.
    """

def fwht(x: _F32, block: int, signs: _F32 | None = None, transpose: bool = False) -> None:
    """Each ``block`` columns of x [M, width] become H (signs * x) / sqrt(block), in place; ``signs`` [width] is +-1.

    H: Sylvester's matrix for a power of two, else Paley's H_K (x) H_2^m (x seen as [K, 2^m]) with the smallest fitting
    K <= 172. ``transpose`` gives the inverse, signs * (H^T x) / sqrt(block). ``block`` is 2 to 2^20 and divides width.
    """

def planes_linear(
    planes: list[_U8],
    rows: int,
    cols: int,
    group: int,
    scales: _F32,
    zero: int,
    step: int,
    x: _I8,
    x_scale: _F32,
    out: _F32,
    path: str = "auto",
) -> None:
    """out [M, rows] = x_scale [M] * sum over groups of scale * sum (step * code - zero) * x [M, cols].

    ``planes`` holds one array a bit, the lowest first: see kernels/planes.h; ``scales`` [panels, groups, 16] is flat;
    ``group`` is a multiple of 16 columns up to 32768; ``step`` is 1, or 2 for bipolar codes. ``path`` is "auto" or one
    of ``planes_paths()``: each gives the same bits.
    """

def planes_sums(planes: list[_U8], rows: int, cols: int, group: int, x: _I8, out: _I32, path: str = "auto") -> None:
    """out [M, panels, groups, 16] = the exact sums of code * x over each group."""

def planes_paths() -> list[str]:
    """The paths that this machine can take at the current level: "mask", "lookup", "popcount", perhaps "vpopcnt"."""

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

def dot_peak(kind: str, seconds: float) -> float:
    """1e9 operations a second (2 per multiply-add) of all threads in registers; ``kind`` int8, bf16 or f32.

    The best of short repetitions. In theory clock x multiply-adds of an instruction x 2 x instructions a cycle, for
    each thread; at 64 bytes vpdpbusd does 64 multiply-adds, vdpbf16ps 32, FMA 16. Without a bf16 dot product the
    bf16 peak is the float32 one.
    """

def probe_release() -> None:
    """Gives the probe's buffer back."""
