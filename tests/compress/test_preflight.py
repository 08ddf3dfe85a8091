"""What is told before the work: bytes exactly, memory and disk from above, and a refusal where they do not suffice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gossamer.compress import preflight
from gossamer.compress.job import Job, Written, compress
from gossamer.compress.preflight import Prediction
from gossamer.compress.recipe import Calibration, load, of_format
from gossamer.compress.watch import Watch
from gossamer.errors import ResourceError
from gossamer.evaluate.shapes import shape_config
from gossamer.formats import parse
from gossamer.models.checkpoint import open_checkpoint
from gossamer.models.load import Plan, Progress
from gossamer.models.topology import describe


class Measuring(Watch):
    """Looks at the disk after every site."""

    def __init__(self, work: Path) -> None:
        self.work, self.most = work, 0
        self.told: list[Prediction] = []

    def predicted(self, prediction: Prediction) -> None:
        assert self.most == 0
        self.told.append(prediction)

    @contextmanager
    def phase(self, what: str) -> Iterator[Progress]:
        def tell(done: int, total: int) -> None:
            self.most = max(self.most, sum(f.stat().st_size for f in self.work.rglob("*") if f.is_file()))

        yield tell


def job(tiny: Path, recipe: str, tokens: int = 512) -> Job:
    return Job(
        open_checkpoint(tiny), of_format("int4/g32", load(recipe)), calibration=Calibration(tokens, 128, "stdlib")
    )


def test_bytes_of_the_real_model(smollm2_gguf: Path, tmp_path: Path) -> None:
    watch = Measuring(tmp_path / ".out.partial")
    done: Written = compress(open_checkpoint(smollm2_gguf), tmp_path / "out", of_format("int4/g32"), watch=watch)
    (told,) = watch.told
    assert told == done.predicted
    assert told.data_bytes == done.data_bytes
    assert told.bits_per_weight == done.bits_per_weight
    assert done.folder_bytes <= told.output_bytes < 1.02 * done.folder_bytes
    assert 0.9 * told.data_bytes < watch.most < told.work_bytes
    assert done.peak_bytes is not None
    assert 0.8 * done.peak_bytes < told.peak_bytes < 3 * done.peak_bytes
    assert told.disk_bytes == told.work_bytes + told.output_bytes


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        ("rtn", {"fit", "check"}),
        ("gptq", {"forward", "statistics", "fit", "check"}),
    ],
)
def test_the_steps_that_take_time(tiny: Path, recipe: str, steps: set[str]) -> None:
    told = job(tiny, recipe).predict()
    assert told.steps.keys() == steps
    assert told.seconds == sum(told.steps.values())
    assert all(seconds >= 0 for seconds in told.steps.values())


def test_text_of_its_own_and_gradients_take_time_too(tiny: Path) -> None:
    own = Job(open_checkpoint(tiny), of_format("int4/g32", load("gptq")), calibration=Calibration(512, 128)).predict()
    assert own.steps["text"] > 0
    recipe = Job(open_checkpoint(tiny), load("mixllm"), calibration=Calibration(512, 128, "stdlib"), keep=[])
    assert recipe.predict().steps["gradients"] > 0


def test_more_tokens_take_more_memory_and_disk(tiny: Path) -> None:
    few, many = job(tiny, "gptq", 512).predict(), job(tiny, "gptq", 1 << 17).predict()
    assert many.peak_bytes - few.peak_bytes > 0.5 * (4 * 96 * (1 << 17))
    assert many.work_bytes - few.work_bytes == 4 * ((1 << 17) - 512)


def test_an_eight_billion_shape_stays_below_six_gigabytes() -> None:
    """By the formulas alone: nothing of that size is made here."""

    class Large:
        config = shape_config("llama-3-8b")
        topology = describe(config)
        data_bytes = 16 << 30

    recipe = load("gptq")
    formats = {site.name: parse("int4/g128") for site in Large.topology.sites}
    sizes = [formats[s.name].weight.fields(s.rows, s.cols).values() for s in Large.topology.sites]
    large: Any = Large()
    made = Plan(formats, sum(field.nbytes for fields in sizes for field in fields), 0.0)
    for sequential in ("group", "layer"):
        found = replace(recipe, sequential=sequential)
        most = preflight._most_memory(large, made, found, found.calibration, found.calibration.tokens)
        assert 3e9 < most + preflight.OVERHEAD < 6e9


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_too_little_memory_is_refused_before_any_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.setattr(preflight, "available_memory", lambda: 10 << 20)
    found = of_format("int4/g32", load(recipe))
    for begin in (
        lambda: compress(
            open_checkpoint(tiny), tmp_path / "new" / "out", found, calibration=Calibration(512, 128, "stdlib")
        ),
        lambda: job(tiny, recipe).preview(tmp_path / "new" / "out"),
    ):
        with pytest.raises(
            ResourceError, match=r"^this run needs about \d+ MB of memory and 10 MB are free; "
        ) as caught:
            begin()
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_a_dry_run_looks_at_the_disk_of_a_folder_that_is_not_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def small(path: object) -> object:
        asked.append(path)
        return type("Disk", (), {"f_blocks": 1000, "f_bavail": 20, "f_frsize": 4096})()

    monkeypatch.setattr(os, "statvfs", small)
    with pytest.raises(
        ResourceError, match=r"new/out cannot be written: it needs \d+ bytes, work included, and the disk"
    ):
        job(tiny, "rtn").preview(tmp_path / "new" / "out")
    assert asked == [tmp_path]
