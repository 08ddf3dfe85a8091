"""Random rows of the types of ggml."""

from __future__ import annotations

import numpy as np

from gossamer.checkpoints.gguf import TYPES, row_bytes


def random_rows(kind: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, row_bytes(kind, cols)), dtype=np.uint8)


# Where the f16 numbers of a block lie, in bytes, if not at its beginning alone.
SCALES_AT = {
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "MXFP4": (0,),
    "NVFP4": (),
}


def sound_rows(kind: str, rows: int, cols: int, seed: int = 0, size: float = 0.1) -> np.ndarray:
    """Random codes under random scales (and minima) of deviation ``size``, finite ones, of a type in LOSSLESS."""
    rng = np.random.default_rng(seed)
    raw = random_rows(kind, rows, cols, seed).reshape(-1, TYPES[kind][2])
    if kind == "MXFP4":
        raw[:, 0] = rng.integers(0, 253, len(raw))
    elif kind == "NVFP4":
        raw[:, :4] &= 127
    else:
        for at in SCALES_AT.get(kind, (0,)):
            raw[:, at : at + 2] = rng.normal(0, size, (len(raw), 1)).astype("<f2").view(np.uint8)
    return raw.reshape(rows, -1)
