"""A folder appears under its name whole or not at all, whatever goes wrong and wherever."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from gossamer.checkpoints.gguf import GGUFFile
from gossamer.compress.write import Written, compress
from gossamer.errors import CheckpointError, FormatError, ResourceError, UsageError
from gossamer.formats import parse
from gossamer.models.checkpoint import open_checkpoint
from gossamer.models.load import Plan, Progress


def write(source: Path, out: Path, fmt: str = "int4/g32", progress: Progress | None = None) -> Written:
    return compress(open_checkpoint(source), out, lambda site: parse(fmt), recipe={}, progress=progress)


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ---------------------------------------------------------------- the place


@pytest.mark.parametrize("place", ["taken", "taken/file/out", "/proc/gossamer", "small"])
def test_the_place_is_tried_before_the_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    if place == "small":
        monkeypatch.setattr(os, "fstatvfs", lambda fd: NearlyFull())
    begun: list[Plan] = []
    with pytest.raises((UsageError, ResourceError), match=rf"{place} (exists already|cannot be written)"):
        compress(open_checkpoint(tiny), tmp_path / place, lambda site: None, recipe={}, before_write=begun.append)
    assert begun == []
    assert everything(tmp_path) == ["taken", "taken/file"]


class NearlyFull:
    """What a file system of 20 free blocks says of itself."""

    f_blocks, f_bavail, f_frsize = 1000, 20, 4096


def test_what_exists_is_refused_and_left_alone(tiny: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    file.write_text("mine too")
    for out in (folder, file):
        with pytest.raises(UsageError, match=f"{out} exists already; choose another name or remove it"):
            write(tiny, out)
    assert everything(tmp_path) == ["file", "folder", "folder/precious"]
    assert (file.read_text(), (folder / "precious").read_text()) == ("mine too", "mine")


def test_a_compressed_folder_is_not_written_over_itself(tiny: Path, tmp_path: Path) -> None:
    done = write(tiny, tmp_path / "out")
    before = (done.path / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        write(done.path, done.path)
    assert (done.path / "model.safetensors").read_bytes() == before


def test_an_empty_folder_is_taken_and_missing_parents_are_made(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tiny, tmp_path / "empty")
    write(tiny, tmp_path / "a" / "b" / "out")
    files = ["config.json", "generation_config.json", "gossamer.json", "model.safetensors"]
    files += ["tokenizer.json", "tokenizer_config.json"]
    for out in ("empty", "a/b/out"):
        assert everything(tmp_path / out) == files
    assert everything(tmp_path / "a") == ["b", "b/out", *(f"b/out/{f}" for f in files)]


def test_a_place_below_a_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="file/a/out cannot be written: part of the path is a file"):
        write(tiny, tmp_path / "file" / "a" / "out")
    assert everything(tmp_path) == ["file"]


def test_a_place_that_takes_no_folders_is_refused(tiny: Path) -> None:
    with pytest.raises(ResourceError, match="/proc/gossamer cannot be written: "):
        write(tiny, Path("/proc/gossamer"))


# ---------------------------------------------------------------- the work


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError, ValueError])
def test_nothing_is_left_when_the_work_is_stopped(tiny: Path, tmp_path: Path, kind: type[BaseException]) -> None:
    def stop(done: int, total: int) -> None:
        assert [p.name for p in tmp_path.iterdir()] == ["new"]
        assert all(p.name.startswith(".") for p in (tmp_path / "new").iterdir())
        if done == total // 2:
            raise kind

    with pytest.raises(kind):
        write(tiny, tmp_path / "new" / "out", progress=stop)
    assert everything(tmp_path) == []


def damage(tiny: Path, path: Path, name: str, at: int, values: bytes) -> Path:
    data = bytearray(tiny.read_bytes())
    start = GGUFFile(tiny).tensors[name].offset + at
    data[start : start + len(values)] = values
    path.write_bytes(data)
    return path


NAN_F16, NAN_F32 = b"\x00\x7e", b"\x00\x00\xc0\x7f"


def test_nothing_is_left_of_weights_that_are_no_numbers(tiny: Path, tmp_path: Path) -> None:
    # A scale in the last layer, and a norm, which is written after every matrix.
    scale = damage(tiny, tmp_path / "scale.gguf", "blk.1.ffn_down.weight", 40, NAN_F16)
    norm = damage(tiny, tmp_path / "norm.gguf", "blk.1.ffn_norm.weight", 8, NAN_F32)
    for fmt in ("int4/g32", "bf16", "uint4/g32-m(f16)"):
        with pytest.raises((FormatError, CheckpointError), match=r"scale\.gguf: .*down.* NaN or an infinity"):
            write(scale, tmp_path / "out", fmt)
        with pytest.raises(CheckpointError, match=r"norm\.gguf: tensor 'blk\.1\.ffn_norm\.weight' holds a NaN"):
            write(norm, tmp_path / "out", fmt)
    assert everything(tmp_path) == ["norm.gguf", "scale.gguf"]


@pytest.mark.parametrize("good", [0, 1, 7, 28])
def test_nothing_is_left_when_the_disk_fills_up(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    real, calls = os.pwrite, 0

    def pwrite(*args: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > good:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ResourceError, match=f"^{tmp_path}/out cannot be written: the disk is full"):
        write(tiny, tmp_path / "out")
    assert calls == good + 1
    assert everything(tmp_path) == []


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "gossamer.json"])
def test_nothing_is_left_when_the_last_files_do_not_fit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    real = Path.write_text

    def write_text(self: Path, *args: Any, **options: Any) -> int:
        if self.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(ResourceError, match=f"^{tmp_path}/out cannot be written: the disk is full"):
        write(tiny, tmp_path / "out")
    assert everything(tmp_path) == []
