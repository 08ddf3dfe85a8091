"""Small codes in 32-bit words, the way GPTQ, AWQ and compressed-tensors store them.

Code i of a line takes the bits i * B to i * B + B - 1 of the line's words, counted from the lowest bit of the first
word. A code of 3, 5, 6 or 7 bits may lie in two words; a line takes ceil(codes * B / 32) words, the rest zero.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["pack_words", "unpack_words", "words"]

U8 = NDArray[np.uint8]
I32 = NDArray[np.int32]


def words(codes: int, bits: int) -> int:
    """How many words a line takes."""
    return -(-codes * bits // 32)


def unpack_words(lines: I32, bits: int, count: int) -> U8:
    """Lines int32 [n, words] -> codes uint8 [n, count]."""
    n = len(lines)
    data = np.ascontiguousarray(lines, "<i4").view(np.uint8).reshape(n, -1)
    if bits == 8:
        return np.ascontiguousarray(data[:, :count])
    if 8 % bits == 0:
        per = 8 // bits
        found = np.empty((n, data.shape[1], per), np.uint8)
        for i in range(per):
            found[:, :, i] = data >> np.uint8(bits * i) & np.uint8((1 << bits) - 1)
        return np.ascontiguousarray(found.reshape(n, -1)[:, :count])
    single = np.unpackbits(data, axis=1, count=count * bits, bitorder="little").reshape(n, count, bits)
    codes = np.zeros((n, count), np.uint8)
    for i in range(bits):  # packbits along so short an axis is slow
        codes |= single[:, :, i] << np.uint8(i)
    return codes


def pack_words(codes: U8, bits: int) -> I32:
    """Codes uint8 [n, count] -> lines int32 [n, words]."""
    n, count = codes.shape
    line = np.zeros((n, words(count, bits) * 4), np.uint8)
    if 8 % bits == 0:
        per = 8 // bits
        padded = np.zeros((n, line.shape[1] * per), np.uint8)
        padded[:, :count] = codes
        for i in range(per):
            line |= padded[:, i::per] << np.uint8(bits * i)
    else:
        single = np.empty((n, count, bits), np.uint8)
        for i in range(bits):
            single[:, :, i] = codes >> np.uint8(i) & np.uint8(1)
        dense = np.packbits(single.reshape(n, -1), axis=1, bitorder="little")
        line[:, : dense.shape[1]] = dense
    return line.view("<i4").reshape(n, -1)
