"""Puts a measured table into a document between its markers."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["replace"]


def replace(path: Path, name: str, text: str) -> None:
    """Replaces what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    document = path.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(document):
        raise SystemExit(f"{path} has no markers for '{name}'")
    path.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", document), encoding="utf-8")
