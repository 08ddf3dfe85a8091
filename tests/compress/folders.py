"""What folders hold, for tests that compare them."""

from __future__ import annotations

import json
from pathlib import Path


def everything(folder: Path) -> list[str]:
    """The paths of all that lies in a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a compressed folder by name; of its ledger, what does not tell how a run went."""
    found = {p.name: p.read_bytes() for p in folder.iterdir()}
    ledger = json.loads(found["gossamer.json"])
    for chapter in ("predicted", "measured"):
        assert chapter in ledger
        del ledger[chapter]
    return found | {"gossamer.json": json.dumps(ledger).encode()}
