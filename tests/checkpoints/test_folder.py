"""Checkpoint folders: reading whole and sharded ones, and publishing one complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.checkpoints.folder import Folder, json_file, publish
from gossamer.checkpoints.safetensors_writer import SafetensorsWriter
from gossamer.errors import CheckpointError, GossamerError, ResourceError, UnsupportedError, UsageError

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.arange(6, dtype=np.float16).reshape(2, 3)
C = np.arange(5, dtype=np.float32)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    safetensors.numpy.save_file({"a": A, "b": B}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    safetensors.numpy.save_file({"a": A, "b": B}, folder / "model-00001-of-00002.safetensors")
    safetensors.numpy.save_file({"c": C}, folder / "model-00002-of-00002.safetensors")
    write_index(folder, a=1, b=1, c=2)
    return folder


def write_index(folder: Path, **shards: int) -> None:
    weight_map = {name: f"model-0000{shard}-of-00002.safetensors" for name, shard in shards.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_whole_folder(whole: Path) -> None:
    folder = Folder(whole)
    assert folder.config == {"model_type": "llama"}
    assert folder.generation_config is None
    assert folder.gossamer is None
    assert folder.metadata == {"format": "pt"}
    assert set(folder.tensors) == {"a", "b"}
    np.testing.assert_array_equal(folder.raw("b"), B)
    np.testing.assert_array_equal(folder.read("a", 1, 3), A[1:3])
    assert folder.data_bytes == A.nbytes + B.nbytes
    assert folder.files == {path.name: path.stat().st_size for path in whole.iterdir()}
    assert folder.total_bytes == sum(path.stat().st_size for path in whole.iterdir())
    with pytest.raises(CheckpointError, match="holds no tensor 'q' among its 2"):
        folder.read("q")


def test_sharded_folder_with_everything(sharded: Path) -> None:
    (sharded / "generation_config.json").write_text('{"temperature": 0.6}')
    (sharded / "gossamer.json").write_text('{"version": 1}')
    (sharded / "original").mkdir()
    folder = Folder(str(sharded))
    assert folder.generation_config == {"temperature": 0.6}
    assert folder.gossamer == {"version": 1}
    assert {name: info.shape for name, info in folder.tensors.items()} == {
        "a": (3, 4),
        "b": (2, 3),
        "c": (5,),
    }
    np.testing.assert_array_equal(folder.read("b"), B.astype(np.float32))
    np.testing.assert_array_equal(folder.read("c"), C)
    assert folder.data_bytes == A.nbytes + B.nbytes + C.nbytes
    assert "original" not in folder.files


def test_a_folder_of_links_as_the_hub_keeps_it(whole: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for path in whole.iterdir():
        (links / path.name).symlink_to(path)
    np.testing.assert_array_equal(Folder(links).read("a"), A)
    (whole / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Folder(links)


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "no", "No such file"),
        (tmp_path / "file", "is a file"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Folder(path)
    with pytest.raises(CheckpointError, match=r"has no config\.json; give a Hugging Face folder"):
        Folder(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has no config\.json; give the file .*m\.gguf itself"):
        Folder(tmp_path)


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard 'model-00002-of-00002\.safetensors'"):
        Folder(sharded)


def test_damaged_shard_is_named(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=re.escape(str(shard))):
        Folder(sharded)


def test_index_that_does_not_fit(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    write_index(sharded, a=1, b=2, c=2)
    with pytest.raises(CheckpointError, match="places tensor 'b' in model-00002-of-00002"):
        Folder(sharded)
    write_index(sharded, a=1, c=2, d=2)
    with pytest.raises(CheckpointError, match="places tensor 'd' in model-00002-of-00002"):
        Folder(sharded)
    write_index(sharded, a=1, c=2)  # a tensor that the index forgets is there all the same
    np.testing.assert_array_equal(Folder(sharded).raw("b"), B)
    for shard in ("../whole/model.safetensors", "/etc/passwd", "..", "", 3, None, "\ud800"):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(CheckpointError, match=r"as the file of tensor 'a'|lacks the shard '\\ud800'"):
            Folder(sharded)
    for weight_map in ({}, [], None, "x"):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match="has no 'weight_map'"):
            Folder(sharded)


def test_same_tensor_in_two_shards(sharded: Path) -> None:
    safetensors.numpy.save_file({"c": C, "a": A}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="holds tensor 'a' twice"):
        Folder(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickles_are_not_read(whole: Path, name: str) -> None:
    (whole / name).write_bytes(b"\x80\x02.")
    assert set(Folder(whole).tensors) == {"a", "b"}
    (whole / "model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match=f"pickle \\('{re.escape(name)}'\\).*convert them to safetensors"):
        Folder(whole)


def test_weights_under_another_name(whole: Path) -> None:
    (whole / "model.safetensors").rename(whole / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"has 'weights\.safetensors' but neither"):
        Folder(whole)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1,\n  "b" 2}', r"line 2, column 7: Expecting ':' delimiter"),
        (b"", "line 1, column 1"),
        (b"[1]", "should hold an object in braces and holds a list"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a":\n"\xff"}', "line 2: this is not UTF-8"),
        (b'{"a":' + b"[" * 100_000, "nests too deeply"),
        (b'{"a":' + b"1" * 5000 + b"}", ": a number in it has thousands of digits"),
    ],
)
def test_json_that_is_not_sound(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        json_file(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_json_of_any_size_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(10**12)
    with pytest.raises(CheckpointError, match="larger than the 64 MB"):
        json_file(path)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", tmp_path, tmp_path / "no", Path("/dev/zero")):
        with pytest.raises(CheckpointError):
            json_file(other)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_changed_folders_never_fail_otherwise(data: st.DataObject, sharded: Path) -> None:
    name = data.draw(st.sampled_from(["config.json", "model.safetensors.index.json"]))
    original = (sharded / name).read_bytes()
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    (sharded / name).write_bytes(changed[: data.draw(st.integers(0, len(changed)))])
    try:
        folder = Folder(sharded)
        for tensor in folder.tensors:
            folder.read(tensor)
    except GossamerError:
        pass
    finally:
        (sharded / name).write_bytes(original)


# publish


def run(out: Path, block: Callable[[Path], object] | None = None) -> None:
    """Publish `out` with one file, running `block` in the middle."""
    with publish(out) as folder:
        (folder / "f").write_text("x")
        if block:
            block(folder)


def fail(error: BaseException) -> Callable[[Path], object]:
    def block(folder: Path) -> None:
        raise error

    return block


def test_publish_gives_the_name_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with publish(out) as folder:
        assert folder.parent == out.parent
        assert folder.name == f".out.partial-{os.getpid()}"
        assert not out.exists()
        with SafetensorsWriter(folder / "model.safetensors", [("a", "F32", A.shape)]) as writer:
            writer.write("a", A)
        (folder / "config.json").write_text("{}")
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
    np.testing.assert_array_equal(Folder(out).read("a"), A)
    assert (out / "sub" / "file").read_text() == "x"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), FileNotFoundError(errno.ENOENT, "x", "/source")]
)
def test_publish_removes_all_after_an_error(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught:
        run(tmp_path / "deep" / "er" / "out", fail(error))
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_publish_into_an_empty_folder_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with publish(out) as folder:
        (folder / "f").write_text("x")
    assert os.listdir(out) == ["f"]
    for taken in (out, out / "f"):
        with (
            pytest.raises(UsageError, match="exists already; choose another name or remove it first"),
            publish(taken),
        ):
            pytest.fail("the block ran")
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "f").read_text() == "x"


def test_publish_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with publish(tmp_path / "link") as folder:
        (folder / "f").write_text("x")
    assert (tmp_path / "real" / "f").read_text() == "x"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_publish_when_the_name_is_taken_meanwhile(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def take(folder: Path) -> None:
        if kind == "folder":
            out.mkdir()
            (out / "mine").write_text("x")
        else:
            out.write_text("x")

    with pytest.raises(UsageError, match="came into being meanwhile"):
        run(out, take)
    assert os.listdir(tmp_path) == ["out"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out, message in (
        (tmp_path / "file" / "out", "part of the path is a file"),
        (tmp_path / "file" / "deep" / "out", "part of the path is a file"),
        (tmp_path / ("n" * 250), "the name is too long"),
        (Path("/proc/out"), "cannot be written"),
        (Path("a\0b"), "cannot be written"),
    ):
        with pytest.raises(ResourceError, match=message), publish(out):
            pytest.fail("the block ran")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_refusing_place_is_known_before_the_work(code: int, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(ResourceError, match=r"out cannot be written: .*; .*choose") as caught,
        publish(tmp_path / "out"),
    ):
        pytest.fail("the block ran")
    assert "\n" not in str(caught.value)


def test_a_disk_that_fills_during_the_work(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")  # the error names no file, as after any write to an open one

    with pytest.raises(ResourceError, match=r"out cannot be written: the disk is full"):
        run(tmp_path / "out", fill)
    assert list(tmp_path.iterdir()) == []


def test_only_trouble_with_the_place_is_told_of_the_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ResourceError, match=r"out cannot be written: permission is denied"):
        run(out, lambda folder: fail(PermissionError(errno.EACCES, "no", str(folder / "f")))(folder))
    with pytest.raises(PermissionError):
        run(out, fail(PermissionError(errno.EACCES, "no", str(tmp_path / "source"))))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_at_the_end(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "fsync", fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(ResourceError, match="the disk is full"):
        run(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def spawn(out: Path) -> subprocess.Popen[str]:
    """A process that writes half of `out`, says so, and waits."""
    code = textwrap.dedent(
        """
        import sys, time
        from gossamer.checkpoints.folder import publish
        with publish(sys.argv[1]) as folder:
            (folder / "half").write_bytes(bytes(1000))
            print(folder, flush=True)
            time.sleep(60)
        """
    )
    return subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_in_the_middle(how: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with spawn(out) as process:
        assert process.stdout is not None
        partial = Path(process.stdout.readline().strip())
        assert (partial / "half").exists()
        # While it lives, nobody else may write that name; another name is free.
        with pytest.raises(UsageError, match="is being written by another process"), publish(out):
            pytest.fail("the block ran")
        with publish(tmp_path / "ou"):
            pass
        process.send_signal(how)
        process.wait()
    assert not out.exists()
    assert partial.exists() == (how != signal.SIGINT)
    with publish(out) as folder:
        assert not partial.exists() or partial == folder
        (folder / "f").write_text("x")
    assert sorted(os.listdir(tmp_path)) == ["ou", "out"]


def test_a_leftover_whose_process_number_lives_again(tmp_path: Path) -> None:
    leftovers = [tmp_path / f".out.partial-{number}" for number in (os.getpid(), os.getppid(), 10**30)]
    others = [tmp_path / name for name in (".out.partial-", ".out.partial-1x", ".out2.partial-1")]
    for path in leftovers + others:
        path.mkdir()
        (path / "old").write_text("x")
    with publish(tmp_path / "out") as folder:
        assert os.listdir(folder) == []
    assert sorted(os.listdir(tmp_path)) == sorted(["out", *(path.name for path in others)])


def test_a_leftover_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "f").write_text("x")
    (tmp_path / ".out.partial-1").symlink_to(tmp_path / "precious")
    with pytest.raises(ResourceError), publish(tmp_path / "out"):
        pytest.fail("the block ran")
    assert (tmp_path / "precious" / "f").exists()


def test_two_threads_cannot_write_one_name(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def second() -> None:
        try:
            with publish(tmp_path / "out"):
                pass
        except BaseException as error:
            caught.append(error)

    with publish(tmp_path / "out") as folder:
        (folder / "f").write_text("x")
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert (folder / "f").exists()
    assert [type(error) for error in caught] == [UsageError]
    assert os.listdir(tmp_path / "out") == ["f"]


def test_without_locks_the_process_number_decides(tmp_path: Path, monkeypatch: Any) -> None:
    def unsupported(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unsupported)
    alive = tmp_path / f".out.partial-{os.getppid()}"
    alive.mkdir()
    with pytest.raises(UsageError, match="is being written"), publish(tmp_path / "out"):
        pytest.fail("the block ran")
    alive.rename(tmp_path / f".out.partial-{2**22 + 1}")  # beyond the largest process number
    with publish(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out"]
