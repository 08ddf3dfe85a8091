"""A compression from a checkpoint to a published folder: calibrate, transform, allocate, fit, check.

Layers are read, fitted and written one at a time, so memory does not grow with the depth of the model. Every finished
layer is a part that survives a kill: the same call goes on after it and publishes the bytes of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import gossamer
from gossamer.checkpoints.place import Workplace, workplace
from gossamer.compress.allocate.by_role import by_role
from gossamer.compress.calibrate import fingerprint
from gossamer.compress.calibration_text import SELF, CalibrationText, calibration_text
from gossamer.compress.check import check
from gossamer.compress.edits import Edited
from gossamer.compress.fit import Fitted, fit
from gossamer.compress.flow import Flow
from gossamer.compress.journal import Journal
from gossamer.compress.preflight import Prediction, predict, refuse_disk, refuse_memory
from gossamer.compress.recipe import Calibration, Recipe
from gossamer.compress.watch import SILENT, Watch
from gossamer.compress.write import WEIGHTS, Stored, as_json, documents, ledger, put_together
from gossamer.engine.llm import chooser
from gossamer.errors import CheckpointError, FormatError, GossamerError, ResourceError
from gossamer.evaluate.machine import forget_peak_rss, peak_rss_mb
from gossamer.formats import SiteFormat, parse
from gossamer.formats.dispatch import make_runner
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.load import Choose, Plan, Progress, plan
from gossamer.models.topology import Site

__all__ = ["Job", "Written", "compress"]

I32 = npt.NDArray[np.int32]
Keep = Sequence[tuple[str, str]]

WRITES_AS_IS = 2 << 30  # bytes of a checkpoint above which the calibration text is written by its 4-bit form
WRITES_IN = "int4/g32 @ int8/token"
_OUT = "out"  # in the workplace: the folder that is going to be published


@dataclass(frozen=True)
class Written:
    """A published folder: the bytes of its arrays (the data section of the file) and of the whole folder.

    ``bits_per_weight`` is 8 x ``data_bytes`` / parameters. ``seconds`` is the work of all runs that it took,
    ``peak_bytes`` the most memory of any of them (None where the system does not tell).
    """

    path: Path
    data_bytes: int
    folder_bytes: int
    bits_per_weight: float
    seconds: float
    peak_bytes: int | None
    predicted: Prediction
    resumed: bool


class Job:
    """What shall be done, checked against the checkpoint: everything that can be refused without work is refused here.

    ``keep`` are (pattern, expression) pairs that override the recipe's formats, the first that matches counting;
    ``calibration`` replaces the recipe's own; ``seed`` is that of everything drawn.

    Raises UsageError, FormatError and UnsupportedError in one sentence.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        *,
        keep: Keep = (),
        calibration: Calibration | None = None,
        seed: int = 0,
    ) -> None:
        self.checkpoint, self.recipe, self.keep, self.seed = checkpoint, recipe, tuple(keep), seed
        self.calibration = calibration or recipe.calibration
        self.text: CalibrationText | None = None  # where it is there before the work
        if recipe.calibrated and self.calibration.text != SELF:
            self.text = self.make_text()
        self.documents = documents(checkpoint)
        self.plan: Plan = plan(checkpoint, self._choose())

    def _choose(self) -> Choose:
        """``keep``, else the recipe's formats, else (where it gives none) the checkpoint's own."""
        topology = self.checkpoint.topology
        kept = chooser(None, [(pattern, parse(text)) for pattern, text in self.keep], topology)
        rest = [site for site in topology.sites if kept(site) is None]
        given = by_role(rest, self._named(rest)) if self.recipe.formats else {}
        return lambda site: kept(site) or given.get(site.name)

    def _named(self, sites: Sequence[Site]) -> Mapping[str, str]:
        """The recipe's formats without patterns whose sites are all kept in another format."""
        everything = by_role(self.checkpoint.topology.sites, self.recipe.formats)
        assert set(everything) >= {site.name for site in sites}
        return {key: fmt for key, fmt in self.recipe.formats.items() if _matches(key, sites)}

    @property
    def options(self) -> dict[str, str]:
        """What must be the same for a run to go on from another, by the name of the option that decides it."""
        steps = {k: v for k, v in self.recipe.as_dict().items() if k not in ("name", "paper", "formats")}
        found = {
            "MODEL": f"{self.checkpoint.path.name} ({fingerprint(self.checkpoint)[:12]})",
            "--recipe": self.recipe.name,
            "--format": ", ".join(f"{key}: {fmt}" for key, fmt in self.recipe.formats.items()),
            "--keep": ", ".join(f"{pattern}={fmt}" for pattern, fmt in self.keep),
            "the recipe's steps": hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest()[:12],
            "the version of gossamer": gossamer.__version__,
        }
        if self.recipe.calibrated:
            content = f" ({self.text.sha256[:12]})" if self.text else ""
            found["--calibration"] = f"{self.calibration.text}{content}"
            found["--calibration-tokens"] = f"{self.calibration.tokens} of {self.calibration.length}"
            found["--seed"] = str(self.seed)
        return found

    def make_text(self, progress: Progress | None = None) -> CalibrationText:
        """The calibration text; one that the model writes takes it minutes. Large models write in 4 bits."""
        c = self.calibration
        fmt = WRITES_IN if self.checkpoint.data_bytes > WRITES_AS_IS else None
        return calibration_text(
            self.checkpoint, c.text, tokens=c.tokens, length=c.length, seed=self.seed, fmt=fmt, progress=progress
        )

    def predict(self) -> Prediction:
        """Sizes, seconds and memory of the whole run, from probes of a second or so on this machine."""
        documents = sum(len(text.encode()) for text in self.documents.values())
        return predict(self.checkpoint, self.plan, self.recipe, self.calibration, documents)

    def preview(self, out: str | Path) -> Prediction:
        """As ``predict``, refused where disk or memory do not suffice; writes nothing."""
        prediction = self.predict()
        refuse_memory(prediction)
        refuse_disk(out, prediction.disk_bytes)
        return prediction


def compress(
    checkpoint: Checkpoint,
    out: str | Path,
    recipe: Recipe,
    *,
    keep: Keep = (),
    calibration: Calibration | None = None,
    seed: int = 0,
    watch: Watch = SILENT,
) -> Written:
    """Compresses a checkpoint by ``recipe`` and publishes the folder ``out``; see ``Job`` for the options.

    What an earlier run of the same job on the same folder finished is taken over. Where this one is stopped, by
    anything but wrong weights, what it finished is kept in ``.NAME.partial`` beside ``out``.

    Raises UsageError when ``out`` exists, when another process works on it, and when it was begun with other options;
    ResourceError when disk or memory do not suffice; FormatError or CheckpointError for weights that cannot be stored.
    """
    job = Job(checkpoint, recipe, keep=keep, calibration=calibration, seed=seed)
    with workplace(out) as place:
        try:
            return _Run(job, place, watch).run()
        except (FormatError, CheckpointError):
            place.keep = False  # the same weights would fail again
            raise
        except ResourceError as error:
            raise ResourceError(_told(str(error), place)) from None


def _told(message: str, place: Workplace) -> str:
    """A message about the workplace, which means nothing to a person, as one about the folder that was asked for."""
    for inside in (place.folder / _OUT / WEIGHTS, place.folder / _OUT, *sorted(place.folder.glob("*.*"))):
        message = message.replace(str(inside), str(place.out))
    return message


class _Run:
    """One process's share of a job."""

    def __init__(self, job: Job, place: Workplace, watch: Watch) -> None:
        self.job, self.place, self.watch = job, place, watch
        self.checkpoint = Edited(job.checkpoint)
        self.formats: dict[str, SiteFormat] = dict(job.plan.formats)
        self.stored: dict[str, Stored] = {}
        self.sites: dict[str, Any] = {}  # the ledger's entries
        self.journal = Journal(place.folder, job.options, place.out)
        self._mark = time.perf_counter()

    def run(self) -> Written:
        forget_peak_rss()
        job, journal = self.job, self.journal
        prediction = job.predict()
        refuse_memory(prediction)
        refuse_disk(self.place.folder, prediction.disk_bytes - journal.nbytes, self.place.out)
        self.watch.predicted(prediction)
        flow = self._flow()
        with self.watch.phase("compressing") as progress:
            self._fit_all(flow, progress)
        return self._publish(prediction, flow)

    # ------------------------------------------------------------ calibration

    def _flow(self) -> Flow | None:
        job = self.job
        if not job.recipe.calibrated:
            return None
        if self.journal.record("text") is None:
            with self.watch.phase("calibration text") as progress:
                text = job.text or job.make_text(progress)
            about = {"text": text.description, "sha256": text.sha256, "tokens": text.tokens}
            self._finish("text", {"tokens": np.stack(text.sequences)}, {**about, "length": len(text.sequences[0])})
        tokens = self.journal.open("text").raw("tokens")
        return Flow(
            self.checkpoint,
            list(np.array(tokens)),
            self.stored,
            compressed=job.recipe.sequential != "none",
            hessian="hessian" in job.recipe.needs,
        )

    # ------------------------------------------------------------ fitting

    def _fit_all(self, flow: Flow | None, progress: Progress) -> None:
        topology = self.checkpoint.topology
        total = len(topology.sites)

        def step() -> None:
            progress(len(self.stored), total)

        self._tables("embed", step)
        for index in range(self.checkpoint.config.layers):
            name = f"layer-{index:04d}"
            if self.journal.record(name) is None:
                fitted = self._layer(index, flow, step)
                self._finish_sites(name, fitted)
            self._take(name, [site for site in topology.sites if site.layer == index])
            step()
        self._tables("head", step)

    def _tables(self, role: str, step: Any) -> None:
        for site in (s for s in self.checkpoint.topology.sites if s.role == role):
            if self.journal.record(role) is None:
                self._finish_sites(role, {site: fit(self.checkpoint, site, self.formats[site.name], self.job.recipe.tables)})
            self._take(role, [site])
            step()

    def _layer(self, index: int, flow: Flow | None, step: Any) -> dict[Site, Fitted]:
        solver = self.job.recipe.solver
        sites = [site for site in self.checkpoint.topology.sites if site.layer == index]
        found: dict[Site, Fitted] = {}
        if flow is None:
            for site in sites:
                found[site] = fit(self.checkpoint, site, self.formats[site.name], solver)
                step()
            return found
        groups = list(dict.fromkeys(site.shares for site in sites))
        grouped = flow.by_group(index) if self.job.recipe.sequential == "group" else None
        everything = {} if grouped else flow.statistics(index)
        for shares in groups:
            stats = grouped.statistics(shares) if grouped else everything.pop(shares)
            for site in (s for s in sites if s.shares == shares):
                fmt = self.formats[site.name]
                found[site] = fit(self.checkpoint, site, fmt, solver, stats)
                if grouped:
                    bias = self.checkpoint.bias(site)
                    grouped.replace(site.name, make_runner(found[site].packed, fmt, bias))
                step()
        return found

    # ------------------------------------------------------------ parts

    def _finish_sites(self, name: str, fitted: Mapping[Site, Fitted]) -> None:
        arrays = {f"{s.name}.{key}": a for s, f in fitted.items() for key, a in f.packed.arrays.items()}
        self._finish(name, arrays, {"sites": {site.name: f.record for site, f in fitted.items()}})

    def _finish(self, name: str, arrays: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        self.journal.finish(name, arrays, {**record, "seconds": now - self._mark, "peak_mb": peak_rss_mb()})
        self._mark = now
        self.place.keep = True

    def _take(self, name: str, sites: Sequence[Site]) -> None:
        record = self.journal.record(name)
        assert record is not None
        part = self.journal.open(name)
        for site in sites:
            self.stored[site.name] = Stored(part, site, self.formats[site.name])
            self.sites[site.name] = record["sites"][site.name]

    # ------------------------------------------------------------ the folder

    def _publish(self, prediction: Prediction, flow: Flow | None) -> Written:
        folder = self.place.folder / _OUT
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        data_bytes = put_together(folder, self.checkpoint, self.stored)
        text = self.journal.record("text")
        chapters: dict[str, Any] = {
            "recipe": self.job.recipe.as_dict() | {"keep": dict(self.job.keep)},
            "calibration": {k: v for k, v in text.items() if k not in ("seconds", "peak_mb")} if text else None,
            "sites": self.sites,
        }
        content = ledger(self.checkpoint, self.formats, data_bytes, **chapters)
        content["source"]["fingerprint"] = fingerprint(self.job.checkpoint)
        files = {**documents(self.checkpoint), "gossamer.json": as_json(content)}
        for file, text_of in files.items():
            (folder / file).write_text(text_of, encoding="utf-8")
        try:
            content["check"] = check(folder, flow.sequences[0] if flow else None)
        except GossamerError as error:
            self.journal.note("failed", str(error))
            raise
        seconds, peak = self._measured()
        content["predicted"] = prediction.as_dict()
        content["measured"] = {"seconds": seconds, "peak_bytes": peak}
        (folder / "gossamer.json").write_text(as_json(content), encoding="utf-8")
        total = sum(f.stat().st_size for f in folder.iterdir())
        resumed = self.journal.resumed
        self.place.publish(folder)
        bits = content["cost"]["bits_per_weight"]
        return Written(self.place.out, data_bytes, total, bits, seconds, peak, prediction, resumed)

    def _measured(self) -> tuple[float, int | None]:
        """Seconds of work on all parts and since, and the largest peak of memory."""
        records = [self.journal.record(name) or {} for name in self.journal.parts]
        seconds = sum(r.get("seconds", 0.0) for r in records) + time.perf_counter() - self._mark
        peaks = [p for p in (*(r.get("peak_mb") for r in records), peak_rss_mb()) if p is not None]
        return seconds, int(max(peaks) * 1e6) if peaks else None


def _matches(key: str, sites: Sequence[Site]) -> bool:
    from fnmatch import fnmatchcase

    return any(site.role == key or fnmatchcase(site.name, key) for site in sites)
