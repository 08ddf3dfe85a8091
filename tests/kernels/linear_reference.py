"""Random packed matrices and what a linear layer of them is in float64, with how far a kernel may be from it.

A matrix is made of what a file may hold, not only of what encode writes: scales of both signs, zero and subnormal,
every finite code, the extreme ones more often.

The reference takes the input as InputFormat rounds it (tested on its own) and adds in float64. A float32 sum of n terms
errs by at most n 2^-24 times the sum of their magnitudes; twice that is allowed, since a level without a fused
multiply-add rounds twice. With v what a code means before it is scaled, z a zero point and m a minimum:
    float and bf16 dot     a chain of L columns for each segment, S segments, each scaled and added; sums of the input
                           for the offset are no longer than a chain. n = L + 3 S + 8 with the rounding of s v or s z,
                           the bias and joins; a term is (|s| (|v| + |z|) + |m|) |x|. The bf16 dot takes subnormal
                           inputs, products and sums for zero: 2^-126 a term, times its scale.
    integer dot            the sums of a segment are exact. n = 5 S + 8 with their conversion, the scales of weight and
                           input and one addition for each part and offset; a term is the part of the result that a
                           segment contributes. bipolar codes are c, their odd numbers' zero a zero point.
    two-byte tables        the integers 256 h + l add as two sums: a term is up to 2^-6 of the largest value larger.
                           Tables that are no integers are rounded to 2^-16 of it, by design.
    subnormal scales       their product with another scale is off by up to 2^-149, for each unit of the sum.
    outliers               one more addition for each of the token's, with a decoded column (two roundings).
"""

from __future__ import annotations

import numpy as np

from gossamer import ops
from gossamer.formats import Coded, KMeans, Packed, allocate, halves, scales
from gossamer.formats.coded import Parts

PANEL = 16
CHAIN = 256  # columns of a float chain, where a group is no obstacle
INTEGERS = 65536  # columns of an integer sum


def plain_scales(kind, shape, rng, size):
    """Stored scales [tiles, groups] of kind f32, f16, bf16, e8m0 or e4m3."""
    if kind == "e8m0":
        stored = rng.integers(116, 126, shape).astype(np.uint8)
        stored[rng.random(shape) < 0.03] = 0  # 2^-127, a subnormal
        return stored
    if kind == "e4m3":
        stored = rng.integers(0, 127, shape).astype(np.uint8) | (rng.integers(0, 4, shape) == 0).astype(np.uint8) << 7
        stored[rng.random(shape) < 0.05] = 1
        return stored
    s = size * rng.uniform(0.01, 0.1, shape) * rng.choice([-1, 1, 1, 1], shape)
    subnormal = {"f32": 2.0**-140, "f16": 2.0**-20, "bf16": 2.0**-130}[kind]
    special = rng.random(shape)
    s = np.where(special < 0.04, 0, np.where(special < 0.08, s * subnormal, s))
    return halves.from_float(s.astype(np.float32), kind)


def codes_of(number, shape, rng):
    finite = np.flatnonzero(np.isfinite(number.values[: number.levels])).astype(np.uint8)
    codes = rng.choice(finite, shape)
    where = rng.random(shape)
    codes[where < 0.08] = finite[-1]
    codes[where > 0.96] = finite[0]
    return codes


def random_parts(fmt, rows, cols, rng, size=1.0):
    """Parts of a Coded format: see gossamer.formats.fit."""
    tiles, groups = fmt.matrix(rows, cols)

    def matrix(kind):
        if kind is None:
            return None
        if isinstance(kind, Coded):
            return random_parts(kind, tiles, groups, rng, size)
        return plain_scales(kind, (tiles, groups), rng, size)

    zeros = rng.integers(0, fmt.number.levels, (rows, groups)).astype(np.uint8) if fmt.zero else None
    return Parts(
        codes_of(fmt.number, (rows, cols), rng), matrix(fmt.scale), zeros, matrix(fmt.minimum), fmt.group.shared
    )


def spread(fmt, a, rows, cols):
    """Values [tiles, groups] for each element."""
    return a[np.arange(rows) // fmt.tile_rows(rows)][:, np.arange(cols) // fmt.width(cols)]


def decoded(fmt, parts, rows, cols):
    """v, z, s, m float32 [rows, cols]: an element is s (v - z) - m."""
    nothing = np.zeros((rows, cols), np.float32)

    def matrix(kind, stored):
        if kind is None:
            return nothing
        coded = isinstance(kind, Coded)
        found = value(kind, stored, *fmt.matrix(rows, cols)) if coded else scales.load(stored, kind)
        return spread(fmt, found, rows, cols)

    v = fmt.number.values[parts.codes]
    z = nothing if parts.zeros is None else parts.zeros[:, np.arange(cols) // fmt.width(cols)].astype(np.float32)
    return v, z, matrix(fmt.scale, parts.scales), matrix(fmt.minimum, parts.mins)


def value(fmt, parts, rows, cols):
    v, z, s, m = decoded(fmt, parts, rows, cols)
    product = s * (v - z)
    return product if fmt.minimum is None else product - m


def spoil_padding(packed):
    """Rows past the end belong to nobody: NaN scales there must not reach a real row."""
    rows, cols = packed.shape
    fmt = packed.format
    if rows % PANEL == 0 or not isinstance(fmt, Coded) or fmt.group.shared:
        return
    for name, kind in (("scales", fmt.scale), ("mins", fmt.minimum)):
        if isinstance(kind, str):
            used = packed.arrays[name][: -(-rows // PANEL) * PANEL * fmt.groups(cols)]
            nan = {"e8m0": 255, "e4m3": 127, "bf16": 0x7FC0}.get(kind, np.nan)
            used.reshape(-1, fmt.groups(cols), PANEL)[-1, :, rows % PANEL :] = nan


class Matrix:
    """A random matrix of a leaf format: ``packed``, and v, z, s, m float64 [rows, cols] (an element: s (v - z) - m)."""

    def __init__(self, fmt, rows, cols, seed=0, size=1.0):
        rng = np.random.default_rng([seed, rows, cols])
        self.format, self.rows, self.cols = fmt, rows, cols
        nothing = np.zeros((rows, cols))
        self.table, self.code_zero, self.width = None, 0.0, cols
        arrays = allocate(fmt, rows, cols)
        if isinstance(fmt, Coded):
            parts = random_parts(fmt, rows, cols, rng, size)
            fmt.pack_parts(parts, arrays, 0)
            self.v, self.z, self.s, self.m = (a.astype(np.float64) for a in decoded(fmt, parts, rows, cols))
            self.exact = value(fmt, parts, rows, cols)
            self.width, self.table = fmt.width(cols), fmt.number.table
            self.code_zero = float(fmt.number.zero) if fmt.number.family == "bipolar" else 0.0
        else:
            if isinstance(fmt, KMeans):
                codes = rng.integers(0, 1 << fmt.bits, (rows, cols)).astype(np.uint8)
                table = np.sort(size * rng.standard_normal((rows if fmt.per == "row" else 1, 1 << fmt.bits)), axis=1)
                table = table.astype(np.float32)
                fmt.pack_rows(codes, table, arrays, 0)
                self.exact = table[np.arange(rows)[:, None] if fmt.per == "row" else 0, codes]
                self.table = table[0] if fmt.per == "tensor" else None
            else:
                w = rng.uniform(-size, size, (rows, cols)).astype(np.float32)
                w[rng.random(w.shape) < 0.02] *= np.float32(2.0**-20)
                fmt.encode_rows(w, arrays, 0, cols, None)
                self.exact = fmt.decode_rows(arrays, rows, cols, 0, rows)
            self.v, self.z, self.s, self.m = self.exact.astype(np.float64), nothing, nothing + 1, nothing
        self.packed = Packed(fmt, (rows, cols), arrays)
        spoil_padding(self.packed)

    def byte_parts(self):
        """(parts, units of one, whether the table is rounded) of the integer path: see kernels/weight.cpp."""
        if self.table is None:
            return 1, 1.0, False
        top = float(np.abs(self.table).max())
        for k in range(-10, 17):
            whole = self.table.astype(np.float64) * 2.0**k
            if top * 2.0**k <= 32767 and (whole == np.rint(whole)).all():
                return (1 if top * 2.0**k <= 127 else 2), 2.0**k, False
        return 2, 32767 / top, True


def reference(matrix, x, given, path, bias=None):
    """float64 outputs [tokens, rows] and how far a kernel on this path ("int8", "bf16", "f32") may be from them."""
    with np.errstate(all="ignore"):
        y, size, terms, lost = (_integers if path == "int8" else _floats)(matrix, x, given, path)
        if bias is not None:
            y, size = y + bias, size + np.abs(bias)
        size = np.where(np.isfinite(size), size, 0)
        s = np.abs(matrix.s).sum(axis=1)
        return y, terms * 2.0**-23 * size + lost + terms * 2.0**-149 * (1 + np.where(np.isfinite(s), s, 0))


def _floats(matrix, x, given, path):
    x = given.apply(x).astype(np.float64)
    cols, width = matrix.cols, matrix.width
    chain = min(CHAIN if width >= cols or width % CHAIN == 0 else width, cols)
    weight = np.abs(matrix.s) * (np.abs(matrix.v) + matrix.z) + np.abs(matrix.m)
    y = x @ (matrix.s * (matrix.v - matrix.z) - matrix.m).T
    lost = 2.0**-147 * np.abs(x).sum(axis=1, keepdims=True)  # products of scales and zero points that are subnormal
    if path == "bf16":
        lost = lost + (weight + np.abs(matrix.s)).sum(axis=1) * 2.0**-126
    return y, np.abs(x) @ weight.T, chain + 3 * -(-cols // chain) + 8, lost


def _integers(matrix, x, given, path):
    q = given.quantize(x)
    codes = q.codes.astype(np.float64)
    cols = matrix.cols
    width = given.group if isinstance(given.group, int) else cols
    if q.zeros is not None:
        codes -= np.repeat(q.zeros.astype(np.float64), width, axis=1)[:, :cols]
    starts = sorted({*range(0, cols, matrix.width), *range(0, cols, width), *range(0, cols, INTEGERS)})
    parts, units, rounded = matrix.byte_parts()
    top = float(np.abs(matrix.table).max()) if parts == 2 else 0.0
    y = np.zeros((len(x), matrix.rows))
    size, off = np.zeros_like(y), np.zeros_like(y)
    for a, b in zip(starts, [*starts[1:], cols]):
        s, t = matrix.s[:, a], q.scales[:, a // width, None].astype(np.float64)
        offset_size = np.abs(s) * np.abs(matrix.z[:, a] + matrix.code_zero) + np.abs(matrix.m[:, a])
        v = matrix.v[:, a:b] + matrix.code_zero
        sums, total, heap = codes[:, a:b] @ v.T, codes[:, a:b].sum(axis=1, keepdims=True), np.abs(codes[:, a:b])
        plain = codes[:, a:b] @ matrix.v[:, a:b].T
        y += t * (s * plain - total * (s * matrix.z[:, a] + matrix.m[:, a]))
        part = np.abs(sums) if parts == 1 else heap @ (np.abs(v) + 2.0**-6 * top).T
        size += np.abs(t) * (np.abs(s) * part + offset_size * np.abs(total))
        # A product of scales may be subnormal: 2^-149 for each unit of the integer sum.
        off += 2.0**-147 * (max(1, units) * part + np.abs(total)) * np.maximum(1, np.abs(t))
        if rounded:
            off += np.abs(t * s) * heap.sum(axis=1, keepdims=True) * top * 2.0**-16
    terms = 5 * len(starts) + 8
    if q.outliers is not None:
        o = q.outliers.astype(np.float64)
        weight = np.abs(matrix.s) * (np.abs(matrix.v) + matrix.z) + np.abs(matrix.m)
        y += o @ (matrix.s * (matrix.v - matrix.z) - matrix.m).T
        size += np.abs(o) @ weight.T
        terms += 2 + int((o != 0).sum(axis=1).max(initial=0))
    return y, size, terms, off


# ------------------------------------------------------------ calls


def make(packed):
    return ops.make_weight(packed.format.kernel(packed.arrays, *packed.shape), *packed.shape)


def input_of(given):
    group = given.group if isinstance(given.group, int) else 0
    return ops.Input(given.number, group, given.group if isinstance(given.group, float) else 0.0, given.outlier or 0.0)


def site(weight, given, bias=None):
    """A site of one matrix."""
    s = ops.Site(weight.rows, weight.cols, bias)
    s.block(None)
    s.part(weight, input_of(given), -1, 0, [])
    return s


def run(s, x):
    out = np.full((len(x), s.rows), np.nan, np.float32)
    ops.linear(x, [s], [out])
    return out


def inputs(tokens, cols, seed=0):
    """Normal activations, each token with one element twenty times as large."""
    rng = np.random.default_rng([seed, tokens, cols])
    x = rng.standard_normal((tokens, cols)).astype(np.float32)
    x[np.arange(tokens), rng.integers(0, cols, tokens)] *= 20
    return x


def moved(array, offset):
    """The same values ``offset`` bytes into another buffer, as a part of a mapped file may lie."""
    room = np.zeros(array.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset
    there = room[start : start + array.nbytes]
    there[:] = np.ascontiguousarray(array).view(np.uint8)
    return there.view(array.dtype)
