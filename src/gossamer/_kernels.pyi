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
    """A packed matrix [rows, cols], at most 2^46 elements, and the arrays it reads, which it keeps alive.

    ``number``: "f32", "f16", "bf16", or "u1" to "u8" for codes of so many bits. ``arrays`` are flat,
    uint8, laid out as docs/formats.md says, each at least as long as the shape asks for (padding is not needed):
    "values" of plain numbers; "q8", "q4", "q2", "q1" (the fields of a code), "zeros", "scales", "mins". One that is not
    aligned to its element size is copied. Beside them, for codes:

    - group (int): columns that share a scale, a multiple of 8; of a whole row its padded width;
    - tile_rows (int, 1): rows that do, 1 or a multiple of 16;
    - step, zero (float, 1 and 0): a code c stands for step * c - zero, zero from 0 to 255 steps; or
    - table (float32 [2^bits]): for table[c]; with table_per_row (int) float32 [panels][2^bits][16 rows];
    - scale, min (str, "none"): what "scales" and "mins" are: "f32", "f16", "bf16", "e8m0", "e4m3", or "nested", the
      matrix [ceil(rows / tile_rows), groups] being the Weight "scales_nested" or "mins_nested";
    - zero_bits (int, 0): 4 or 8 where there are zero points. These, and minima, go with plain codes (step 1, zero 0).

    ValueError for anything else.
    """

    def __init__(self, number: str, rows: int, cols: int, arrays: dict[str, Any]) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    def path(self, input: Input) -> tuple[str, str | None]:
        """How the current level multiplies it with inputs of this format: "int8" (integer dot product), "bf16" (bf16
        dot product) or "f32" (of the rounded input), and the reason why no faster way fits, or None."""

class Mask:
    """Unstructured entries of a matrix [rows, cols], by panel of 16 rows; it keeps its arrays.

    ``starts`` uint32 [panels + 1]: the first slot of each panel, then the end, never falling. ``index`` and ``values``,
    flat uint8 [slot][16 rows]: columns (16-bit, 32-bit where there are more than 65535 columns; all ones: empty) and
    entries of ``kind`` "f32", "f16", "bf16", or "int8": ``scale`` * (byte - 128). ValueError for arrays that are too
    short and columns that do not exist.
    """

    def __init__(
        self,
        rows: int,
        cols: int,
        starts: npt.NDArray[np.uint32],
        index: _U8,
        kind: str,
        values: _U8,
        scale: float,
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...

class Input:
    """What an input is rounded to: "f32", "bf16", "int8", "int4", "uint8", "uint4" or "e4m3" (gossamer.formats.inputs).

    ``group``: columns that share a scale, a multiple of 16, or 0 for the token; ``fixed``: a static scale, or 0;
    ``outlier``: elements at least so large stay in float32, or 0. The first two numbers take none of the three.
    """

    def __init__(self, rounding: str, group: int, fixed: float, outlier: float) -> None: ...

class Site:
    """The rows of one linear site: blocks of rows, each the sum of its parts. It keeps what it is given.

    ``bias`` is float32 [rows] or None. Each row belongs to exactly one block.
    """

    def __init__(self, rows: int, cols: int, bias: _F32 | None) -> None: ...
    def block(self, index: npt.NDArray[np.uint32] | None) -> None:
        """Begins a block: the rows ``index`` [n] of the output, in this order; None: all of them, the only block."""

    def part(
        self, matrix: Weight | Mask, input: Input, extra: int, extra_cols: int, steps: list[tuple[Any, ...]]
    ) -> None:
        """Adds a matrix of as many rows as the last block has.

        It reads the call's input (``extra`` -1), or the further input number ``extra`` of ``extra_cols`` columns, after
        ``steps`` in float32, before the rounding: ("gather", uint32 [n]) takes columns, ("multiply", float32 [n]), and
        ("hadamard", order, signs float32 [n] or None) as in ``fwht``. ValueError where sizes do not meet.
        """

    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def blocks(self) -> int:
        """How many blocks there are."""

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
    x: _F32,
    sites: list[Site],
    outs: list[_F32],
    extras: list[list[_F32]],
    gain: _F32 | None,
    eps: float,
    epilogue: str,
) -> None:
    """(op) outs[i] [M, rows_i] = x [M, cols] W_i^T + b_i; what sites share is prepared once.

    ``gain`` [cols]: x is first normalised as ``rmsnorm`` does. ``epilogue``: "store"; "add" (outs[i] += ...); or
    "silu", "gelu", "gelu_tanh" with two sites of one block each and one output: act(first) * second. ``extras[i]``,
    [M, n] each, are the further inputs of site i; an empty list where no site has any. ``outs`` may be ``x``. Parts
    are added in float32 in their order, then the bias. A NaN or an infinity in a token makes that token's results NaN
    or infinite and touches no other: docs/formats.md.
    """

def embed(weight: Weight, ids: _I32, out: _F32) -> None:
    """(op) out [M, cols] = rows ``ids`` [M] of the matrix, as ``decode`` gives them. ValueError for an id outside."""

def decode_rows(weight: Weight, ids: npt.NDArray[np.int64], out: _F32) -> None:
    """out [n, cols] = rows ``ids`` [n] of the matrix, as ``decode`` gives them. ValueError for an id outside."""

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
