"""A folder appears under its name whole or not at all, whatever goes wrong and wherever."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from folders import contents, everything

from gossamer.checkpoints.gguf import GGUFFile
from gossamer.compress.job import Written, compress
from gossamer.compress.preflight import Prediction
from gossamer.compress.recipe import of_format
from gossamer.compress.watch import Watch
from gossamer.errors import CheckpointError, FormatError, ResourceError, UsageError
from gossamer.models.checkpoint import open_checkpoint
from gossamer.models.load import Progress


class Steps(Watch):
    """Tells a function what is done of the fitting."""

    def __init__(self, tell: Progress | None) -> None:
        self.tell = tell or (lambda done, total: None)

    @contextmanager
    def phase(self, what: str) -> Iterator[Progress]:
        yield self.tell if what == "compressing" else lambda done, total: None


def write(source: Path, out: Path, fmt: str = "int4/g32", progress: Progress | None = None) -> Written:
    return compress(open_checkpoint(source), out, of_format(fmt), watch=Steps(progress))


# ---------------------------------------------------------------- the place


@pytest.mark.parametrize("place", ["taken", "taken/file/out", "/proc/gossamer", "small"])
def test_the_place_is_tried_before_the_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    if place == "small":
        monkeypatch.setattr(os, "statvfs", lambda path: NearlyFull())
    with pytest.raises((UsageError, ResourceError), match=rf"{place} (exists already|cannot be written)"):
        write(tiny, tmp_path / place, progress=lambda done, total: pytest.fail("the work began"))
    assert everything(tmp_path) == ["taken", "taken/file"]


class NearlyFull:
    """What a file system of 20 free blocks says of itself."""

    f_blocks, f_bavail, f_frsize, f_bsize = 1000, 20, 4096, 4096


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
def test_what_is_finished_is_kept_when_the_work_is_stopped(
    tiny: Path, tmp_path: Path, kind: type[BaseException]
) -> None:
    def stop(done: int, total: int) -> None:
        assert [p.name for p in (tmp_path / "new").iterdir()] == [".out.partial"]
        if done == total // 2:
            raise kind

    with pytest.raises(kind):
        write(tiny, tmp_path / "new" / "out", progress=stop)
    assert {"embed.safetensors", "journal.json"} <= set(everything(tmp_path / "new" / ".out.partial"))
    done = write(tiny, tmp_path / "new" / "out")
    assert done.resumed
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]
    assert contents(done.path) == contents(write(tiny, tmp_path / "whole").path)


def test_nothing_is_left_when_nothing_was_finished(tiny: Path, tmp_path: Path) -> None:
    class Stopped(Watch):
        def predicted(self, prediction: Prediction) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(open_checkpoint(tiny), tmp_path / "new" / "out", of_format("int4/g32"), watch=Stopped())
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


@pytest.mark.parametrize("good", [0, 5, 40, 60])
def test_a_disk_that_fills_up_loses_nothing_that_is_finished(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    real, calls = os.pwrite, 0

    def pwrite(*args: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > good:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(ResourceError, match=f"^{tmp_path}/out cannot be written: the disk is full") as caught:
            write(tiny, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert ".partial" not in str(caught.value)
    assert calls == good + 1
    assert (tmp_path / ".out.partial").exists() == (good > 0)
    assert not (tmp_path / "out").exists()
    assert write(tiny, tmp_path / "out").resumed == (good > 0)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "gossamer.json"])
def test_the_last_files_do_not_fit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    real = Path.write_text

    def write_text(self: Path, *args: Any, **options: Any) -> int:
        if self.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        with pytest.raises(ResourceError, match=f"^{tmp_path}/out cannot be written: the disk is full"):
            write(tiny, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    assert write(tiny, tmp_path / "out").resumed
