"""The last look at what was written: scales that are no numbers, models that say nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gossamer.checkpoints.safetensors import SafetensorsFile
from gossamer.compress import check as checks
from gossamer.compress.check import CheckError, check
from gossamer.compress.job import compress
from gossamer.compress.recipe import of_format
from gossamer.models.checkpoint import open_checkpoint

SITE = "model.layers.1.mlp.down_proj"


def written(tiny: Path, out: Path, fmt: str) -> Path:
    return compress(open_checkpoint(tiny), out, of_format(fmt)).path


def overwrite(folder: Path, tensor: str, value: object) -> None:
    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    info = file.tensors[tensor]
    array = np.full_like(file.raw(tensor), value)
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + info.nbytes] = array.tobytes()
    path.write_bytes(data)


def test_a_sound_folder_speaks(tiny: Path, tmp_path: Path) -> None:
    folder = written(tiny, tmp_path / "out", "int4/g32")
    found = check(folder, np.arange(40, dtype=np.int32))
    assert found["prompt"] == "The capital of France is"
    assert 1 <= len(found["tokens"]) <= 16


@pytest.mark.parametrize(
    ("fmt", "array", "value", "needle"),
    [
        ("int4/g32", "scales", np.nan, r"array 'scales' of .*down_proj holds scales that are no numbers"),
        ("int4/g32", "scales", np.inf, "no numbers"),
        ("int4/g32", "scales", 0, r"all scales of .*down_proj are zero"),
        ("uint4/g32-m(f16)", "mins", np.nan, "array 'mins'"),
        ("int4/g32*(int8/row)", "scales.scales", np.inf, r"array 'scales\.scales'"),
        ("e2m1/g32*e8m0", "scales", 255, "no numbers"),
        ("int4/g32 + rank2(int8/row)", "1.1.scales", np.nan, r"array '1\.1\.scales'"),
    ],
)
def test_scales(tiny: Path, tmp_path: Path, fmt: str, array: str, value: object, needle: str) -> None:
    folder = written(tiny, tmp_path / "out", fmt)
    overwrite(folder, f"{SITE}.{array}", value)
    with pytest.raises(CheckError, match=needle):
        check(folder)


def test_logits(tiny: Path, tmp_path: Path) -> None:
    folder = written(tiny, tmp_path / "out", "f32 @ f32")
    overwrite(folder, f"{SITE}.values", np.nan)
    with pytest.raises(CheckError, match="logits are not all numbers"):
        check(folder, np.arange(40, dtype=np.int32))


def test_a_model_larger_than_memory_is_not_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tiny, tmp_path / "out", "int4/g32")
    monkeypatch.setattr(checks, "available_memory", lambda: 1000)
    found = check(folder)
    assert found["generated"] is None
    assert "MB to run" in found["why"]
