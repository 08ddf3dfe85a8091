"""Compresses again and again, killed each time a little later, until it is done: kill_me.py SOURCE OUT RECIPE STEP.

Try n is a process of its own that dies of SIGKILL at its n STEP-th write, rename or flush, so that nothing can clean up
after it. Prints the number of tries. Imports are done once, before the first fork.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from gossamer.compress.job import compress
from gossamer.compress.recipe import Calibration, load, of_format
from gossamer.models.checkpoint import open_checkpoint

CALLS = ("pwrite", "replace", "rename", "fsync", "mkdir")
TRIES = 40


def die_at(call: int) -> None:
    """SIGKILL instead of the call with this number."""
    seen = 0

    def counted(real: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return run

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def work(source: Path, out: Path, recipe: str) -> None:
    found = of_format("int4/g32", load(recipe))
    compress(open_checkpoint(source), out, found, calibration=Calibration(512, 128, str(source.parent / "text.txt")))


def main() -> None:
    source, out, recipe, step = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    for tries in range(1, TRIES):
        child = os.fork()
        if child == 0:
            die_at(tries * step)
            work(source, out, recipe)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            print(tries)
            return
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
        assert not out.exists()
    raise AssertionError("it never came to an end")


main()
