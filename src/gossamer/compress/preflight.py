"""What a run will take before it takes it: seconds from small probes on this machine, memory and disk from formulas.

The probes do a little of the real work: one layer on one sequence, one step of the sums, each format on a corner of a
matrix. Seconds are extrapolated by the terms that grow: tokens, columns squared, columns cubed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.compress.calibrate import calibration_bytes, groups
from gossamer.compress.calibration_text import SELF
from gossamer.compress.recipe import Calibration, Recipe
from gossamer.compress.solvers.options import Nearest, Solver
from gossamer.compress.solvers.site import solve
from gossamer.compress.statistics import STEP, Collector
from gossamer.engine.kv import kv_bytes
from gossamer.errors import FormatError, ResourceError
from gossamer.formats import ArraySource, Coded, Format, SiteFormat, encode, parse
from gossamer.limits import available_memory
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.layerwise import LayerRun
from gossamer.models.load import Plan
from gossamer.models.topology import Site

__all__ = ["Prediction", "predict", "refuse_disk", "refuse_memory"]

F32 = npt.NDArray[np.float32]

PROBE_ROWS, PROBE_COLS, PROBE_TOKENS = 128, 1024, 128
WRITE_RATE = 400e6  # bytes a second that a disk surely takes
LOAD_RATE = 1e9  # of a checked folder
WRITES_AS_IS = 2 << 30  # bytes of a checkpoint above which the calibration text is written by its 4-bit form
WRITES_IN = "int4/g128 @ int8/token"
GRADIENT_BYTES = 2 << 30  # of what is kept of gradients at once
PER_WEIGHT = 26  # bytes that a solver holds for each weight of the matrix, as measured of the heaviest
OVERHEAD = 128 << 20  # bytes that libraries and allocators take beside the arrays
HEADER = 512  # bytes that an array takes in the header of a file and in the ledger, about


@dataclass(frozen=True)
class Prediction:
    """Of a whole run: ``work_bytes`` of the disk are free again when the folder of ``output_bytes`` is published.

    ``peak_bytes`` is of the process, what it holds already included. ``seconds`` has the parts in ``steps``.
    """

    seconds: float
    steps: dict[str, float]
    peak_bytes: int
    work_bytes: int
    output_bytes: int
    data_bytes: int
    bits_per_weight: float

    @property
    def disk_bytes(self) -> int:
        return self.work_bytes + self.output_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def predict(
    checkpoint: Checkpoint, plan: Plan, recipe: Recipe, calibration: Calibration, document_bytes: int
) -> Prediction:
    """What compressing ``checkpoint`` into the formats of ``plan`` by ``recipe`` will take."""
    tokens = -(-calibration.tokens // calibration.length) * calibration.length if recipe.calibrated else 0
    arrays = sum(len(plan.formats[s.name].weight.fields(s.rows, s.cols)) for s in checkpoint.topology.sites)
    output = plan.data_bytes + document_bytes + HEADER * arrays
    steps = _Probe(checkpoint, plan, recipe, calibration, tokens).steps()
    return Prediction(
        seconds=sum(steps.values()),
        steps=steps,
        peak_bytes=resident_bytes() + OVERHEAD + _most_memory(checkpoint, plan, recipe, calibration, tokens),
        work_bytes=plan.data_bytes + HEADER * arrays + 4 * tokens + _side_bytes(checkpoint, recipe, tokens),
        output_bytes=output,
        data_bytes=plan.data_bytes,
        bits_per_weight=plan.bits_per_weight,
    )


def _side_bytes(checkpoint: Checkpoint, recipe: Recipe, tokens: int) -> int:
    """What parts with statistics and gradients take on the disk."""
    sites = checkpoint.topology.sites
    fisher = 4 * sum(s.rows * s.cols for s in sites if s.layer is not None) if "fisher" in recipe.solver.needs else 0
    widths = sum(groups(checkpoint.topology, 0).values()) * checkpoint.config.layers
    inputs = 4 * (min(tokens, 512) + 4) * widths if recipe.transforms and "inputs" in recipe.needs else 0
    return fisher + inputs


# ---------------------------------------------------------------- refusals


def refuse_disk(place: str | Path, need: int, out: Path | None = None) -> None:
    """Raises ResourceError when the file system of ``place`` (or of the folder above it) lacks ``need`` bytes."""
    place = Path(place).absolute()
    told = out or place
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        disk = os.statvfs(place)
    except OSError as error:
        raise ResourceError(f"{told} cannot be written: {error.strerror}; choose another place.") from None
    free = disk.f_bavail * disk.f_frsize
    # Some network file systems report no blocks at all; there only the writing itself can tell.
    if disk.f_blocks and free < need:
        raise ResourceError(
            f"{told} cannot be written: it needs {need} bytes, work included, and the disk has {free} free; free some "
            "space or choose another place"
        )


def refuse_memory(prediction: Prediction) -> None:
    """Raises ResourceError when the memory that is free does not take what the run needs beside what it holds."""
    free = available_memory()
    need = prediction.peak_bytes - resident_bytes()
    if free is not None and need > free:
        raise ResourceError(
            f"this run needs about {need / 1e6:.0f} MB of memory and {free / 1e6:.0f} MB are free; free some, "
            "calibrate with fewer tokens, or choose a recipe without calibration."
        )


def resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not tell."""
    try:
        found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


# ---------------------------------------------------------------- memory


def _most_memory(checkpoint: Checkpoint, plan: Plan, recipe: Recipe, calibration: Calibration, tokens: int) -> int:
    """The largest of what the steps of a run hold at once."""
    config, topology = checkpoint.config, checkpoint.topology
    tables = [s for s in topology.sites if s.layer is None]
    layer = [s for s in topology.sites if s.layer == 0]
    finished = sum(_packed(plan.formats[s.name], s) for s in layer)
    plain = recipe.tables == Solver(Nearest())
    found = [_packed(plan.formats[s.name], s) + (0 if plain else PER_WEIGHT * s.rows * s.cols) for s in tables]
    logits = 64 * 4 * config.vocab
    # The check: the model, its keys and values, and what is mapped of the file while a site is being copied.
    found.append(plan.data_bytes + kv_bytes(config, min(512, config.context)) + logits + found[0])
    if recipe.solver == Solver(Nearest()) and not recipe.calibrated:
        return max([*found, finished + 32 * 512 * max(s.cols for s in layer)])
    if recipe.calibrated:
        hessian = "hessian" in recipe.needs
        found.append(found[0] + calibration_bytes(config, tokens, hessian=hessian))
        if calibration.text == SELF:
            found.append(_writer_bytes(checkpoint) + kv_bytes(config, 32 * calibration.length) + logits)
            found[-1] = min(found[-1], _writer_bytes(checkpoint) + (1 << 30) + logits)
    if "fisher" in recipe.needs:
        found.append(_gradient_bytes(checkpoint))
    return max(*found, finished + _fit_bytes(layer, recipe, 4 * tokens * config.hidden))


def _writer_bytes(checkpoint: Checkpoint) -> int:
    """The model that writes the calibration text."""
    if checkpoint.data_bytes <= WRITES_AS_IS:
        return checkpoint.data_bytes
    fmt = parse(WRITES_IN)
    return sum(_packed(fmt, site) for site in checkpoint.topology.sites)


def _gradient_bytes(checkpoint: Checkpoint) -> int:
    """Weights, what is kept of their gradients (twice: salience has the change of the weights too), activations."""
    config, sites = checkpoint.config, checkpoint.topology.sites
    blocks, layer = (4 * sum(s.rows * s.cols for s in some) for some in (
        [s for s in sites if s.layer is not None], [s for s in sites if s.layer == 0]
    ))  # fmt: skip
    free = available_memory()
    weights = blocks if free is None or blocks <= free // 2 else layer
    table = 4 * config.vocab * config.hidden * (1 if config.tied else 2)
    return weights + 2 * min(blocks, max(GRADIENT_BYTES, layer)) + table + (1 << 30)


def _fit_bytes(layer: Sequence[Site], recipe: Recipe, states: int) -> int:
    """The most that the fit of one input's sites takes beside what is finished.

    The matrix, what is left of it, its codes and errors; the second moments of this input (one after the other of them
    all, unless inputs are collected group by group) and their factor, which is made in float64 up to 8192 columns;
    where a layer is compressed from front to back, its sites in float32 from here on.
    """
    hessian = "hessian" in recipe.needs
    shares = list(dict.fromkeys(site.shares for site in layer))
    most = 0
    for i, name in enumerate(shares):
        later = [s for s in layer if s.shares in shares[i:]]
        cols = {s.shares: s.cols for s in later}
        square = cols[name] ** 2
        factor = (12 if cols[name] <= 8192 else 9) * square
        if recipe.sequential == "group":
            held = 4 * sum(s.rows * s.cols for s in later) + 4 * square * hessian
        else:
            held = 4 * sum(c * c for c in cols.values()) * hessian
        largest = max(s.rows * s.cols for s in later if s.shares == name)
        most = max(most, states + held + factor * hessian + PER_WEIGHT * largest)
    return most


def _packed(fmt: SiteFormat, site: Site) -> int:
    return sum(field.nbytes for field in fmt.weight.fields(site.rows, site.cols).values())


# ---------------------------------------------------------------- seconds


class _Probe:
    """Small pieces of the work, timed."""

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, recipe: Recipe, calibration: Calibration, tokens: int
    ) -> None:
        self.checkpoint, self.plan, self.recipe, self.calibration = checkpoint, plan, recipe, calibration
        self.tokens = tokens
        self._random = np.random.default_rng(0)

    def steps(self) -> dict[str, float]:
        """Seconds by the name of the step."""
        checkpoint, recipe = self.checkpoint, self.recipe
        sites = checkpoint.topology.sites
        tables = [s for s in sites if s.layer is None]
        blocks = [s for s in sites if s.layer is not None]
        found: dict[str, float] = {}
        per_token = 0.0
        if recipe.calibrated:
            per_token = self._forward()
            layers, passes = checkpoint.config.layers, {"layer": 2.0, "group": 2.2, "none": 1.0}[recipe.sequential]
            if self.calibration.text == SELF:
                found["text"] = self.tokens * (layers * per_token * 2 + 1e-8 * checkpoint.config.vocab)
            found["forward"] = layers * passes * self.tokens * per_token
            found["statistics"] = layers * self._sums()
            if "fisher" in recipe.needs:
                # Forward, backward by inputs and by weights, and the layers' activations once more.
                sweeps = -(-4 * sum(s.rows * s.cols for s in blocks) // GRADIENT_BYTES)
                found["gradients"] = sweeps * self.tokens * layers * per_token * 4
            if recipe.transforms and "inputs" in recipe.needs:
                found["forward"] += layers * self.tokens * per_token
        found["fit"] = self._fits(blocks, recipe.solver, recipe.calibrated) + self._fits(tables, recipe.tables, False)
        written = 2 * self.plan.data_bytes / WRITE_RATE
        found["check"] = written + self.plan.data_bytes / LOAD_RATE + checkpoint.config.layers * 600 * per_token
        return found

    def _forward(self) -> float:
        """Seconds a token in one layer in float32."""
        run = LayerRun.of(self.checkpoint, 0)
        h = self._random.standard_normal((PROBE_TOKENS, self.checkpoint.config.hidden), np.float32)
        return _least(lambda: run.run(h)) / len(h)

    def _sums(self) -> float:
        """Seconds of one layer's statistics over all tokens."""
        total = 0.0
        hessian = "hessian" in self.recipe.needs
        for cols in groups(self.checkpoint.topology, 0).values():
            some = min(cols, PROBE_COLS)
            x = self._random.standard_normal((STEP, some), np.float32)
            collector = Collector(some, hessian=hessian, samples=STEP, expected_tokens=4 * STEP)
            grows = (cols / some) ** (2 if hessian else 1)
            total += _least(lambda c=collector, x=x: c.add(x)) / STEP * self.tokens * grows  # type: ignore[misc]
        return total

    def _fits(self, sites: Sequence[Site], solver: Solver, calibrated: bool) -> float:
        """Seconds to read, fit and measure these sites: one probe for each format and width."""
        known: dict[tuple[str, int], Callable[[int, int], float]] = {}
        total = 0.0
        for site in sites:
            fmt = self.plan.formats[site.name]
            key = (str(fmt), site.cols)
            if key not in known:
                known[key] = self._fit(site, fmt, solver, calibrated)
            total += known[key](site.rows, site.cols)
        return total

    def _fit(self, site: Site, fmt: SiteFormat, solver: Solver, calibrated: bool) -> Callable[[int, int], float]:
        """Seconds for rows and columns."""
        rows, cols = min(site.rows, PROBE_ROWS), min(site.cols, PROBE_COLS)
        source = self.checkpoint.source(site)
        w = np.ascontiguousarray(source.read(0, rows)[:, :cols])
        reading = _least(lambda: source.read(0, rows)) / (rows * site.cols)
        self.checkpoint.release(site)

        def rounding() -> None:
            encode(_small(fmt.weight, rows, cols), ArraySource(w)).decode()

        rounded = reading * 2 + _least(rounding) / (rows * cols)
        if solver == Solver(Nearest()) and not calibrated:
            return lambda r, c: rounded * r * c
        half = max(16, rows // 2)
        fixed, each = self._solving(fmt, w, half, solver, calibrated)
        multiply, factor = _product(np.float32), _product(np.float64)
        by_square = min(each, multiply * cols * cols) if "hessian" in solver.needs else 0.0
        by_cube = min(fixed, factor * cols**3) if "hessian" in solver.needs else 0.0

        def seconds(r: int, c: int) -> float:
            k = c / cols
            per_row = (each - by_square) * k + by_square * k**2
            return reading * r * c + per_row * r + (fixed - by_cube) * k**2 + by_cube * k**3

        return seconds

    def _solving(self, fmt: SiteFormat, w: F32, half: int, solver: Solver, calibrated: bool) -> tuple[float, float]:
        """Seconds whatever the rows, and for each row, at the probe's width."""
        rows, cols = w.shape
        stats = None
        if calibrated:
            collector = Collector(cols, hessian="hessian" in self.recipe.needs, samples=STEP, expected_tokens=STEP)
            collector.add(self._random.standard_normal((STEP, cols), np.float32))
            stats = collector.result()
        fisher = np.ones_like(w) if "fisher" in self.recipe.needs else None

        def run(n: int) -> float:
            small = SiteFormat(_small(fmt.weight, n, cols), fmt.input)
            some = None if fisher is None else fisher[:n]
            return _least(lambda: solve(small, w[:n], stats, solver, where="the probe", fisher=some))

        few, many = run(half), run(rows)
        each = max(0.0, many - few) / max(1, rows - half)
        return max(0.0, few - each * half), each


def _small(fmt: Format, rows: int, cols: int) -> Format:
    """The format, or one like it where it counts rows or columns that a corner of the matrix does not have."""
    try:
        fmt.check(rows, cols)
    except FormatError:
        from gossamer.formats import parse_weight

        return next((leaf for leaf in _leaves(fmt) if isinstance(leaf, Coded)), parse_weight("int4/g32"))
    return fmt


def _leaves(fmt: Format) -> list[Format]:
    from gossamer.formats import Composite, weight_of

    if not isinstance(fmt, Composite):
        return [fmt]
    return [leaf for _, branch in fmt.parts for leaf in _leaves(weight_of(branch))]


def _product(kind: type) -> float:
    """Seconds for a multiplication and an addition in a product of matrices."""
    a: npt.NDArray[Any] = np.ones((512, 512), kind)
    return _least(lambda: a @ a) / 512**3


def _least(run: Callable[[], object], times: int = 2) -> float:
    """Seconds of the fastest of a few calls, the first of which also warms up."""
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best
