"""A checkpoint folder in the Hugging Face layout: read one, or publish one atomically.

Such a folder holds `config.json`, the weights as `model.safetensors` or as several shards named by
`model.safetensors.index.json`, tokenizer files, and perhaps `generation_config.json`. A folder that
Gossamer compressed holds `gossamer.json` besides.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.checkpoints.safetensors import (
    SafetensorsFile,
    TensorInfo,
    json_fault,
    quote,
    unique_pairs,
)
from gossamer.checkpoints.safetensors_writer import write_error
from gossamer.errors import CheckpointError, ResourceError, UnsupportedError, UsageError

__all__ = ["Folder", "json_file", "publish"]

_JSON_LIMIT = 64 << 20  # bytes; the index of the largest published checkpoints has about 10 MB
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG)


def json_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file, of at most 64 MB.

    Raises CheckpointError, with line and column, for anything else.
    """
    path = Path(path)
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is not a regular file; give the path of a JSON file")
            # One byte more than allowed, because a file can grow between the two calls.
            data = file.read(_JSON_LIMIT + 1) if status.st_size <= _JSON_LIMIT else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read: {reason}") from None
    if data is None or len(data) > _JSON_LIMIT:
        raise CheckpointError(f"{path} is larger than the {_JSON_LIMIT >> 20} MB that a JSON file may have")
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique_pairs)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; mend the file or fetch it again"
        ) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CheckpointError(f"{path}, line {line}: this is not UTF-8; fetch the file again") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {json_fault(error)}; mend the file or fetch it again") from None
    except RecursionError:
        raise CheckpointError(f"{path} nests too deeply; fetch the file again") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} should hold an object in braces and holds a {type(parsed).__name__}")
    return parsed


class Folder:
    """A folder in the Hugging Face layout, its headers checked and its shards memory-mapped.

    config             config.json
    generation_config  generation_config.json, or None
    gossamer           gossamer.json (formats, recipe, provenance), or None
    files              size in bytes of each file directly in the folder
    tensors            every tensor of every shard, in the order of the data, by name
    metadata           the shards' string tables, merged
    data_bytes         sum of the shards' data sections
    total_bytes        sum of `files`

    Raises CheckpointError for what is missing or damaged, naming it; UnsupportedError for weights in
    another form than safetensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = self._list()
        if "config.json" not in self.files:
            raise self._no_config()
        self.config = json_file(self.path / "config.json")
        self.generation_config = self._optional("generation_config.json")
        self.gossamer = self._optional("gossamer.json")
        self.total_bytes = sum(self.files.values())
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self.data_bytes = 0
        self._shard_of: dict[str, SafetensorsFile] = {}
        weight_map = self._weight_map()
        for name in sorted(set(weight_map.values())) if weight_map is not None else [_SINGLE]:
            self._add(SafetensorsFile(self.path / name))
        for tensor, shard in (weight_map or {}).items():
            if tensor not in self._shard_of or self._shard_of[tensor].path.name != shard:
                raise CheckpointError(
                    f"{self.path / _INDEX} places tensor {quote(tensor)} in {shard}, which does not hold it; "
                    f"fetch both files again"
                )

    def raw(self, name: str) -> NDArray[Any]:
        """The tensor as stored, a view: see SafetensorsFile.raw."""
        return self._shard(name).raw(name)

    def read(self, name: str, r0: int = 0, r1: int | None = None) -> NDArray[np.float32]:
        """Rows r0..r1 as a new float32 array: see SafetensorsFile.read."""
        return self._shard(name).read(name, r0, r1)

    def release(self, name: str) -> None:
        """Lets a tensor's pages leave this process: see SafetensorsFile.release."""
        self._shard(name).release(name)

    def _shard(self, name: str) -> SafetensorsFile:
        shard = self._shard_of.get(name)
        if shard is None:
            raise CheckpointError(
                f"{self.path} holds no tensor {quote(name)} among its {len(self.tensors)}: the checkpoint is "
                f"of another architecture or lacks a part; fetch it again"
            )
        return shard

    def _list(self) -> dict[str, int]:
        files = {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.is_file():  # follows links, as the hub's cache is made of them
                        files[entry.name] = entry.stat().st_size
        except NotADirectoryError:
            raise CheckpointError(f"{self.path} is a file and not a checkpoint folder") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{self.path} cannot be read: {reason}") from None
        return dict(sorted(files.items()))

    def _optional(self, name: str) -> dict[str, Any] | None:
        return json_file(self.path / name) if name in self.files else None

    def _weight_map(self) -> dict[str, str] | None:
        """Tensor name -> shard by the index, or None when one file holds everything."""
        if _SINGLE in self.files:
            return None
        if _INDEX not in self.files:
            raise self._no_weights()
        index = self.path / _INDEX
        weight_map = json_file(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no 'weight_map' from tensors to files; fetch it again")
        for tensor, shard in weight_map.items():
            # A shard lies in the folder itself: an index may not lead a reader to other places.
            if not isinstance(shard, str) or os.path.basename(shard) != shard or shard in ("", ".", ".."):
                raise CheckpointError(
                    f"{index} gives {quote(shard)} as the file of tensor {quote(tensor)}; fetch it again"
                )
            if shard not in self.files:
                raise CheckpointError(
                    f"{self.path} lacks the shard {quote(shard)}, which {_INDEX} names; fetch that file"
                )
        return weight_map

    def _no_config(self) -> CheckpointError:
        gguf = next((name for name in self.files if name.endswith(".gguf")), None)
        todo = f"give the file {self.path / gguf} itself" if gguf else "give a Hugging Face folder or a .gguf file"
        return CheckpointError(f"{self.path} has no config.json; {todo}")

    def _no_weights(self) -> CheckpointError:
        pickles = [name for name in self.files if name.endswith(_PICKLES)]
        others = [name for name in self.files if name.endswith(".safetensors")]
        if others:
            return CheckpointError(
                f"{self.path} has {others[0]!r} but neither {_SINGLE} nor {_INDEX}; "
                f"rename it, or fetch the index if it is one of several"
            )
        if pickles:
            return UnsupportedError(
                f"{self.path} has its weights as a pickle ({pickles[0]!r}), which can run any code when it "
                f"is read; convert them to safetensors first"
            )
        return CheckpointError(f"{self.path} has neither {_SINGLE} nor {_INDEX}; fetch its weights")

    def _add(self, shard: SafetensorsFile) -> None:
        for name in shard.tensors:
            if name in self._shard_of:
                raise CheckpointError(
                    f"{self.path} holds tensor {quote(name)} twice, in {self._shard_of[name].path.name} "
                    f"and in {shard.path.name}; remove the file that does not belong to it"
                )
            self._shard_of[name] = shard
        self.tensors.update(shard.tensors)
        self.metadata.update(shard.metadata)
        self.data_bytes += shard.data_bytes


@contextmanager
def publish(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that appears under the name `out` complete, or not at all.

    Gives a hidden folder beside `out` to write into, made at once, so that a place that cannot be written
    is refused before any work. When the block ends, everything is flushed to the disk and the folder
    renamed; when the block raises, the folder is removed. What a killed process left is removed by the
    next one that writes to the same name.

    Raises UsageError when `out` exists and is not an empty folder or when another process is writing it,
    ResourceError when the place cannot be written or is full.
    """
    try:
        out = Path(os.path.realpath(out))
        _refuse_existing(out)
        made = _make_parents(out.parent)
    except (OSError, ValueError) as error:
        raise _place_error(out, error) from None
    try:
        partial, lock = _make_partial(out)
        try:
            yield partial
            _finish(partial, out)
        except OSError as error:
            if _is_of(error, partial):
                raise _place_error(out, error) from None
            raise
        finally:
            # After the rename there is nothing under this name.
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)
    except BaseException:
        for folder in made:
            with suppress(OSError):  # somebody else may use it by now
                folder.rmdir()
        raise


def _refuse_existing(out: Path) -> None:
    try:
        with os.scandir(out) as entries:
            if next(entries, None) is None:
                return
    except FileNotFoundError:
        return
    except NotADirectoryError:
        if not out.exists():  # a parent is the file; making the folder will say so
            return
    raise UsageError(f"{out} exists already; choose another name or remove it first")


def _make_parents(parent: Path) -> list[Path]:
    """Make what is missing of `parent`; returns the folders made, innermost first."""
    missing = []
    while not parent.is_dir() and parent != parent.parent:
        missing.append(parent)
        parent = parent.parent
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir()
            made.insert(0, folder)
    except OSError:
        for folder in made:
            folder.rmdir()
        raise
    return made


def _make_partial(out: Path) -> tuple[Path, int]:
    """A new `.NAME.partial-PID` beside `out`, and the descriptor whose lock says that its writer lives.

    A lock tells more than the process number does: numbers are used again, and mean nothing to another
    container that shares the disk.
    """
    pattern = re.compile(rf"\.{re.escape(out.name)}\.partial-(\d+)")
    try:
        for sibling in os.listdir(out.parent):
            match = pattern.fullmatch(sibling)
            if match is None:
                continue
            leftover = out.parent / sibling
            lock = _lock(leftover, int(match[1]))
            if lock is None:
                raise _busy(out)
            shutil.rmtree(leftover)
            os.close(lock)
        partial = out.parent / f".{out.name}.partial-{os.getpid()}"
        partial.mkdir()
        lock = _lock(partial, os.getpid())
    except OSError as error:
        raise _place_error(out, error) from None
    if lock is None:
        raise _busy(out)
    return partial, lock


def _lock(folder: Path, writer: int) -> int | None:
    """A descriptor that holds the folder's lock, or None when it is held or the folder went away."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held = True
    except OSError:  # a file system without locks: the process number has to do
        held = writer != os.getpid() and _is_alive(writer)
    else:
        held = False
    if held:
        os.close(fd)
        return None
    return fd


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _finish(partial: Path, out: Path) -> None:
    """Flush everything in `partial` to the disk and give it its name."""
    try:
        for where, _, names in os.walk(partial, topdown=False):
            for name in names:
                _fsync(os.path.join(where, name))
            _fsync(where)
        os.rename(partial, out)  # replaces an empty folder, and nothing else
        _fsync(out.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UsageError(f"{out} came into being meanwhile; choose another name or remove it") from None
        raise _place_error(out, error) from None


def _fsync(path: str | Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_of(error: OSError, partial: Path) -> bool:
    """Whether the error is about writing into `partial`, and not about something the block did elsewhere."""
    if not isinstance(error.filename, (str, bytes)):  # a write to an open file names none
        return error.errno in _FULL
    path = Path(os.path.realpath(os.fsdecode(error.filename)))
    return path.is_relative_to(partial) and error.errno in _FULL + _REFUSED


def _busy(out: Path) -> UsageError:
    return UsageError(f"{out} is being written by another process; wait for it or choose another name")


def _place_error(out: str | os.PathLike[str], error: OSError | ValueError) -> ResourceError:
    fault = error if isinstance(error, OSError) else OSError(str(error))  # a name with a NUL in it
    return write_error(Path(out), fault)


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
