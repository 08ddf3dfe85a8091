"""What of a compression is finished: parts in files of their own, and a journal that vouches for them.

A part is written under another name, flushed and renamed; then the journal, which holds its checksum, is replaced in
the same way. A kill at any moment therefore leaves parts that are whole, or that nobody counts on. Nothing is taken
from an earlier run whose checksum is not the one recorded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoints.folder import json_file
from gossamer.checkpoints.place import flush
from gossamer.checkpoints.safetensors import DTYPES, SafetensorsFile
from gossamer.checkpoints.safetensors_writer import SafetensorsWriter
from gossamer.errors import CheckpointError, UsageError
from gossamer.formats.node import ALIGN
from gossamer.models.config import shown

__all__ = ["Journal"]

Tensors = Mapping[str, npt.NDArray[Any]]

_VERSION = 1
_NAMES = {"uint8": "U8", "uint16": "U16", "uint32": "U32", "int32": "I32", "int64": "I64", "float16": "F16"} | {
    "float32": "F32",
    "float64": "F64",
}


class Journal:
    """The parts of one compression in ``folder``, begun with ``options``: what was asked, by the option's name.

    Raises UsageError where an earlier run was begun with other options, naming the first that differs.
    """

    def __init__(self, folder: Path, options: Mapping[str, str], out: Path) -> None:
        self.folder, self._path = folder, folder / "journal.json"
        self._data: dict[str, Any] = {"journal": _VERSION, "options": dict(options), "parts": {}}
        self._sound: set[str] = set()  # parts whose checksum was compared, or that this run wrote
        if self._path.exists():
            self._data = self._resumed(options, out)
        self.resumed = bool(self._data["parts"])

    def _resumed(self, options: Mapping[str, str], out: Path) -> dict[str, Any]:
        anew = f"or remove {self.folder} to begin anew"
        try:
            data = json_file(self._path)
            ok = data.get("journal") == _VERSION and isinstance(data["options"], dict) and _sound_parts(data["parts"])
        except (CheckpointError, KeyError):
            ok = False
        if not ok:
            raise UsageError(
                f"{out} was begun by another version, or its journal is damaged; choose another name {anew}."
            )
        for key, value in options.items():
            before = data["options"].get(key)
            if before != value:
                raise UsageError(
                    f"{out} was begun with {key} {_said(before)} and is now asked for with {_said(value)}; "
                    f"go on with the former, {anew}."
                )
        return data

    # ------------------------------------------------------------ parts

    @property
    def parts(self) -> list[str]:
        """The names of the finished parts in the order in which they were made."""
        return list(self._data["parts"])

    @property
    def nbytes(self) -> int:
        """What the finished parts take on the disk."""
        return sum(entry["bytes"] for entry in self._data["parts"].values())

    def record(self, name: str) -> dict[str, Any] | None:
        """What was recorded with a finished part, or None where there is none, or its file is not what was written."""
        entry = self._data["parts"].get(name)
        if entry is None:
            return None
        if name not in self._sound:
            path = self.folder / entry["file"]
            try:
                ok = path.stat().st_size == entry["bytes"] and _sha256(path) == entry["sha256"]
            except OSError:
                ok = False
            if not ok:
                self.forget(name)
                return None
            self._sound.add(name)
        found: dict[str, Any] = entry["record"]
        return found

    def forget(self, name: str) -> None:
        """Takes a part for not made."""
        del self._data["parts"][name]

    def open(self, name: str) -> SafetensorsFile:
        """The arrays of a finished part, memory-mapped."""
        return SafetensorsFile(self.folder / self._data["parts"][name]["file"])

    def finish(
        self, name: str, tensors: Tensors, record: Mapping[str, Any], types: Mapping[str, str] | None = None
    ) -> None:
        """Writes a part and vouches for it: after this it survives whatever happens to the process.

        ``record`` holds JSON values, ``types`` the safetensors types of arrays whose own do not tell. Raises
        ResourceError when the disk does not take it; earlier parts stay.
        """
        path = self.folder / f"{name}.safetensors"
        partial = path.with_suffix(".unfinished")
        own = types or {}
        specs = [(n, own.get(n) or _NAMES[a.dtype.name], tuple(a.shape)) for n, a in tensors.items()]
        with SafetensorsWriter(partial, specs, {"format": "gossamer part"}, ALIGN) as writer:
            for key, array in tensors.items():
                writer.write(key, array)
        entry = {"file": path.name, "bytes": partial.stat().st_size, "sha256": _sha256(partial), "record": dict(record)}
        os.replace(partial, path)
        self._data["parts"][name] = entry
        self._sound.add(name)
        self._write()

    def note(self, key: str, value: str) -> None:
        """Keeps a remark for the person who looks into the folder, such as why a check failed."""
        self._data[key] = value
        self._write()

    def _write(self) -> None:
        partial = self._path.with_suffix(".unfinished")
        partial.write_text(json.dumps(self._data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        flush(partial)
        os.replace(partial, self._path)
        flush(self.folder)


def _sound_parts(parts: Any) -> bool:
    keys = {"file": str, "bytes": int, "sha256": str, "record": dict}
    return isinstance(parts, dict) and all(
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), kind) for key, kind in keys.items())
        and os.path.basename(entry["file"]) == entry["file"] != ""
        for entry in parts.values()
    )


def _said(value: Any) -> str:
    return "nothing" if value in (None, "") else shown(value)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


assert all(np.dtype(name) == DTYPES[code] for name, code in _NAMES.items())
