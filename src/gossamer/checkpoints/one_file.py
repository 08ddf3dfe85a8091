"""A single file that appears under its name complete, or not at all. Folders: place.publish."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gossamer.checkpoints.place import is_alive
from gossamer.checkpoints.safetensors_writer import write_error
from gossamer.errors import GossamerError, ResourceError, UsageError

__all__ = ["check_space", "publish_file"]


@contextmanager
def publish_file(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden empty file beside ``out`` to write into, which gets that name when the block ends.

    When the block raises, the file is removed. What a killed process left is removed by the next one that writes to
    the same name. Raises UsageError when ``out`` exists, ResourceError when the place cannot be written or is full.
    """
    try:
        out = Path(os.path.realpath(out))
        if os.path.lexists(out):
            raise UsageError(f"{out} exists already; choose another name or remove it first.")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.parent / f".{out.name}.partial-{os.getpid()}"
        _sweep(out)
        partial.touch(exist_ok=False)
    except (OSError, ValueError) as error:
        raise _refusal(out, error) from None
    try:
        yield partial
        _finish(partial, out)
    except OSError as error:
        raise _refusal(out, error) from None
    except GossamerError as error:
        # The hidden name means nothing to a person, who asked for another.
        if str(partial) in str(error):
            raise type(error)(str(error).replace(str(partial), str(out))) from None
        raise
    finally:
        partial.unlink(missing_ok=True)


def check_space(path: Path, needed: int) -> None:
    """ResourceError when the disk has not ``needed`` bytes free; file systems that do not say are believed."""
    disk = os.statvfs(path.parent)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < needed:
        raise ResourceError(
            f"{path} cannot be written: it needs {needed} bytes and the disk has {free} free; "
            "free some space or choose another place."
        )


def _sweep(out: Path) -> None:
    """Removes what processes that are gone have left."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.partial-(\d+)")
    for name in os.listdir(out.parent):
        match = pattern.fullmatch(name)
        if match and int(match[1]) != os.getpid() and not is_alive(int(match[1])):
            with suppress(OSError):
                (out.parent / name).unlink()


def _finish(partial: Path, out: Path) -> None:
    fd = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    try:
        os.link(partial, out)  # unlike a rename it replaces nothing
    except FileExistsError:
        raise UsageError(f"{out} came into being meanwhile; choose another name or remove it.") from None
    except OSError:  # a file system without links
        os.rename(partial, out)
    directory = os.open(out.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _refusal(out: str | os.PathLike[str], error: OSError | ValueError) -> ResourceError:
    fault = error if isinstance(error, OSError) else OSError(str(error))  # a name with a NUL in it
    return write_error(Path(out), fault)
