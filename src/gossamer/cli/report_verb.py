"""``gossamer report DIR [-o FILE] [--against BASE] [--results FILE]``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from gossamer.checkpoints.folder import json_file
from gossamer.checkpoints.names import resolve
from gossamer.checkpoints.safetensors_writer import write_error
from gossamer.cli import ui
from gossamer.errors import ResourceError, UsageError
from gossamer.evaluate.html import page
from gossamer.evaluate.sites import SiteError, ledger_errors, stored_errors
from gossamer.models.checkpoint import open_checkpoint
from gossamer.models.packed_checkpoint import PackedFolder

__all__ = ["run", "write_page"]

COMPARED = "compare.json"  # what `compare -o DIR` writes there


def run(args: argparse.Namespace) -> None:
    folder = Path(args.folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; give one that 'gossamer compress' or 'gossamer compare -o' wrote.")
    out = Path(args.output or f"{folder.resolve().name}.html")
    results = [(name, json_file(name)) for name in args.results]
    if (folder / COMPARED).is_file():
        results.append((COMPARED, json_file(folder / COMPARED)))
    ledger: dict[str, Any] | None = None
    sites: list[SiteError] = []
    if (folder / "gossamer.json").is_file():
        checkpoint = open_checkpoint(folder)
        assert isinstance(checkpoint, PackedFolder)  # the file makes it one
        ledger, sites = checkpoint.ledger, ledger_errors(checkpoint)
        if not any(s.sqnr_db is not None or s.output_relative is not None for s in sites):
            base = open_checkpoint(resolve(args.against)) if args.against is not None else None
            with ui.progress("comparing weights") as update:
                sites = _sizes_only(checkpoint) if base is None else stored_errors(base, checkpoint, update)
    elif not results:
        raise UsageError(f"{folder} holds neither gossamer.json nor {COMPARED}, so there is nothing to report.")
    write_page(out, page(folder.resolve().name, ledger=ledger, sites=sites, results=results))
    ui.say(f"wrote {out}: {out.stat().st_size:,} bytes")


def _sizes_only(folder: PackedFolder) -> list[SiteError]:
    return [
        SiteError(s.name, s.role, str(folder.native(s)), p.nbytes, p.bits_per_weight, None, False)
        for s in folder.topology.sites
        for p in [folder.stored(s)]
    ]


def write_page(path: Path, html: str) -> None:
    """Whole or not at all. Raises ResourceError when it cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            partial.write_text(html, encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"{write_error(path, error)}.") from None
