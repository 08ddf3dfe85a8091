"""Small checkpoints of every family, and the first layers of both real models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]

import transform_cases as cases  # noqa: E402

from gossamer.models.checkpoint import Checkpoint, open_checkpoint  # noqa: E402


@pytest.fixture(scope="session")
def open_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Opens one of ``transform_cases.FAMILIES`` by its name, written once."""
    written: dict[str, Path] = {}

    def open_(name: str) -> Checkpoint:
        if name not in written:
            written[name] = cases.write_tiny(tmp_path_factory.mktemp("tiny") / "hf", cases.FAMILIES[name])
        return open_checkpoint(written[name])

    return open_


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Checkpoint:
    return cases.Short(open_checkpoint(smollm2_gguf), layers=3)


@pytest.fixture(scope="session")
def gemma3(gemma3_gguf: Path) -> Checkpoint:
    return cases.Short(open_checkpoint(gemma3_gguf))
