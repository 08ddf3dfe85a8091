"""What calibration knows about the input of linear sites, how it is summed up, and the file that keeps it.

Sums run in float64 over steps of 512 tokens that begin at multiples of 512, so the same tokens in the same order give
the same bytes however they were handed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoints.safetensors import SafetensorsFile
from gossamer.checkpoints.safetensors_writer import SafetensorsWriter, write_error
from gossamer.errors import CheckpointError, ResourceError, UsageError
from gossamer.limits import available_memory

__all__ = ["ROWS", "SAMPLES", "STEP", "Collector", "Statistics", "load_statistics", "save_statistics"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

SAMPLES = 512  # tokens whose inputs are kept as they are, unless another number is asked for
STEP = 512  # tokens multiplied at once in float32: a longer product would lose digits
ROWS = 1024  # of the Hessian, updated at once


@dataclass
class Statistics:
    """Of one input (of the sites that share it), over ``tokens`` calibration tokens.

    ``hessian`` is E[x x^T], float32 [cols, cols], symmetric, or None where it was not asked for; ``absmax`` (largest
    |x|), ``mean_abs`` (E|x|), ``mean`` (E[x]) and ``square`` (E[x^2], the diagonal of the Hessian) are float32 [cols].
    ``samples`` is float32 [at most 512, cols]: the inputs of tokens at even distances.
    """

    tokens: int
    hessian: F32 | None
    absmax: F32
    mean_abs: F32
    mean: F32
    square: F32
    samples: F32

    @property
    def cols(self) -> int:
        return len(self.square)


class Collector:
    """Sums up inputs of ``cols`` columns, ``expected_tokens`` of them in all.

    ``samples`` of the expected tokens are kept, at even distances. With ``hessian`` it takes 8 cols^2 bytes.
    Raises ResourceError when that memory is not there.
    """

    def __init__(self, cols: int, *, hessian: bool, samples: int, expected_tokens: int) -> None:
        need, free = 12 * cols * cols, available_memory()
        if hessian and free is not None and need > free:
            raise ResourceError(
                f"the second moments of an input of {cols} columns need {need / 1e6:.0f} MB, but only "
                f"{free / 1e6:.0f} MB are free; choose a method that does not need them, or a larger machine."
            )
        self._hessian: F64 | None = np.zeros((cols, cols)) if hessian else None
        self._sums = np.zeros((3, cols))  # of x, |x|, x^2
        self._absmax = np.zeros(cols, np.float32)
        kept = min(samples, expected_tokens)
        self._wanted = np.arange(kept, dtype=np.int64) * expected_tokens // max(1, kept)
        self._samples: list[F32] = []
        self._pending = np.empty((STEP, cols), np.float32)
        self._waiting = 0
        self.tokens = 0

    def add(self, x: F32) -> None:
        """The inputs of the next tokens, float32 [n, cols]."""
        first, last = np.searchsorted(self._wanted, (self.tokens, self.tokens + len(x)))
        if first < last:
            self._samples.append(x[self._wanted[first:last] - self.tokens])
        self.tokens += len(x)
        while len(x):
            n = min(len(x), STEP - self._waiting)
            self._pending[self._waiting : self._waiting + n] = x[:n]
            self._waiting += n
            x = x[n:]
            if self._waiting == STEP:
                self._flush()

    def _flush(self) -> None:
        x = self._pending[: self._waiting]
        self._waiting = 0
        size = np.abs(x)
        np.maximum(self._absmax, size.max(axis=0), out=self._absmax)
        self._sums[0] += x.sum(axis=0, dtype=np.float64)
        self._sums[1] += size.sum(axis=0, dtype=np.float64)
        self._sums[2] += np.square(x, dtype=np.float64).sum(axis=0)
        if self._hessian is not None:  # the upper triangle; the rest is its mirror image
            for r in range(0, x.shape[1], ROWS):
                self._hessian[r : r + ROWS, r:] += x[:, r : r + ROWS].T @ x[:, r:]

    def result(self) -> Statistics:
        """The statistics of all tokens, which ends the collection.

        Raises UsageError when there were none, or when an input is no number.
        """
        if not self.tokens:
            raise UsageError("statistics of no tokens were asked for; calibrate with a text.")
        if self._waiting:
            self._flush()
        mean, mean_abs, square = (self._sums / self.tokens).astype(np.float32)
        if not np.isfinite(square).all():
            column = int(np.flatnonzero(~np.isfinite(square))[0])
            raise UsageError(
                f"column {column} of an input holds a NaN, an infinity or values whose squares float32 cannot hold; "
                "check the model with 'gossamer eval'."
            )
        samples = np.concatenate(self._samples) if self._samples else np.empty((0, len(square)), np.float32)
        return Statistics(self.tokens, self._mirrored(square), self._absmax, mean_abs, mean, square, samples)

    def _mirrored(self, diagonal: F32) -> F32 | None:
        if self._hessian is None:
            return None
        n = len(diagonal)
        out = np.empty((n, n), np.float32)
        for r in range(0, n, ROWS):
            out[r : r + ROWS, r:] = self._hessian[r : r + ROWS, r:] / self.tokens
            out[r : r + ROWS, :r] = out[:r, r : r + ROWS].T
            block = out[r : r + ROWS, r : r + ROWS]
            block[:] = np.triu(block) + np.triu(block, 1).T
        np.fill_diagonal(out, diagonal)
        return out


# ---------------------------------------------------------------- the file

_FORMAT = "gossamer statistics 1"
_VECTORS = ("absmax", "mean_abs", "mean", "square")
# What a difference in an entry of ``about`` means to a person.
_OTHERS = {"model": "another model", "tokenizer": "another tokenizer", "text": "another text"}


def save_statistics(
    path: str | os.PathLike[str], statistics: Mapping[str, Statistics], about: Mapping[str, Any]
) -> None:
    """Writes statistics by group (``Site.shares``) as a safetensors file, which appears complete or not at all.

    ``about`` says what they are of, as JSON values: ``load_statistics`` compares it. Tensors are named
    "GROUP.FIELD", all float32. Raises ResourceError when the place cannot be written.
    """
    path = Path(path)
    tensors: dict[str, F32] = {}
    for group, s in statistics.items():
        fields = {name: getattr(s, name) for name in ("hessian", *_VECTORS, "samples")}
        tensors |= {f"{group}.{name}": array for name, array in fields.items() if array is not None}
    metadata = {
        "format": _FORMAT,
        "about": json.dumps(dict(about), sort_keys=True),
        "tokens": json.dumps({group: s.tokens for group, s in statistics.items()}),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with SafetensorsWriter(partial, [(n, "F32", a.shape) for n, a in tensors.items()], metadata) as writer:
            for name, array in tensors.items():
                writer.write(name, array)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise write_error(path, error) from None
    except ResourceError as error:
        raise ResourceError(str(error).replace(str(partial), str(path))) from None


def load_statistics(path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> dict[str, Statistics]:
    """What ``save_statistics`` wrote, by group.

    Raises CheckpointError for a file that is damaged or something else, and UsageError for one whose ``about`` differs
    from the one given: of another model, tokenizer or text.
    """
    file = SafetensorsFile(path)
    stored, counts = (_object(file, key) for key in ("about", "tokens"))
    if file.metadata.get("format") != _FORMAT:
        raise _damaged(file, "it is no file of statistics, or of another version")
    if about is not None and stored != (wanted := json.loads(json.dumps(dict(about)))):
        key = next(k for k in sorted(set(wanted) | set(stored)) if wanted.get(k) != stored.get(k))
        raise UsageError(
            f"{file.path} holds statistics of {_OTHERS.get(key, f'another {key!r}')} than this one; "
            "remove the file to calibrate again, or give the one that belongs here."
        )
    found = {group: _read(file, group, count) for group, count in counts.items()}
    if surplus := sorted(set(file.tensors) - {f"{g}.{n}" for g in counts for n in ("hessian", *_VECTORS, "samples")}):
        raise _damaged(file, f"the tensor {surplus[0]!r} belongs to no group")
    return found


def _read(file: SafetensorsFile, group: str, tokens: object) -> Statistics:
    if type(tokens) is not int or tokens < 1:
        raise _damaged(file, f"{group!r} counts {tokens!r} tokens")
    square, samples = (file.tensors.get(f"{group}.{name}") for name in ("square", "samples"))
    cols = square.shape[0] if square and len(square.shape) == 1 else 0
    kept = samples.shape[0] if samples and samples.shape else 0
    shapes = dict.fromkeys(_VECTORS, (cols,)) | {"samples": (kept, cols), "hessian": (cols, cols)}
    arrays: dict[str, F32] = {}
    for name, shape in shapes.items():
        info = file.tensors.get(f"{group}.{name}")
        if info is None and name == "hessian":
            continue
        if info is None or not cols or kept > tokens or info.dtype != "F32" or info.shape != shape:
            raise _damaged(file, f"the tensor '{group}.{name}' is missing or has another type or shape")
        arrays[name] = file.read(info.name)
        if not np.isfinite(arrays[name]).all():
            raise _damaged(file, f"the tensor '{group}.{name}' holds a NaN or an infinity")
    return Statistics(tokens, hessian=arrays.pop("hessian", None), **arrays)


def _object(file: SafetensorsFile, key: str) -> dict[str, Any]:
    try:
        value = json.loads(file.metadata.get(key, ""))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _damaged(file, f"its header has no sound '{key}'")
    return value


def _damaged(file: SafetensorsFile, what: str) -> CheckpointError:
    return CheckpointError(f"{file.path} cannot be used as statistics: {what}; remove it to calibrate again.")
