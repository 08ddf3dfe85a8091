"""``gossamer compress``: a whole folder or none, whatever happens to the process or the disk."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
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
    assert told.keys() == {"path", "data_bytes", "folder_bytes", "bits_per_weight", "source_bytes", "seconds"}
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
    pattern = r"wrote (.*): ([\d,]+) bytes of weights \([\d.]+ bits/weight\), [\d,]+ bytes in all, in [\d.]+ s\n"
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


# ---------------------------------------------------------------- stopped in the middle


def test_ctrl_c_leaves_nothing(smollm2_gguf: Path, tmp_path: Path) -> None:
    with start(*REAL, "-o", tmp_path / "new" / "out") as process:
        assert re.fullmatch(NOTE, process.stderr.readline())  # the work begins
        assert [p.name[:9] for p in (tmp_path / "new").iterdir()] == [".out.part"]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (130, "", "gossamer: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_under_the_name_and_the_next_run_clears_up(smollm2_gguf: Path, tmp_path: Path) -> None:
    with start(*REAL, "-o", tmp_path / "out") as process:
        assert re.fullmatch(NOTE, process.stderr.readline())
        process.kill()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert [p.name.startswith(".out.partial-") for p in tmp_path.iterdir()] == [True]
    assert gossamer(*REAL, "-o", tmp_path / "out").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert LLM(tmp_path / "out").generate("The capital of France is", max_tokens=4).tokens


def test_a_terminal_shows_a_bar_with_the_time_left(smollm2_gguf: Path, tmp_path: Path) -> None:
    with Terminal(*REAL, "-o", tmp_path / "out") as terminal:
        terminal.until(r"compressing.*\d+/211.*\d:\d\d:\d\d")
        assert terminal.end() == 0
        assert re.fullmatch(r"wrote .*\n", terminal.out)  # the bar is not on standard output


def test_ctrl_c_on_a_terminal_leaves_nothing(smollm2_gguf: Path, tmp_path: Path) -> None:
    with Terminal(*REAL, "-o", tmp_path / "out") as terminal:
        terminal.until(r"compressing.*\d+/211")
        terminal.interrupt()
        assert terminal.end() == 130
        assert terminal.out == ""
        assert "gossamer: interrupted" in terminal.err
        assert "Traceback" not in terminal.err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- real disks

UNSHARE = shutil.which("unshare")


def on_disk(options: str, place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the program where a file system of its own lies over ``place``, gone with the process; lists it after."""
    place.mkdir()
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
    ("options", "needle", "notes"),
    [
        ("size=64k", r"it needs \d+ bytes and the disk has 65536 free; free some space or choose another place", 0),
        ("size=108k", "the disk is full; free some space or choose another place", 1),  # the tokenizer does not fit
        ("ro", "the file system is read-only; choose a place that you may write to", 0),
    ],
)
def test_a_disk_without_room(tiny: Path, tmp_path: Path, options: str, needle: str, notes: int) -> None:
    place = tmp_path / "disk"
    done = on_disk(options, place, "compress", tiny, "-o", place / "out", "--format", "int4/g32")
    if done.returncode in (1, 77) and "gossamer:" not in done.stderr:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    *before, last = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"gossamer: {place}/out cannot be written: {needle}", last), last
    assert len(before) == notes


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
    assert err.startswith(f"gossamer: {tmp_path}/out cannot be written: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
