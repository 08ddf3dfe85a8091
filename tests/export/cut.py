"""The packaged real models cut short, and folders of ours made of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gossamer.models.checkpoint import Checkpoint, open_checkpoint

Stored = Callable[..., Path]


def two_layers(path: Path) -> Checkpoint:
    """The model of a file, cut after its second layer."""
    checkpoint = open_checkpoint(path)
    c = checkpoint.config
    checkpoint.config = replace(c, layers=2, ropes=c.ropes[:2], windows=c.windows[:2])
    return checkpoint
