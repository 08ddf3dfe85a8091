"""Paged pools of keys and values for the tests of attention: written by the kernels, read back by numpy."""

from __future__ import annotations

import numpy as np

from gossamer import _kernels as kernels

KINDS = ("float32", "float16", "bfloat16", "int8", "uint4")
PACK = {"float32": 1, "float16": 1, "bfloat16": 2, "int8": 4, "uint4": 8}
# How far attention may be from float64 over the stored keys and values, for values of size one: bfloat16 pools round
# weights to bfloat16 (2^-9 of each), codes take queries and weights as 16-bit integers.
ATOL = {"float32": 2e-5, "float16": 2e-5, "bfloat16": 4e-3, "int8": 2e-4, "uint4": 4e-4}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def widen(bits):
    """bfloat16 stored as uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_round(x):
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def arrays(kind, blocks, heads, dim, block):
    """(K, V, k_scale, v_scale) of a pool whose every slot is NaN (garbage codes with NaN scales)."""
    steps, pack = -(-dim // PACK[kind]), PACK[kind]
    dtype = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}.get(kind, np.uint8)
    unit = {"bfloat16": (2,), "int8": (4,), "uint4": (4,)}.get(kind, ())
    fill = {"bfloat16": 0x7FC0, "int8": 0x9B, "uint4": 0x9B}.get(kind, np.nan)
    K = np.full((blocks, heads, steps, block, *unit), fill, dtype)
    V = np.full((blocks, heads, block // pack, dim, *unit), fill, dtype)
    if kind == "int8":
        scales = [np.full((blocks, heads, block), np.nan, np.float32) for _ in range(2)]
    elif kind == "uint4":
        scales = [np.full((blocks, heads, 2, block), np.nan, np.float16) for _ in range(2)]
    else:
        scales = [None, None]
    return K, V, *scales


def elements(kind, K, V, k_scale, v_scale, dim):
    """What a pool stores as float32 [blocks, heads, block, dim]: keys and values. The layout, written out."""
    heads, block = K.shape[1], K.shape[3]
    if kind in ("float32", "float16"):
        return K.swapaxes(2, 3).astype(np.float32), V.astype(np.float32)
    if kind == "uint4":  # low nibbles of four bytes, then the high ones
        K, V = (np.concatenate([x & 15, x >> 4], axis=-1) for x in (K, V))
    k = K.transpose(0, 1, 3, 2, 4).reshape(len(K), heads, block, -1)[..., :dim]
    v = V.transpose(0, 1, 2, 4, 3).reshape(len(V), heads, block, dim)
    if kind == "bfloat16":
        return widen(k), widen(v)
    if kind == "int8":
        return tuple((x.astype(np.float32) - 128) * s[..., None] for x, s in ((k, k_scale), (v, v_scale)))
    pairs = ((x, s.astype(np.float32)) for x, s in ((k, k_scale), (v, v_scale)))
    return tuple(x.astype(np.float32) * s[:, :, 0, :, None] + s[:, :, 1, :, None] for x, s in pairs)


class Cache:
    """A pool, and sequences of up to ``tokens`` tokens whose blocks lie shuffled in it."""

    def __init__(self, kind, heads, dim, tokens, block=32, seed=0, sequences=1):
        rng = np.random.default_rng(seed)
        used = -(-tokens // block)
        blocks = sequences * used + 3
        self.kind, self.dim, self.block = kind, dim, block
        self.tables = rng.permutation(blocks)[: sequences * used].astype(np.int32).reshape(sequences, used)
        self.pool = arrays(kind, blocks, heads, dim, block)

    def write(self, k, v, start=0, sequence=0):
        positions = np.arange(start, start + len(k), dtype=np.int32)
        kernels.kv_write(k, v, positions, np.full(len(k), sequence, np.int32), self.tables, *self.pool)

    def read(self, tokens, sequence=0):
        """What the pool holds for positions 0..tokens-1, as float32 [tokens, heads, dim]."""
        table = self.tables[sequence]
        both = elements(self.kind, *(None if x is None else x[table] for x in self.pool), self.dim)
        return tuple(x.swapaxes(1, 2).reshape(-1, x.shape[1], self.dim)[:tokens] for x in both)

    def attend(self, q, positions, window=0, softcap=0.0, scale=None, lse=True, sequence=0):
        out, log = np.full_like(q, np.nan), np.full(q.shape[:2], np.nan, np.float32)
        sequence = np.broadcast_to(np.asarray(sequence, np.int32), len(q)).copy()
        kernels.attention(
            q, np.asarray(positions, np.int32), sequence, self.tables, *self.pool, out,
            log if lse else None, q.shape[-1] ** -0.5 if scale is None else scale, window, softcap,
        )  # fmt: skip
        return out, log


def reference(q, positions, K, V, window=0, softcap=0.0, scale=None, kind="float32"):
    """The definition, in float64: [tokens, heads, dim] and [tokens, heads]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = q * np.float32(scale)
    if kind == "bfloat16":
        q = widen(bf16_round(q))
    q, K, V = (x.astype(np.float64) for x in (q, K, V))
    group = q.shape[1] // K.shape[1]
    out, lse = np.zeros_like(q), np.full(q.shape[:2], -np.inf)
    for m, p in enumerate(positions):
        keys = slice(max(0, p - window + 1) if window else 0, p + 1)
        for h in range(q.shape[1]):
            s = K[keys, h // group] @ q[m, h]
            if softcap:
                s = softcap * np.tanh(s / softcap)
            if len(s):
                e = np.exp(s - s.max())
                out[m, h] = e @ V[keys, h // group] / e.sum()
                lse[m, h] = s.max() + np.log(e.sum())
    return out, lse


def check(cache, q, positions, tokens, atol=None, sequence=0, **options):
    out, lse = cache.attend(q, positions, sequence=sequence, **options)
    want, want_lse = reference(q, positions, *cache.read(tokens, sequence), kind=cache.kind, **options)
    atol = ATOL[cache.kind] if atol is None else atol
    np.testing.assert_allclose(out, want, rtol=0, atol=atol)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=atol)
    assert np.array_equal(cache.attend(q, positions, sequence=sequence, lse=False, **options)[0], out)
