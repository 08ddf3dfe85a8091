"""Small checkpoints of every kind that can be compressed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), *(str(Path(__file__).parents[1] / d) for d in ("models", "checkpoints"))]

import tiny_gguf  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound small GGUF file."""
    return tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
