"""Formats of every family, and matrices with correlated inputs."""

from __future__ import annotations

import numpy as np

from gossamer.formats import parse_weight

PLAIN = ("int4/g64", "int3/row", "int8/g32*f32", "uint4/g64", "uint2/g16", "uint3/g32-m(f16)", "uint4/row-m(f32)",
         "e2m1/g32*e8m0", "e2m1/g16*e4m3", "e3m2/g32*bf16", "e4m3/row", "int4/g32*e8m0", "nf4/g64", "ternary/g64",
         "bipolar1/row", "bipolar2/g64", "bipolar4/g32")  # fmt: skip
NESTED = ("int4/g128*(int8/row)", "uint4/g128*(int8/row)", "nf4/g64*(int8/g256)", "e2m1/g64*(e3m0/row)",
          "uint2/g16*(uint4/g16-z(0))-m(uint4/g16-z(0))", "uint4/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))",
          "int4/g16*(uint3/g16)", "ternary/g32*(int8/row)", "int4/g16*(int8/32x16)")  # fmt: skip
SHARED = ("int4/32x64", "uint4/tensor", "uint4/32x32*(e4m3/tensor)", "ternary/tensor", "e2m1/16x16*e8m0",
          "uint3/16x32-m(f16)")  # fmt: skip
EVERY = PLAIN + NESTED + SHARED


def matrix(rows, cols, seed=0):
    """Normal weights with a zero row, a constant one, a one-sided one and an outlier."""
    rng = np.random.default_rng([seed, rows, cols])
    w = (rng.standard_normal((rows, cols)) * 0.02).astype(np.float32)
    w[0, cols // 2] *= 8
    w[rows // 4] = 0
    w[rows // 3] = 0.013
    w[rows // 2] = np.abs(w[rows // 2])
    return w


def inputs(tokens, cols, seed=0):
    """Correlated inputs of different sizes, float32 [tokens, cols]."""
    rng = np.random.default_rng([seed, cols])
    mixed = rng.standard_normal((tokens, cols // 3 + 1)) @ rng.standard_normal((cols // 3 + 1, cols))
    x = (mixed / np.sqrt(cols // 3 + 1) + 0.4 * rng.standard_normal((tokens, cols))) * np.exp(rng.standard_normal(cols))
    return x.astype(np.float32)


def moments(x):
    return (x.T @ x / np.float32(len(x))).astype(np.float32)


def loss(w, values, hessian):
    d = (values - w).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", d, hessian, d, optimize=True))


def parsed(texts):
    return [parse_weight(t) for t in texts]
