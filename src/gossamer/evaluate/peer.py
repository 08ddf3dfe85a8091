"""llama.cpp as the other side of a comparison, in a process of its own that is blocked while ours runs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gossamer.checkpoints.gguf import GGUFFile
from gossamer.errors import ResourceError, UsageError
from gossamer.limits import available_memory, default_threads

__all__ = ["PEERS", "LlamaCpp", "check_peer", "quantize"]

PEERS = ("llama.cpp",)
REPACKED = 1.9  # llama.cpp keeps the file's weights and a second copy that its kernels read

_WORKER = Path(__file__).with_name("llamacpp_worker.py")


class LlamaCpp:
    """A ``Side`` of ``bench``. Loads ``model``, a GGUF file, when it is made; ``close`` ends the process.

    ``about`` holds the version, what the library says of the system, and the options of its contexts exactly;
    ``bits_per_weight`` is 8 x the bytes of the file's tensors / their elements.

    Args:
        python: the interpreter that has ``llama_cpp``; None for this one.
        threads: None uses what the process's affinity and control group allow.

    Raises:
        UsageError: ``llama_cpp`` is missing or refuses the model. ResourceError: too little memory for it.
    """

    name = "llama.cpp"

    def __init__(self, model: str | Path, *, python: str | None = None, threads: int | None = None) -> None:
        self.model = Path(model)
        with GGUFFile(self.model) as file:
            data = file.data_bytes
            elements = sum(_product(t.shape) for t in file.tensors.values())
        self.bits_per_weight = 8 * data / elements
        free = available_memory()
        if free is not None and REPACKED * data > free:
            raise ResourceError(
                f"llama.cpp needs about {REPACKED * data / 1e9:.1f} GB for {self.model.name} and {free / 1e9:.1f} GB "
                "of memory are free; choose a smaller model."
            )
        self._python = python or sys.executable
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - until close
        self._process: subprocess.Popen[str] | None = None
        try:
            arguments = [str(self.model), str(threads or default_threads())]
            self._process = _start(self._python, arguments, self._errors)
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def prefill(self, tokens: int) -> float:
        """Seconds of a prompt in an empty context, up to the logits of its last token."""
        return self._ask(work="prefill", tokens=tokens)

    def decode(self, batch: int, steps: int) -> float:
        """Seconds of ``steps`` steps of ``batch`` sequences after 16 tokens each; the logits of every token."""
        return self._ask(work="decode", batch=batch, steps=steps)

    def to_json(self) -> dict[str, Any]:
        """What it is and what it runs."""
        return {"name": self.name, "model": self.model.name, "bits_per_weight": self.bits_per_weight, **self.about}

    def _ask(self, **request: Any) -> float:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise UsageError(f"llama.cpp stopped: {_last_line(self._errors, self._process.returncode)}.")
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise _missing(self._python)
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._errors.close()
        if self._process is None:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_peer(python: str | None = None) -> None:
    """Raises UsageError when ``python`` (None: this one) has no ``llama_cpp``, before anything big is made for it."""
    python = python or sys.executable
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = _start(python, ["check"], errors)
        out, _ = process.communicate()
        if out:
            raise _missing(python)
        if process.returncode:
            raise UsageError(f"{python} cannot load llama_cpp: {_last_line(errors, process.returncode)}.")


def quantize(source: Path, target: Path, kind: str, *, python: str | None = None) -> None:
    """Writes ``source`` anew as llama.cpp's type ``kind`` ("Q4_0"). Raises UsageError when that does not work."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        python = python or sys.executable
        process = _start(python, ["quantize", str(source), str(target), kind], errors)
        out, _ = process.communicate()
        if out:
            raise _missing(python)
        if process.returncode:
            raise UsageError(f"llama.cpp cannot quantize {source.name}: {_last_line(errors, process.returncode)}.")


def _missing(python: str) -> UsageError:
    return UsageError(
        f"--peer llama.cpp needs the module llama_cpp, which {python} does not have; build it with 'make peers', "
        "or name a Python that has it with --peer-python."
    )


def _start(python: str, arguments: list[str], errors: Any) -> subprocess.Popen[str]:
    command = [python, str(_WORKER), *arguments]
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    except OSError as error:
        raise UsageError(
            f"'{command[0]}' cannot be started ({error.strerror}); give --peer-python the path of a Python."
        ) from None


def _last_line(errors: Any, code: int) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else f"it ended with code {code} and said nothing"


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
