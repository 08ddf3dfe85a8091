"""``gossamer export`` as a person runs it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from program import environment, gossamer, refused

from gossamer.models.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "small"
    gossamer("compress", tiny, "-o", out, "--format", "int4/g32", "--keep", "embed=int8/g32", "--keep", "o=uint4/g32")
    return out


def test_gguf(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert "is stored as uint4/g32, which ggml has no type for; add --lossy" in refused(
        "export", folder, "--to", "gguf", "-o", out
    )
    assert not list(tmp_path.iterdir())
    done = gossamer("export", folder, "--to", "gguf", "-o", out, "--lossy", "Q6_K,Q8_0")
    assert done.code == 0
    assert "12 x Q4_0, 3 x Q8_0" in done.out
    assert "2 of 15 sites were stored anew; relative RMS error over all sites 0.00" in done.out
    assert "model.layers.1.self_attn.o_proj  Q8_0" in done.out
    assert "exists already" in refused("export", folder, "--to", "gguf", "-o", out, "--lossy", "Q8_0")
    assert open_checkpoint(out).config.layers == 2


def test_exact_and_json(folder: Path, tiny: Path, tmp_path: Path) -> None:
    done = gossamer("export", tiny, "--to", "gguf", "-o", tmp_path / "a.gguf")
    assert "every weight keeps its value exactly" in done.out
    found = gossamer("export", tiny, "--to", "gguf", "-o", tmp_path / "b.gguf", "--json").json
    assert found["relative_rms"] == {"overall": 0, "sites": {}}
    assert found["total_bytes"] == (tmp_path / "b.gguf").stat().st_size
    assert set(found["types"].values()) == {"Q4_1", "Q8_0"}
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_compressed_tensors(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "quantizes linear layers, and this is an embedding" in refused(
        "export", folder, "--to", "compressed-tensors", "-o", out
    )
    done = gossamer("export", folder, "--to", "compressed-tensors", "-o", out, "--lossy", "F32")
    assert done.code == 0
    assert "1 of 15 sites were stored anew; relative RMS error over all sites 0" in done.out
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
    assert "pack-quantized" not in gossamer("inspect", out).err
    assert gossamer("run", out, "-p", "the", "--raw", "--max-tokens", "3", "--temperature", "0").code == 0


def test_bad_options(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "--to" in refused("export", folder, "-o", out)
    assert "invalid choice: 'onnx'" in refused("export", folder, "--to", "onnx", "-o", out)
    assert "--output is empty" in refused("export", folder, "--to", "gguf", "-o", "")
    assert "does not read as TYPE" in refused("export", folder, "--to", "gguf", "-o", out, "--lossy", "Q8_0,")
    assert "--lossy q8_0 is no type" in refused("export", folder, "--to", "gguf", "-o", out, "--lossy", "q8_0")
    assert "'floppy'" in refused("export", folder, "--to", "compressed-tensors", "-o", out, "--lossy", "floppy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["gguf", "compressed-tensors"])
def test_a_disk_that_is_full_in_the_middle(to: str, folder: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = subprocess.run(
        [sys.executable, "-m", "gossamer", "export", folder, "--to", to, "-o", tmp_path / "out", "--lossy", "F32"],
        capture_output=True,
        env=environment(),
        preexec_fn=limit,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("gossamer: "), done.stderr
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path}/out cannot be written" in done.stderr
    assert not list(tmp_path.iterdir())
