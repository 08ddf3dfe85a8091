"""Folders that appear under their name complete or not at all, and the work beside them that outlives a kill.

A writer makes a hidden folder beside the one it was asked for, locks it, and renames what is finished. A lock tells
more than a process number does: numbers are used again, and mean nothing to another container that shares the disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gossamer.checkpoints.safetensors_writer import write_error
from gossamer.errors import ResourceError, UsageError

__all__ = ["Workplace", "flush", "is_alive", "publish", "workplace"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG)
_PID = "pid"  # in a workplace: the number of the process that works there
_PUBLISHED = "published"  # in a workplace whose folder has its name, or is about to get it


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
        partial, lock = _new_partial(out)
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


class Workplace:
    """The hidden folder ``.NAME.partial`` beside a folder that is being made, ours alone while the lock is held.

    keep  whether what is in it is worth going on from: else it is removed when the work ends
    """

    def __init__(self, out: Path, folder: Path) -> None:
        self.out, self.folder = out, folder
        self.keep = False

    def publish(self, finished: Path) -> None:
        """Gives ``finished``, a folder inside the workplace, its name, in one step and flushed to the disk.

        Raises UsageError when the name was taken meanwhile, ResourceError when the place cannot be written.
        """
        (self.folder / _PUBLISHED).touch()
        _finish(finished, self.out)
        self.keep = False


@contextmanager
def workplace(out: str | os.PathLike[str]) -> Iterator[Workplace]:
    """A place to work on the folder `out`, with what an earlier run left there.

    Made at once, so that a place that cannot be written is refused before any work. When the block ends, the workplace
    is removed, except where `keep` is set: then the next run on the same name finds it. The lock goes with the process.

    Raises UsageError when `out` exists and is not an empty folder or when another process is writing it,
    ResourceError when the place cannot be written or is full.
    """
    try:
        out = Path(os.path.realpath(out))
        folder = out.parent / f".{out.name}.partial"
        if not (folder / _PUBLISHED).exists():
            _refuse_existing(out)
        made = _make_parents(out.parent)
    except (OSError, ValueError) as error:
        raise _place_error(out, error) from None
    place = Workplace(out, folder)
    try:
        lock = _take(place)
        try:
            # A run that was killed after its folder had its name left only rubbish.
            if (folder / _PUBLISHED).exists() and out.exists():
                _refuse_existing(out)
            (folder / _PUBLISHED).unlink(missing_ok=True)
            place.keep = any(name != _PID for name in os.listdir(folder))
            yield place
        except OSError as error:
            if _is_of(error, folder):
                raise _place_error(out, error) from None
            raise
        finally:
            if not place.keep:
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    except BaseException:
        for parent in made:
            with suppress(OSError):  # something is kept there, or somebody else uses it by now
                parent.rmdir()
        raise


def _take(place: Workplace) -> int:
    """Makes the workplace, or takes over what a dead process left; returns the descriptor that holds its lock."""
    folder = place.folder
    try:
        while True:
            folder.mkdir(exist_ok=True)
            writer = os.getpid()
            with suppress(OSError, ValueError):
                writer = int((folder / _PID).read_text())
            lock = _lock(folder, writer)
            if lock is None:
                if folder.exists():
                    raise _busy(place.out)
                continue  # it ended a moment ago
            with suppress(FileNotFoundError):
                # Another process may have removed the folder, and a third made it anew, before we had the lock.
                if os.path.samestat(os.stat(folder), os.fstat(lock)):
                    (folder / _PID).write_text(str(os.getpid()))
                    return lock
            os.close(lock)
    except OSError as error:
        raise _place_error(place.out, error) from None


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


def _new_partial(out: Path) -> tuple[Path, int]:
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
        held = writer != os.getpid() and is_alive(writer)
    else:
        held = False
    if held:
        os.close(fd)
        return None
    return fd


def is_alive(process: int) -> bool:
    """Whether a process of this number lives, whoever owns it."""
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
                flush(os.path.join(where, name))
            flush(where)
        os.rename(partial, out)  # replaces an empty folder, and nothing else
        flush(out.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UsageError(f"{out} came into being meanwhile; choose another name or remove it") from None
        raise _place_error(out, error) from None


def flush(path: str | Path) -> None:
    """Sends what was written of a file or folder to the disk."""
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
