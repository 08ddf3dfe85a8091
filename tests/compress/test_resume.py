"""Going on after a kill: the same bytes as without one, and a refusal where something else was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from folders import contents, everything

from gossamer.checkpoints.place import workplace
from gossamer.compress.job import Written, compress
from gossamer.compress.recipe import Calibration, Recipe, load, of_format
from gossamer.compress.watch import Watch
from gossamer.errors import UsageError
from gossamer.models.checkpoint import open_checkpoint
from gossamer.models.load import Progress

TEXT = " ".join(f"The {i} lazy dogs and the {7 * i % 31} quick foxes are in the garden." for i in range(400))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    (folder / "text.txt").write_text(TEXT)
    return tiny_gguf.write(folder / "tiny.gguf")


def calibration(source: Path, **changes: Any) -> Calibration:
    return replace(Calibration(512, 128, str(source.parent / "text.txt")), **changes)


def write(source: Path, out: Path, recipe: str = "gptq", watch: Watch | None = None, **options: Any) -> Written:
    found = of_format("int4/g32", load(recipe))
    given = {"calibration": calibration(source), **options}
    return compress(open_checkpoint(source), out, found, watch=watch or Watch(), **given)


class Stopping(Watch):
    """Raises KeyboardInterrupt when ``sites`` are fitted."""

    def __init__(self, sites: int) -> None:
        self.sites = sites

    @contextmanager
    def phase(self, what: str) -> Iterator[Progress]:
        def tell(done: int, total: int) -> None:
            if what == "compressing" and done >= self.sites:
                raise KeyboardInterrupt

        yield tell


def stop(source: Path, out: Path, recipe: str = "gptq", sites: int = 10, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(source, out, recipe, Stopping(sites), **options)
    assert not out.exists()


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_killed_at_any_moment_and_started_again(source: Path, tmp_path: Path, recipe: str) -> None:
    whole = contents(write(source, tmp_path / "whole", recipe).path)
    out = tmp_path / "killed"
    command = [sys.executable, str(Path(__file__).parent / "kill_me.py"), str(source), str(out), recipe, "9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
    assert contents(out) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.parametrize("sequential", ["layer", "none"])
def test_stopped_in_other_orders(source: Path, tmp_path: Path, sequential: Any) -> None:
    recipe = replace(of_format("int4/g32", load("gptq")), sequential=sequential)

    def run(out: Path, watch: Watch) -> Written:
        return compress(open_checkpoint(source), out, recipe, calibration=calibration(source), watch=watch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", Stopping(10))
    assert contents(run(tmp_path / "stopped", Watch()).path) == contents(run(tmp_path / "whole", Watch()).path)


def test_what_was_damaged_meanwhile_is_made_again(source: Path, tmp_path: Path) -> None:
    whole = contents(write(source, tmp_path / "whole").path)
    for name, harm in (("layer-0000", b"\x01"), ("embed", b""), ("text", b"\x00")):
        stop(source, tmp_path / name)
        part = tmp_path / f".{name}.partial" / f"{name}.safetensors"
        data = part.read_bytes()
        part.write_bytes(data[:-1] + harm)
        assert contents(write(source, tmp_path / name).path) == whole


def test_a_part_that_is_gone_is_made_again(source: Path, tmp_path: Path) -> None:
    whole = contents(write(source, tmp_path / "whole").path)
    stop(source, tmp_path / "out")
    (tmp_path / ".out.partial" / "layer-0000.safetensors").unlink()
    assert contents(write(source, tmp_path / "out").path) == whole


def test_time_and_memory_count_every_run(source: Path, tmp_path: Path) -> None:
    stop(source, tmp_path / "out")
    journal = json.loads((tmp_path / ".out.partial" / "journal.json").read_text())
    before = sum(part["record"]["seconds"] for part in journal["parts"].values())
    done = write(source, tmp_path / "out")
    assert done.resumed
    assert done.seconds > before > 0
    ledger = json.loads((done.path / "gossamer.json").read_text())
    assert ledger["measured"]["seconds"] == done.seconds
    assert ledger["predicted"]["seconds"] == done.predicted.seconds


# ---------------------------------------------------------------- something else


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"seed": 1}, "--seed '0' and is now asked for with '1'"),
        ({"keep": [("down", "int8/g32")]}, "--keep nothing and is now asked for with 'down=int8/g32'"),
        ({"recipe": "w4a16"}, "--recipe 'gptq' and is now asked for with 'w4a16'"),
        ({"tokens": 256}, "--calibration-tokens '512 of 128' and is now asked for with '256 of 128'"),
        ({"text": "stdlib"}, "--calibration "),
        ({"format": "int4/g64"}, "--format "),
        ({"model": 1}, "MODEL "),
    ],
)
def test_other_options_are_refused_by_name(source: Path, tmp_path: Path, changes: dict[str, Any], needle: str) -> None:
    out = tmp_path / "out"
    stop(source, out)
    before = everything(tmp_path)
    recipe = of_format(changes.get("format", "int4/g32"), load(changes.get("recipe", "gptq")))
    options = {key: changes[key] for key in ("seed", "keep") if key in changes}
    text = {key: changes[key] for key in ("tokens", "text") if key in changes}
    model = source
    if "model" in changes:
        model = tiny_gguf.write(tmp_path.parent / f"other-{tmp_path.name}.gguf", seed=1)
    with pytest.raises(UsageError) as caught:
        compress(open_checkpoint(model), out, recipe, calibration=calibration(source, **text), **options)
    message = str(caught.value)
    assert message.startswith(f"{out} was begun with {needle}")
    assert message.endswith(f"or remove {tmp_path}/.out.partial to begin anew.")
    assert "\n" not in message
    assert everything(tmp_path) == before
    assert write(source, out).resumed


def test_a_text_file_that_changed_is_another_text(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(TEXT)
    stop(source, tmp_path / "out", calibration=calibration(source, text=str(text)))
    text.write_text("A" + TEXT[1:])
    with pytest.raises(UsageError, match="was begun with --calibration"):
        write(source, tmp_path / "out", calibration=calibration(source, text=str(text)))


@pytest.mark.parametrize(
    "data", ["", "{}", '{"journal": 0, "options": {}, "parts": {}}', '{"journal": 1, "options": []}']
)
def test_a_journal_that_is_damaged(source: Path, tmp_path: Path, data: str) -> None:
    stop(source, tmp_path / "out")
    (tmp_path / ".out.partial" / "journal.json").write_text(data)
    with pytest.raises(UsageError, match=r"another version, or its journal is damaged; .* remove .*\.out\.partial"):
        write(source, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "layer-0000.safetensors").exists()


@pytest.mark.parametrize("file", ["../embed.safetensors", "", "a/b"])
def test_a_journal_leads_nowhere_else(source: Path, tmp_path: Path, file: str) -> None:
    stop(source, tmp_path / "out")
    path = tmp_path / ".out.partial" / "journal.json"
    journal = json.loads(path.read_text())
    journal["parts"]["embed"]["file"] = file
    path.write_text(json.dumps(journal))
    with pytest.raises(UsageError, match="its journal is damaged"):
        write(source, tmp_path / "out")


# ---------------------------------------------------------------- two at once


def test_a_second_run_on_the_same_folder_is_refused(source: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from gossamer.checkpoints.place import workplace\n"
        "with workplace(sys.argv[1]) as place:\n"
        "    place.keep = True\n"
        "    (place.folder / 'half').touch()\n"
        "    print('here', flush=True)\n"
        "    time.sleep(60)\n"
    )
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "here\n"
        with pytest.raises(UsageError, match=f"^{out} is being written by another process; wait for it"):
            write(source, out)
        assert everything(tmp_path) == [".out.partial", ".out.partial/half", ".out.partial/pid"]
        first.kill()
        first.wait()
    # What it left is no journal of ours, and its lock went with it.
    assert write(source, out).path == out


def test_a_kill_between_the_name_and_the_clearing_up(source: Path, tmp_path: Path) -> None:
    """The folder has its name and the workplace is only rubbish, which goes when the name is asked for again."""
    out = tmp_path / "out"
    write(source, out, "rtn")
    rubbish = tmp_path / ".out.partial"
    rubbish.mkdir()
    (rubbish / "published").touch()
    (rubbish / "embed.safetensors").touch()
    with pytest.raises(UsageError, match="exists already"):
        write(source, out, "rtn")
    assert os.listdir(tmp_path) == ["out"]


def test_a_workplace_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "f").touch()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(Exception, match="cannot be written"), workplace(tmp_path / "out"):
        pytest.fail("the block ran")
    assert os.listdir(tmp_path / "precious") == ["f"]


def test_recipes_of_ones_own_are_compared_by_what_they_do(source: Path, tmp_path: Path) -> None:
    def mine(damping: float) -> Recipe:
        path = tmp_path / "mine.yaml"
        path.write_text(f'name: mine\nformats: {{"*": int4/g32}}\nsolver: {{name: obs, damping: {damping}}}\n')
        return load(str(path))

    with pytest.raises(KeyboardInterrupt):
        compress(
            open_checkpoint(source), tmp_path / "out", mine(0.01), calibration=calibration(source), watch=Stopping(10)
        )
    with pytest.raises(UsageError, match="was begun with the recipe's steps"):
        compress(open_checkpoint(source), tmp_path / "out", mine(0.02), calibration=calibration(source))
