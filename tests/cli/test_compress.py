"""``gossamer compress``: a whole folder or none, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from program import PATIENCE, Terminal, environment, gossamer, start

from gossamer import LLM
from gossamer.checkpoints.safetensors import SafetensorsFile
from gossamer.cli.main import main
from gossamer.models.checkpoint import open_checkpoint

NOTE = r"SmolLM2-135M-Instruct\.Q4_1\.gguf: 96\.6 MB of weights -> 75\.8 MB \(4\.507 bits/weight\)\n"
REAL = ("compress", "smollm2-135m", "--format", "int4/g32")


def test_the_sizes_it_tells_are_those_of_the_file(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gossamer("compress", tiny, "-o", out, "--format", "int4/g32", "--keep", "embed=int8/g32", "--json")
    assert (done.code, done.err) == (0, "")
    told = done.json
    names = {"path", "data_bytes", "folder_bytes", "bits_per_weight", "source_bytes", "seconds", "peak_bytes"}
    assert told.keys() == names | {"predicted", "resumed"}
    checkpoint = open_checkpoint(out)
    assert told["path"] == str(out)
    assert told["data_bytes"] == SafetensorsFile(out / "model.safetensors").data_bytes
    assert told["bits_per_weight"] * checkpoint.topology.parameters / 8 == told["data_bytes"]
    assert told["folder_bytes"] == sum(f.stat().st_size for f in out.iterdir())
    assert told["source_bytes"] == open_checkpoint(tiny).data_bytes


def test_what_it_says_to_a_person(tiny: Path, tmp_path: Path) -> None:
    done = gossamer("compress", tiny, "-o", tmp_path / "out", "--format", "int4/g32", "--threads", "1")
    size = open_checkpoint(tmp_path / "out").data_bytes
    assert done.code == 0
    assert re.fullmatch(r"tiny\.gguf: 0\.1 MB of weights -> 0\.1 MB \([\d.]+ bits/weight\)\n", done.err)
    pattern = (
        r"wrote (.*): ([\d,]+) bytes of weights \([\d.]+ bits/weight\), [\d,]+ bytes in all, in [\d.]+ s "
        r"\([\d.]+ s predicted\)\n  memory up to [\d.]+ MB \([\d.]+ MB predicted\)\n"
    )
    path, told = re.fullmatch(pattern, done.out).groups()
    assert (path, told) == (str(tmp_path / "out"), f"{size:,}")


def test_patterns_and_input_formats_end_up_in_the_folder(tiny: Path, tmp_path: Path) -> None:
    keep = ["--keep", " embed = int8/g32 ", "--keep", "*.1.mlp.*=bf16 @ f32", "--keep", "down=uint5/row"]
    out = tmp_path / "out"
    done = gossamer("compress", tiny, "-o", out, "--format", "int4/g32 @ int8/token", *keep)
    assert done.code == 0
    formats = {name: str(fmt) for name, fmt in LLM(out).loaded.formats.items()}
    assert formats["model.embed_tokens"] == "int8/g32"
    assert formats["model.layers.0.mlp.down_proj"] == "uint5/row"
    assert formats["model.layers.1.mlp.down_proj"] == formats["model.layers.1.mlp.up_proj"] == "bf16 @ f32"
    assert formats["model.layers.1.self_attn.q_proj"] == "int4/g32 @ int8/token"
    shown = gossamer("inspect", out).out
    assert "recipe.keep.*.1.mlp.*: bf16 @ f32" in shown
    assert gossamer("run", out, "-p", "hi", "--max-tokens", "3").code == 0


def test_compressing_again(tiny: Path, tmp_path: Path) -> None:
    assert gossamer("compress", tiny, "-o", "one", "--format", "int8/g32", cwd=tmp_path).code == 0
    assert gossamer("compress", "one", "-o", "two/", "--format", "int4/g64", cwd=tmp_path).code == 0
    assert open_checkpoint(tmp_path / "two").data_bytes < open_checkpoint(tmp_path / "one").data_bytes
    done = gossamer("compress", "one", "-o", "one", "--format", "int4/g64", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"gossamer: {tmp_path}/one exists already; choose another name or remove it first\n"


# ---------------------------------------------------------------- recipes


def test_a_recipe_with_calibration(tiny: Path, tmp_path: Path) -> None:
    options = ("--recipe", "gptq", "--format", "int4/g32", "--keep", "down=int8/g32", "--calibration-tokens", "1024")
    done = gossamer("compress", tiny, "-o", tmp_path / "out", *options, "--seed", "3")
    assert done.code == 0
    first, second = done.err.splitlines()
    assert first.startswith("tiny.gguf: 0.1 MB of weights -> ")
    assert re.fullmatch(r"  predicted: [\d.]+ s, [\d.]+ MB of memory, [\d.]+ MB of disk while it works", second)
    ledger = json.loads((tmp_path / "out" / "gossamer.json").read_text())
    assert ledger["recipe"]["name"] == "gptq"
    assert ledger["recipe"]["keep"] == {"down": "int8/g32"}
    assert (ledger["calibration"]["tokens"], ledger["calibration"]["seed"]) == (1024, 3)
    shown = gossamer("inspect", tmp_path / "out").out
    assert "recipe.solver.name: obs" in shown
    assert "sqnr" not in shown  # one line for each site would be too many


def test_a_dry_run_tells_and_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    command = ("compress", tiny, "-o", tmp_path / "new" / "out", "--recipe", "gptq", "--format", "int4/g32")
    command = (*command, "--dry-run")
    done = gossamer(*command)
    assert (done.code, done.err) == (0, "")
    needles = ("recipe gptq: GPTQ", r"time about [\d.]+ ", r"memory up to [\d.]+ MB", r"disk [\d.]+ MB", "nothing was")
    for needle in needles:
        assert re.search(needle, done.out), needle
    told = gossamer(*command, "--json").json
    assert told.keys() >= {"seconds", "peak_bytes", "work_bytes", "output_bytes", "data_bytes", "bits_per_weight"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ((), "give --recipe NAME ("),
        (("--recipe", "gtpq"), "'gtpq', which is not known; did you mean 'gptq'?"),
        (("--recipe", "rtn", "--calibration", "self"), "the recipe rtn looks at no text"),
        (("--recipe", "mixllm", "--format", "int4/g32"), "cannot stand for the formats of the recipe mixllm"),
        (("--recipe", "gptq", "--calibration-tokens", "100"), "100 tokens do not hold one sequence of 512"),
        (("--recipe", "gptq", "--calibration", "nowhere.txt"), "there is no text 'nowhere.txt'"),
        (("--recipe", "gptq", "--seed", "-1"), "'-1' is not a whole number of at least 0"),
        (("--recipe", "gptq", "--calibration-tokens", "x"), "'x' is not a whole number of at least 2"),
    ],
)
def test_options_that_cannot_be(tiny: Path, tmp_path: Path, options: tuple[str, ...], needle: str) -> None:
    done = gossamer("compress", tiny, "-o", tmp_path / "out", *options)
    assert (done.code, done.out) == (2, "")
    assert needle in done.err
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    options = ("--recipe", "gptq", "--calibration", tmp_path / "short.txt")
    done = gossamer("compress", tiny, "-o", tmp_path / "out", *options)
    assert done.code == 2
    assert "short.txt' has" in done.err
    assert "give a longer text or ask for fewer tokens" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


# ---------------------------------------------------------------- stopped in the middle


KEPT = r"what is finished is kept in (.*): give the same command again to go on, or remove it\n"


def layers(process: subprocess.Popen[str], work: Path) -> None:
    """Waits until the first layer is finished."""
    deadline = time.monotonic() + PATIENCE
    while not (work / "layer-0000.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_keeps_what_is_finished(smollm2_gguf: Path, tmp_path: Path) -> None:
    work = tmp_path / "new" / ".out.partial"
    with start(*REAL, "-o", tmp_path / "new" / "out") as process:
        layers(process, work)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (130, "")
    assert re.fullmatch(NOTE + KEPT + "gossamer: interrupted\n", err).group(1) == str(work)
    done = gossamer(*REAL, "-o", tmp_path / "new" / "out", "--json")
    assert done.json["resumed"] is True
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


def test_a_kill_leaves_nothing_under_the_name_and_the_next_run_goes_on(smollm2_gguf: Path, tmp_path: Path) -> None:
    with start(*REAL, "-o", tmp_path / "out") as process:
        layers(process, tmp_path / ".out.partial")
        process.kill()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    other = gossamer("compress", "smollm2-135m", "--format", "int8/g32", "-o", tmp_path / "out")
    assert other.code == 2
    assert "was begun with --format '*: int4/g32' and is now asked for with '*: int8/g32'" in other.err
    assert gossamer(*REAL, "-o", tmp_path / "out").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert LLM(tmp_path / "out").generate("The capital of France is", max_tokens=4).tokens


def test_a_terminal_shows_a_bar_with_the_time_left(smollm2_gguf: Path, tmp_path: Path) -> None:
    with Terminal(*REAL, "-o", tmp_path / "out") as terminal:
        terminal.until(r"compressing.*\d+/211.*\d:\d\d:\d\d")
        assert terminal.end() == 0
        assert re.fullmatch(r"wrote .*\n  memory .*\n", terminal.out)  # the bar is not on standard output


def test_ctrl_c_on_a_terminal(smollm2_gguf: Path, tmp_path: Path) -> None:
    with Terminal(*REAL, "-o", tmp_path / "out") as terminal:
        terminal.until(r"compressing.*\d+/211")
        terminal.interrupt()
        assert terminal.end() == 130
        assert terminal.out == ""
        assert "gossamer: interrupted" in terminal.err
        assert "Traceback" not in terminal.err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- real disks

UNSHARE = shutil.which("unshare")


def on_disk(options: str, place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the program where a file system of its own lies over ``place``, gone with the process; lists it after."""
    place.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o {options} tmpfs "$0" || exit 77; "$@"; code=$?; ls -A "$0"; exit $code'
    command = [UNSHARE or "unshare", "--mount", "sh", "-c", script, str(place)]
    return subprocess.run(
        [*command, sys.executable, "-m", "gossamer", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.skipif(UNSHARE is None or os.geteuid() != 0, reason="needs unshare and root, to mount a file system")
@pytest.mark.parametrize(
    ("options", "needle", "left"),
    [
        ("size=64k", r"it needs \d+ bytes, work included, and the disk has \d+ free; free some space or choose .*", ""),
        ("size=just", r"the disk is full; free some space or choose another place", ".out.partial\n"),
        ("ro", "the file system is read-only; choose a place that you may write to", ""),
    ],
)
def test_a_disk_without_room(tiny: Path, tmp_path: Path, options: str, needle: str, left: str) -> None:
    """Too little at once, what is too little when files take whole pages, and none."""
    place = tmp_path / "disk"
    job = ("compress", tiny, "-o", place / "out", "--format", "int4/g32")
    if options == "size=just":  # what is asked for and a page: more files than that end in a page of their own
        asked = re.search(r"it needs (\d+) bytes", on_disk("size=64k", place, *job).stderr)
        options = f"size={4 * (-(-int(asked[1]) // 4096) + 1)}k" if asked else "size=64k"
    done = on_disk(options, place, *job)
    if done.returncode in (1, 77) and "gossamer:" not in done.stderr:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout) == (2, left)
    assert re.fullmatch(rf"gossamer: {place}/out cannot be written: {needle}", last), last


def test_a_disk_that_fills_up_meanwhile(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = os.pwrite, 0

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert main(["compress", str(tiny), "-o", str(tmp_path / "out"), "--format", "int4/g32", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    kept, fault = err.splitlines()
    assert re.fullmatch(KEPT, f"{kept}\n").group(1) == f"{tmp_path}/.out.partial"
    assert fault.startswith(f"gossamer: {tmp_path}/out cannot be written: ")
    monkeypatch.undo()
    assert main(["compress", str(tiny), "-o", str(tmp_path / "out"), "--format", "int4/g32"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
