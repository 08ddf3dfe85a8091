"""A checkpoint folder in the Hugging Face layout, read. Written ones appear under their name at once: place.py.

Such a folder holds `config.json`, the weights as `model.safetensors` or as several shards named by
`model.safetensors.index.json`, tokenizer files, and perhaps `generation_config.json`. A folder that
Gossamer compressed holds `gossamer.json` besides.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.checkpoints.place import publish
from gossamer.checkpoints.safetensors import (
    SafetensorsFile,
    TensorInfo,
    json_fault,
    quote,
    unique_pairs,
)
from gossamer.errors import CheckpointError, UnsupportedError

__all__ = ["Folder", "json_file", "publish"]

_JSON_LIMIT = 64 << 20  # bytes; the index of the largest published checkpoints has about 10 MB
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


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


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
