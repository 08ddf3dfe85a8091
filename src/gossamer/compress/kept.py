"""Measured rows kept in a folder, each under a key of everything that its figures depend on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import gossamer
from gossamer import ops
from gossamer.checkpoints.safetensors_writer import write_error
from gossamer.errors import ResourceError
from gossamer.models.load import Progress

__all__ = ["SCHEMA", "Kept", "contents_hash", "machine", "row_key", "user_cache"]

SCHEMA = 1  # of a kept row; a row of another is measured again
_BLOCK = 1 << 20


class Kept:
    """The rows in ``folder``, which is made when the first is put there; ``fresh`` finds none of an earlier run."""

    def __init__(self, folder: Path, fresh: bool) -> None:
        self.folder, self._fresh = folder, fresh
        self._put: set[str] = set()

    def get(self, key: str) -> dict[str, Any] | None:
        """The figures; None for a row that is not there, or is not whole."""
        if self._fresh and key not in self._put:
            return None
        with suppress(OSError, ValueError, AttributeError):
            data = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            if data.get("schema") == SCHEMA and isinstance(data.get("figures"), dict):
                found: dict[str, Any] = data["figures"]
                return found
        return None

    def put(self, key: str, what: str, figures: dict[str, Any]) -> None:
        """Whole or not at all; ``what`` is for people. Raises ResourceError when it cannot be written."""
        path = self.folder / f"{key}.json"
        content = json.dumps({"schema": SCHEMA, "what": what, "figures": figures}, indent=1)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(content, encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise ResourceError(f"{write_error(path, error)}; name another place with --cache.") from None
        self._put.add(key)


def row_key(*parts: Any) -> str:
    """The name of what depends on ``parts`` (anything that JSON can say) and on this version."""
    said = json.dumps([SCHEMA, gossamer.__version__, *parts], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def contents_hash(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 of everything that a model's answers depend on: the .gguf file, or a folder's weights and JSON files."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".json"))
    sizes = [f.stat().st_size for f in files]
    digest, done = hashlib.sha256(), 0
    for file, size in zip(files, sizes):
        digest.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
        with open(file, "rb") as data:
            while block := data.read(_BLOCK):
                digest.update(block)
                done += len(block)
                if progress:
                    progress(done, sum(sizes))
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """What a speed depends on."""
    return {"isa": ops.isa(), "threads": ops.threads(), "cpu": _processor(), "node": platform.node()}


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def user_cache() -> Path:
    """``gossamer/compare`` in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path("~/.cache").expanduser()) / "gossamer" / "compare"
