"""Small models to export: a tiny GGUF file, and the first two layers of the packaged real ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [
    str(Path(__file__).parent),
    *(str(Path(__file__).parents[1] / d) for d in ("models", "checkpoints", "compress")),
]

import tiny_gguf  # noqa: E402
from cut import Stored, two_layers  # noqa: E402

from gossamer.compress.job import compress  # noqa: E402
from gossamer.compress.recipe import of_format  # noqa: E402
from gossamer.models.checkpoint import Checkpoint  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A folder of ours: stored(checkpoint, expression or None for the file's own formats, role="expression", ...)."""
    made: dict[Any, Path] = {}

    def make(checkpoint: Checkpoint, expression: str | None = None, **roles: str) -> Path:
        key = (checkpoint.path, expression, tuple(roles.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("stored") / "model"
            present = {site.role for site in checkpoint.topology.sites}
            keep = [(role, text) for role, text in roles.items() if role in present]
            compress(checkpoint, made[key], of_format(expression), keep=keep)
        return made[key]

    return make


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Checkpoint:
    return two_layers(smollm2_gguf)


@pytest.fixture(scope="session")
def gemma3(gemma3_gguf: Path) -> Checkpoint:
    return two_layers(gemma3_gguf)
