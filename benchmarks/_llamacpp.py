"""llama.cpp as the other side of a comparison of quality: its quantizer, its importance matrix, its logits."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gossamer.compress.calibrate import calibrate
from gossamer.compress.calibration_text import calibration_text
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.family import gguf_name
from gossamer.models.load import Progress
from gossamer.models.transformer import HEAD_ROWS

__all__ = ["Logits", "importance", "quantize"]

_WORKER = Path(__file__).with_name("_llamacpp_worker.py")


class Logits:
    """What a GGUF file predicts in llama.cpp: a ``Predictor`` of gossamer.evaluate.divergence. ``close`` ends it."""

    def __init__(self, path: Path, python: str, threads: int, tokens: int) -> None:
        self.name = path.name
        self._process = subprocess.Popen(
            [python, str(_WORKER), str(path), str(threads), str(tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        line = self._out.readline()
        if not line:
            raise SystemExit(f"llama.cpp cannot run {path} (exit code {self._process.wait()})")
        about = json.loads(line)
        self.version, self.vocab = about["version"], about["vocab"]

    def predictions(self, ids: Sequence[int], first: int) -> Iterator[np.ndarray]:
        self._in.write(json.dumps({"ids": list(ids), "first": first}).encode() + b"\n")
        self._in.flush()
        left = len(ids) - first
        while left:
            rows = min(left, HEAD_ROWS)
            data = self._out.read(4 * rows * self.vocab)
            if len(data) < 4 * rows * self.vocab:
                raise SystemExit(f"llama.cpp stopped on {self.name}")
            left -= rows
            yield np.frombuffer(bytearray(data), np.float32).reshape(rows, self.vocab)

    def close(self) -> None:
        self._in.close()
        self._out.close()
        self._process.wait()


def quantize(source: Path, target: Path, kind: str, matrix: Path | None, python: str) -> None:
    """``source`` as llama.cpp's type ``kind``, in one file that appears when it is whole."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / target.name
        command = [python, str(_WORKER), "quantize", str(source), str(partial), kind, str(matrix or "-")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr.strip().splitlines()[-1])
        partial.rename(target)


def importance(checkpoint: Checkpoint, path: Path, tokens: int, progress: Progress | None = None) -> None:
    """The mean square of every column that a matrix reads, as llama.cpp's own tool collects it, into an .npz.

    The text is the one that our calibrated recipes look at, so that both sides know the same. The table of a tied head
    has no entry, which is that tool's default too.
    """
    text = calibration_text(checkpoint, tokens=tokens)
    sites = [s for s in checkpoint.topology.sites if s.layer is not None]
    found: dict[str, np.ndarray] = {}
    for statistics in calibrate(checkpoint, text.sequences, hessian=False, progress=progress):
        for site in sites:
            if site.shares in statistics:
                found[f"{gguf_name(site.name, checkpoint.config)}.weight"] = statistics[site.shares].square
    np.savez(path, **found)
