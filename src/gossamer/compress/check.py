"""The end of every run: the folder is loaded as a person would load it, and has to speak."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.engine.kv import kv_bytes
from gossamer.engine.llm import LLM
from gossamer.errors import GossamerError
from gossamer.formats import Coded, Format, leaves, scales
from gossamer.limits import available_memory
from gossamer.models.checkpoint import open_checkpoint
from gossamer.models.packed_checkpoint import PackedFolder
from gossamer.models.transformer import HEAD_ROWS

__all__ = ["PROMPT", "TOKENS", "CheckError", "check"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

PROMPT = "The capital of France is"
TOKENS = 16
CONTEXT = 512  # tokens of the calibration text that are run


class CheckError(GossamerError):
    """What was written does not work."""


def check(folder: Path, tokens: I32 | None = None) -> dict[str, Any]:
    """Loads a folder of ours, continues PROMPT by 16 tokens greedily, and looks at scales and logits.

    ``tokens`` int32 [n] is a text whose logits must be numbers (the first 512; else the prompt's). Returns what a
    ledger keeps of it. A model that does not fit into memory is checked by its scales alone, and the entry says so.

    Raises CheckError, one sentence, for scales or logits that are not numbers and for scales that are all zero.
    """
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, PackedFolder)
    for site in checkpoint.topology.sites:
        packed = checkpoint.stored(site)
        for name, found in _scales(packed.format, packed.arrays, site.rows, site.cols):
            if not np.isfinite(found).all():
                raise CheckError(f"the check failed: array '{name}' of {site.name} holds scales that are no numbers.")
            if name == "scales" and not found.any():  # a part of a sum may have nothing to add
                raise CheckError(f"the check failed: all scales of {site.name} are zero.")
        checkpoint.release(site)
    context = min(CONTEXT, checkpoint.config.context)
    need, free = checkpoint.data_bytes + kv_bytes(checkpoint.config, context, "f16"), available_memory()
    if free is not None and need > free:
        return {"generated": None, "why": f"the model needs {need / 1e6:.0f} MB to run and {free / 1e6:.0f} are free"}
    llm = LLM(checkpoint, context=context)
    prompt = llm.tokenizer.encode(PROMPT)[: context // 2] or [0]
    ids = list(prompt if tokens is None else tokens[: context - 1])
    sequence = llm.new_sequence(context)
    for hidden in llm.hidden(ids, sequence):
        for start in range(0, len(hidden), HEAD_ROWS):
            if not np.isfinite(llm.transformer.logits(hidden[start : start + HEAD_ROWS], copy=False)).all():
                raise CheckError("the check failed: the model's logits are not all numbers.")
    answer = llm.generate(prompt, max_tokens=min(TOKENS, context - len(prompt)))
    return {"prompt": PROMPT, "generated": answer.text, "tokens": answer.tokens}


def _scales(fmt: Format, arrays: Mapping[str, npt.NDArray[Any]], rows: int, cols: int) -> Iterator[tuple[str, F32]]:
    """The plain scales and minima of every matrix inside a format, as float32, by the names of their arrays."""
    for prefix, leaf, _, _ in leaves(fmt, rows, cols):
        if isinstance(leaf, Coded):
            yield from _of_coded(leaf, arrays, prefix)


def _of_coded(fmt: Coded, arrays: Mapping[str, npt.NDArray[Any]], prefix: str) -> Iterator[tuple[str, F32]]:
    for name, kind in (("scales", fmt.scale), ("mins", fmt.minimum)):
        if isinstance(kind, Coded):
            yield from _of_coded(kind, arrays, f"{prefix}{name}.")
        elif kind is not None:
            yield f"{prefix}{name}", scales.load(arrays[f"{prefix}{name}"], kind)
