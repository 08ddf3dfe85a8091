"""One process's share of a compression: what an earlier one finished is taken over, the rest is done and kept.

The order is calibrate, transform, allocate, fit, check. Everything that takes long ends as a part in the journal; all
else is computed again from parts, with the same result.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gossamer.checkpoints.place import Workplace
from gossamer.compress import allocation, transforming
from gossamer.compress.calibrate import calibrate
from gossamer.compress.check import check
from gossamer.compress.edits import Edited
from gossamer.compress.fisher import FisherDiagonal, RowSalience
from gossamer.compress.fit import Fitted, fit, read_site
from gossamer.compress.flow import SAMPLES, Flow
from gossamer.compress.gradients import Visit, sweep
from gossamer.compress.journal import Journal
from gossamer.compress.preflight import GRADIENT_BYTES, Prediction, refuse_disk, refuse_memory
from gossamer.compress.statistics import Statistics
from gossamer.compress.watch import Watch
from gossamer.compress.write import Stored, as_json, documents, ledger, put_together
from gossamer.errors import GossamerError
from gossamer.evaluate.machine import forget_peak_rss, peak_rss_mb
from gossamer.formats import SiteFormat, parse, project
from gossamer.formats.dispatch import make_runner
from gossamer.models.load import Progress
from gossamer.models.topology import Site

if TYPE_CHECKING:
    from gossamer.compress.job import Job

__all__ = ["OUT", "Run", "Written"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

OUT = "out"  # in the workplace: the folder that is going to be published


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


class Run:
    """``job`` in ``place``. Raises UsageError where an earlier run there was begun with other options."""

    def __init__(self, job: Job, place: Workplace, watch: Watch) -> None:
        self.job, self.place, self.watch, self.recipe = job, place, watch, job.recipe
        self.checkpoint = Edited(job.checkpoint)
        self.formats: dict[str, SiteFormat] = dict(job.formats)
        self.hints: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, Stored] = {}
        self.records: dict[str, Any] = {}  # the ledger's entries of sites
        self.journal = Journal(place.folder, job.options, place.out)
        self._mark = time.perf_counter()

    def run(self) -> Written:
        forget_peak_rss()
        prediction = self.job.predict()
        refuse_memory(prediction)
        refuse_disk(self.place.folder, prediction.disk_bytes - self.journal.nbytes, self.place.out)
        self.watch.predicted(prediction)
        sequences = self._text() if self.recipe.calibrated else []
        self._transform(sequences)
        self._allocate(sequences)
        needs = self.job.fit_needs
        flow = None
        if needs & {"hessian", "inputs"}:
            compressed = self.recipe.sequential != "none"
            hessian = "hessian" in needs
            flow = Flow(self.checkpoint, sequences, self.stored, compressed=compressed, hessian=hessian)
        with self.watch.phase("compressing") as progress:
            self._fit_all(flow, progress)
        return self._publish(prediction, sequences)

    # ------------------------------------------------------------ calibrate

    def _text(self) -> list[I32]:
        if self.journal.record("text") is None:
            with self.watch.phase("calibration text") as progress:
                text = self.job.text or self.job.make_text(progress)
            about = {"text": text.description, "sha256": text.sha256, "tokens": text.tokens}
            self._finish("text", {"tokens": np.stack(text.sequences)}, {**about, "length": len(text.sequences[0])})
        return list(np.array(self.journal.open("text").raw("tokens")))

    def _inputs(self, sequences: Sequence[I32]) -> transforming.Inputs:
        """Statistics of the model's own inputs, a part for each layer."""
        layers = self.checkpoint.config.layers
        names = [f"inputs-{index:04d}" for index in range(layers)]
        if any(self.journal.record(name) is None for name in names):
            with self.watch.phase("calibrating") as progress:
                passes = calibrate(self.job.checkpoint, sequences, hessian=False, samples=SAMPLES, progress=progress)
                for name, found in zip(names, passes):
                    if self.journal.record(name) is None:
                        counts = {shares: s.tokens for shares, s in found.items()}
                        self._finish(name, transforming.as_tensors(found), {"counts": counts})
        stored: dict[str, Callable[[], Statistics]] = {}
        for name in names:
            part, record = self.journal.open(name), self.journal.record(name)
            assert record is not None
            for shares, tokens in record["counts"].items():
                stored[shares] = lambda part=part, shares=shares, tokens=tokens: transforming.from_part(  # type: ignore[misc]
                    part, shares, tokens
                )
        return transforming.Inputs(self.checkpoint, stored)

    def _gradients(self, sequences: Sequence[I32]) -> None:
        """A part for each layer: the Fisher information of its weights, or the salience of its rows.

        Both are as large as the layers they are of, so the text goes through the model once for as many layers as fit
        into GRADIENT_BYTES.
        """
        layers = [i for i in range(self.checkpoint.config.layers) if self.journal.record(f"gradients-{i:04d}") is None]
        narrow = {}
        if self.recipe.allocate.name == "salience":
            narrow = {site.name: self.formats[site.name] for site in self.job.open_sites}
        for some in self._at_once(layers):
            sites = [s for s in self.checkpoint.topology.sites if s.layer in some]
            delta = {}
            for site in (s for s in sites if s.name in narrow):
                w = read_site(self.checkpoint, site)
                delta[site.name] = project(narrow[site.name].weight, w) - w
            rows, squares = RowSalience(delta), FisherDiagonal({s.name for s in sites})
            visitors: list[Visit] = [rows] if delta else []
            if self.job.wants_fisher:
                visitors.append(squares)
            with self.watch.phase(f"gradients of layers {some[0]} to {some[-1]}") as progress:
                sweep(self.checkpoint, sequences, visitors, progress=progress)
            salience, fisher = rows.result(), squares.result()
            for index in some:
                of = [s.name for s in sites if s.layer == index]
                arrays: dict[str, Any] = {f"{name}.salience": salience[name] for name in of if name in salience}
                arrays |= {f"{name}.fisher": fisher[name] for name in of if name in fisher}
                self._finish(f"gradients-{index:04d}", arrays, {})

    def _at_once(self, layers: Sequence[int]) -> Iterator[list[int]]:
        """Runs of layers whose weights in float32 take GRADIENT_BYTES at most, or one layer."""
        some: list[int] = []
        size = 0
        for index in layers:
            more = 4 * sum(s.rows * s.cols for s in self.checkpoint.topology.sites if s.layer == index)
            if some and size + more > GRADIENT_BYTES:
                yield some
                some, size = [], 0
            some.append(index)
            size += more
        if some:
            yield some

    def _of_gradients(self, sites: Sequence[Site], what: str) -> dict[str, npt.NDArray[Any]]:
        """``salience`` or ``fisher`` of these sites, from their parts."""
        found = {}
        for site in sites:
            found[site.name] = np.array(self.journal.open(f"gradients-{site.layer:04d}").raw(f"{site.name}.{what}"))
        return found

    # ------------------------------------------------------------ transform, allocate

    def _transform(self, sequences: Sequence[I32]) -> None:
        if self.recipe.transforms:
            known = transforming.Inputs(self.checkpoint, {})
            inputs = self._inputs(sequences) if "inputs" in self.recipe.needs else known
            self.watch.say("transforms: " + ", ".join(step.name for step in self.recipe.transforms))
            transforming.apply(self.checkpoint, self.recipe.transforms, inputs, self.formats)

    def _allocate(self, sequences: Sequence[I32]) -> None:
        if "fisher" in self.recipe.needs:
            self._gradients(sequences)
        scores = None
        if self.recipe.allocate.name == "salience":
            scores = self._of_gradients(self.job.open_sites, "salience")
        options = self.recipe.allocate.options
        chosen = allocation.for_model(options, self.checkpoint, self.job.open_sites, self.formats, scores)
        self.formats |= chosen.formats
        self.hints |= chosen.hints

    # ------------------------------------------------------------ fit

    def _fit_all(self, flow: Flow | None, progress: Progress) -> None:
        topology = self.checkpoint.topology
        total, done = len(topology.sites), 0

        def step(count: int = 1) -> None:
            nonlocal done
            done += count
            progress(done, total)

        names = [site.name for site in topology.sites]
        self._tables("embed", step)
        for index in range(self.checkpoint.config.layers):
            name = f"layer-{index:04d}"
            sites = [site for site in topology.sites if site.layer == index]
            if self.journal.record(name) is None:
                self._finish_sites(name, self._layer(index, sites, flow, step))
            else:
                step(len(sites))
            self._take(name, sites)
        self._tables("head", step)
        assert set(self.stored) == set(names)

    def _tables(self, role: str, step: Callable[[], None]) -> None:
        for site in (s for s in self.checkpoint.topology.sites if s.role == role):
            if self.journal.record(role) is None:
                found = fit(self.checkpoint, site, self.formats[site.name], self.recipe.tables)
                self._finish_sites(role, {site.name: found})
            self._take(role, [site])
            step()

    def _layer(
        self, index: int, sites: Sequence[Site], flow: Flow | None, step: Callable[[], None]
    ) -> dict[str, Fitted]:
        """The sites of a layer, fitted in execution order."""
        found: dict[str, Fitted] = {}
        grouped = flow.by_group(index) if flow and self.recipe.sequential == "group" else None
        known = flow.statistics(index) if flow and not grouped else {}
        for shares in dict.fromkeys(site.shares for site in sites):
            stats = grouped.statistics(shares) if grouped else known.pop(shares, None)
            for site in (s for s in sites if s.shares == shares):
                fisher = self._of_gradients([site], "fisher")[site.name] if self.job.wants_fisher else None
                done = found[site.name] = self._site(site, stats, fisher)
                if grouped:
                    bias = self.checkpoint.bias(site)
                    shift = done.bias
                    if shift is not None:
                        bias = shift if bias is None else bias + shift
                    grouped.replace(site.name, make_runner(done.packed, done.format, bias))
                step()
        return found

    def _site(self, site: Site, stats: Statistics | None, fisher: F32 | None) -> Fitted:
        fmt, hints = self.formats[site.name], self.hints.get(site.name, {})
        if self.job.chooses_late(site):
            w = read_site(self.checkpoint, site)
            chosen = allocation.for_site(self.recipe.allocate.options, site, fmt, w, stats)
            fmt, hints = chosen.formats[site.name], chosen.hints.get(site.name, {})
        return fit(self.checkpoint, site, fmt, self.recipe.solver, stats, hints=hints, fisher=fisher)

    # ------------------------------------------------------------ parts

    def _finish_sites(self, name: str, fitted: Mapping[str, Fitted]) -> None:
        arrays = {f"{site}.{key}": a for site, f in fitted.items() for key, a in f.packed.arrays.items()}
        arrays |= {f"{site}.shift": f.bias for site, f in fitted.items() if f.bias is not None}
        types = {
            f"{site}.{key}": field.dtype
            for site, f in fitted.items()
            for key, field in f.packed.format.fields(*f.packed.shape).items()
        }
        self._finish(name, arrays, {"sites": {site: f.record for site, f in fitted.items()}}, types)

    def _finish(
        self,
        name: str,
        arrays: Mapping[str, Any],
        record: Mapping[str, Any],
        types: Mapping[str, str] | None = None,
    ) -> None:
        now = time.perf_counter()
        self.journal.finish(name, arrays, {**record, "seconds": now - self._mark, "peak_mb": peak_rss_mb()}, types)
        self._mark = now
        self.place.keep = True

    def _take(self, name: str, sites: Sequence[Site]) -> None:
        """Goes on from a finished part: its formats, its arrays, its biases."""
        record = self.journal.record(name)
        assert record is not None
        part = self.journal.open(name)
        for site in sites:
            entry = self.records[site.name] = record["sites"][site.name]
            self.formats[site.name] = parse(entry["format"])
            self.stored[site.name] = Stored(part, site, self.formats[site.name])
            if f"{site.name}.shift" in part.tensors:
                shift, bias = part.read(f"{site.name}.shift"), self.checkpoint.bias(site)
                self.checkpoint.set_bias(site.name, shift if bias is None else bias + shift)

    # ------------------------------------------------------------ the folder

    def _publish(self, prediction: Prediction, sequences: Sequence[I32]) -> Written:
        folder = self.place.folder / OUT
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        data_bytes = put_together(folder, self.checkpoint, self.stored)
        formats = {site.name: self.formats[site.name] for site in self.checkpoint.topology.sites}
        content = ledger(self.checkpoint, self.job.checkpoint, formats, data_bytes, **self._chapters())
        for file, text in {**documents(self.checkpoint), "gossamer.json": as_json(content)}.items():
            (folder / file).write_text(text, encoding="utf-8")
        try:
            content["check"] = check(folder, sequences[0] if sequences else None)
        except GossamerError as error:
            self.journal.note("failed", str(error))
            raise
        steps, peak = self._measured()
        seconds = sum(steps.values())
        content["predicted"] = prediction.as_dict()
        content["measured"] = {"seconds": seconds, "steps": steps, "peak_bytes": peak, "resumed": self.journal.resumed}
        (folder / "gossamer.json").write_text(as_json(content), encoding="utf-8")
        total = sum(f.stat().st_size for f in folder.iterdir())
        self.place.publish(folder)
        bits = content["cost"]["bits_per_weight"]
        return Written(self.place.out, data_bytes, total, bits, seconds, peak, prediction, self.journal.resumed)

    def _chapters(self) -> dict[str, Any]:
        found: dict[str, Any] = {"recipe": self.recipe.as_dict() | {"keep": dict(self.job.keep)}}
        text = self.journal.record("text") if self.recipe.calibrated else None
        if text is not None:
            names = ("text", "sha256", "tokens", "length")
            found["calibration"] = {name: text[name] for name in names} | {"seed": self.job.seed}
        if self.checkpoint.log:
            found["transforms"] = list(self.checkpoint.log)
        return found | {"sites": {site.name: self.records[site.name] for site in self.checkpoint.topology.sites}}

    def _measured(self) -> tuple[dict[str, float], int | None]:
        """Seconds of work on every part and since, and the largest peak of memory."""
        records = {name: self.journal.record(name) or {} for name in self.journal.parts}
        steps = {name: float(r.get("seconds", 0.0)) for name, r in records.items()}
        peaks = [p for p in (*(r.get("peak_mb") for r in records.values()), peak_rss_mb()) if p is not None]
        return steps | {"check": time.perf_counter() - self._mark}, int(max(peaks) * 1e6) if peaks else None
