"""The program as a person runs it: a process of its own, with pipes or on a terminal."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# A new session takes its standard input as controlling terminal, so that Ctrl-C becomes a signal; and the signal
# is put back to its default, for a job in the background hands down one that is ignored.
LAUNCH = (
    "import fcntl, os, signal, sys, termios\n"
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "if os.isatty(0): fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execv(sys.executable, [sys.executable, '-m', 'gossamer', *sys.argv[1:]])"
)
PATIENCE = 180.0  # seconds; far more than any of these takes on a busy machine


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


def gossamer(
    *arguments: object, stdin: bytes = b"", env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Done:
    """Runs ``gossamer ARGUMENTS`` with a pipe for each stream. No run may end in a traceback or draw."""
    done = subprocess.run(
        [sys.executable, "-m", "gossamer", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env=environment(**(env or {})),
        cwd=cwd,
        timeout=PATIENCE,
        check=False,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err, err
    assert "\x1b" not in out + err, "escape sequences without a terminal"
    return Done(done.returncode, out, err)


def refused(*arguments: object, **how: Any) -> str:
    """The sentence with which the program refuses, which is all that it says."""
    done = gossamer(*arguments, **how)
    assert done.code == 2, (done.code, done.err)
    assert done.out == ""
    assert done.err.startswith("gossamer: "), done.err
    assert done.err.count("\n") == 1, done.err
    assert len(done.err) < 600, done.err
    return done.err


def start(*arguments: object) -> subprocess.Popen[str]:
    """Starts ``gossamer ARGUMENTS`` with pipes, for a signal to be sent."""
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


class Terminal:
    """``out`` and ``err`` hold what came on standard output and on standard error so far; typing is not echoed."""

    def __init__(self, *arguments: object) -> None:
        self.out, self.err = "", ""
        self._out, slave = os.openpty()
        self._err, err_slave = os.openpty()
        for fd in (slave, err_slave):
            settings = termios.tcgetattr(fd)
            settings[1] &= ~termios.OPOST  # "\n" stays as it is
            settings[3] &= ~termios.ECHO
            termios.tcsetattr(fd, termios.TCSANOW, settings)
        self._open = {self._out, self._err}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=err_slave,
            start_new_session=True,
            env=environment(TERM="xterm-256color"),
        )
        os.close(slave)
        os.close(err_slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._out)
        os.close(self._err)

    def _read(self, seconds: float) -> bool:
        """Takes what has come; False when nothing did and nothing more can."""
        ready, _, _ = select.select(list(self._open), [], [], seconds)
        for fd in ready:
            try:
                data = os.read(fd, 65536)
            except OSError:  # the other end is closed
                data = b""
            if not data:
                self._open.discard(fd)
            text = data.decode(errors="replace")
            if fd == self._out:
                self.out += text
            else:
                self.err += text
        return bool(self._open)

    def until(self, pattern: str, stream: str = "err", start: int = 0) -> int:
        """Waits until the pattern matches in the stream after ``start``; returns where the match ends."""
        deadline = time.monotonic() + PATIENCE
        while True:
            match = re.compile(pattern).search(getattr(self, stream), start)
            if match:
                return match.end()
            if not self._read(0.2) or time.monotonic() > deadline:
                raise AssertionError(f"no {pattern!r} in {stream}: {self.out!r} {self.err!r}")

    def type(self, text: str) -> None:
        os.write(self._out, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.type("\x03")

    def end(self) -> int:
        """The exit code, once the program has ended."""
        deadline = time.monotonic() + PATIENCE
        while self._open and time.monotonic() < deadline:
            self._read(0.2)
        return self.process.wait(timeout=PATIENCE)
