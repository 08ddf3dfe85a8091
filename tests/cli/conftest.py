"""The program as a person runs it: a process of its own, on small models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))

import tiny_gguf

TIMEOUT = 180  # seconds; far more than any of these takes on a busy machine


@dataclass(frozen=True)
class Done:
    """A finished process: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as the one JSON value that it must be."""
        return json.loads(self.out)


def environment(**changes: str) -> dict[str, str]:
    """The environment of a run: no hub, no setting of the developer's own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GOSSAMER_", "PYTHON"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8", **changes}


Run = Callable[..., Done]


@pytest.fixture(scope="session")
def gossamer() -> Run:
    """Runs ``gossamer ARGUMENTS`` with a pipe for each stream."""

    def run(*arguments: object, stdin: bytes = b"", env: dict[str, str] | None = None, cwd: Path | None = None) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "gossamer", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            env=environment(**(env or {})),
            cwd=cwd,
            timeout=TIMEOUT,
            check=False,
        )
        out, err = done.stdout.decode(), done.stderr.decode()
        assert "Traceback" not in err, err
        assert "\x1b" not in out + err, "escape sequences without a terminal"
        return Done(done.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound small GGUF file with a chat template."""
    return tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
