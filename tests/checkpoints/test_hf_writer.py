"""Plain folders: what others read from them is what was to be written, rounded to nearest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors

from gossamer.checkpoints.folder import Folder
from gossamer.checkpoints.hf_writer import PlainTensor, write_plain
from gossamer.errors import ResourceError, UsageError


def tensor(name: str, dtype: str, values: np.ndarray) -> PlainTensor:
    return PlainTensor(name, dtype, values.shape, lambda r0, r1: values[r0:r1])


def test_every_type_is_read_back_rounded(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((1200, 7)).astype(np.float32) * np.float32(1e-3)
    values[0, :4] = [0.0, -0.0, 65504.0, 6e-8]
    tensors = [tensor(kind, kind, values) for kind in ("F32", "F16", "BF16")] + [tensor("one", "F32", values[:, 0])]
    nbytes = write_plain(tmp_path / "out", {"config.json": json.dumps({"a": 1})}, tensors)
    assert nbytes == values.size * (4 + 2 + 2) + 4 * 1200
    folder = Folder(tmp_path / "out")
    assert folder.data_bytes == nbytes
    assert folder.config == {"a": 1}
    assert np.array_equal(folder.read("F32"), values)
    assert np.array_equal(folder.read("F16"), values.astype(np.float16).astype(np.float32))
    # To nearest, ties to even, by way of float64: 8 significant bits.
    mantissa, exponent = np.frexp(values.astype(np.float64))
    assert np.array_equal(folder.read("BF16"), np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32))
    assert np.array_equal(folder.read("one").ravel(), values[:, 0])
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "numpy") as theirs:
        assert np.array_equal(theirs.get_tensor("F16"), values.astype(np.float16))


@pytest.mark.parametrize(("kind", "value"), [("F16", 1e5), ("F16", np.nan), ("BF16", 3.4e38), ("F32", np.inf)])
def test_what_does_not_fit_leaves_nothing(kind: str, value: float, tmp_path: Path) -> None:
    values = np.ones((3, 4), np.float32)
    values[1, 2] = value
    with pytest.raises(UsageError, match=rf"holds a value that {kind} cannot"):
        write_plain(tmp_path / "out", {}, [tensor("w", kind, values)])
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    one = [tensor("w", "F32", np.ones((1, 1), np.float32))]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").touch()
    with pytest.raises(UsageError, match="exists already"):
        write_plain(tmp_path / "there", {}, one)
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="part of the path is a file"):
        write_plain(tmp_path / "file" / "out", {}, one)
    with pytest.raises(UsageError, match="takes F32, F16 or BF16"):
        write_plain(tmp_path / "out", {}, [tensor("w", "U16", np.ones((1, 1), np.float32))])
