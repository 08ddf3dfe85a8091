"""Several ways to compress one model, measured alike: divergence from the base, bytes, speed of decoding.

Each row is kept in a folder under a key of everything it depends on, so that a run that was stopped goes on where it
was, and a row that is asked for again costs nothing. The base runs beside every candidate; its logits are not stored.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gossamer.checkpoints.folder import json_file
from gossamer.compress import recipe as recipes
from gossamer.compress.job import Job
from gossamer.compress.job import compress as compress_by
from gossamer.compress.kept import SCHEMA, Kept, contents_hash, machine, row_key, user_cache
from gossamer.compress.recipe import Recipe
from gossamer.compress.watch import Watch
from gossamer.engine.llm import LLM, chooser
from gossamer.errors import FormatError, UsageError
from gossamer.evaluate.charts import Point, frontier, scatter, standalone
from gossamer.evaluate.html import COMPARE
from gossamer.evaluate.score import Result, evaluate, formats_used, noise_floor
from gossamer.evaluate.speed import bench
from gossamer.evaluate.texts import Text
from gossamer.formats import parse, parse_input
from gossamer.models.checkpoint import Checkpoint, open_checkpoint
from gossamer.models.load import Progress

__all__ = ["Comparison", "Options", "Row", "compare", "draw_frontier"]

BASE = "base"

Step = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Options:
    """How rows are measured: as ``evaluate`` takes them, and the repetitions of ``bench`` (0: no speed).

    ``inputs`` replaces the input format of every site that can take it (None: as the row's formats say); the base
    keeps its own. ``keep_folders`` leaves what recipes made in the cache, for a later call with other options.
    """

    tokens: int = 8192
    window: int = 512
    score: str = "second-half"
    bos: bool | None = None
    repetitions: int = 5
    decode: int = 64
    prefill: int = 128
    inputs: str | None = None
    keep_folders: bool = False


@dataclass(frozen=True)
class Row:
    """One candidate. Quality as in ``Result``; speeds are tokens a second, None where they were not asked for.

    ``kind`` is "recipe", "format", "folder" or "base"; ``best`` tells whether no other row beats it in both bytes and
    KL. ``seconds`` and ``peak_bytes`` are what a recipe took to compress. ``kept`` tells whether all of the row had
    been measured before.
    """

    name: str
    kind: str
    bytes: int
    bits_per_weight: float
    kl_mean: float
    kl_mean_stderr: float | None
    kl_p99: float
    top1_agreement: float
    perplexity: float
    nll_increase: float
    nll_increase_stderr: float | None
    formats: dict[str, int]
    decode_tps: float | None
    decode_tps_range: tuple[float, float] | None
    prefill_tps: float | None
    seconds: float | None
    peak_bytes: int | None
    best: bool
    kept: bool


@dataclass(frozen=True)
class Comparison:
    """The rows in the order they were asked for, the base first, and what they have in common.

    ``noise_floor`` is the KL of the base from itself in another precision (see ``evaluate.score.noise_floor``).
    """

    model: str
    against: str
    text: str
    text_sha256: str
    protocol: str
    base_perplexity: float
    noise_floor: float
    machine: dict[str, Any]
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Everything as a dictionary that ``json.dumps`` takes, and ``gossamer report`` shows."""
        return {"kind": COMPARE, "schema": SCHEMA, **asdict(self)}


def compare(
    model: str | Path,
    entries: Sequence[str],
    text: Text,
    *,
    keep: Sequence[tuple[str, str]] = (),
    against: str | Path | None = None,
    options: Options | None = None,
    cache: str | Path | None = None,
    fresh: bool = False,
    step: Step | None = None,
) -> Comparison:
    """Measures each of ``entries`` on ``model``, a path.

    An entry is a recipe's name or file, ``RECIPE:EXPR`` for that recipe with another format, a format expression for
    plain rounding, or a compressed folder. ``keep`` overrides the formats of the first three as for ``LLM``.
    ``against`` is the base of the divergence (None: the model as it is).
    ``cache`` is where rows are kept (None: ``gossamer/compare`` in the user's cache); ``fresh`` measures again what is
    there. ``step`` is told what is being done and gives the callback for its progress.

    A recipe is compressed into the cache, by a run that goes on where an earlier one was stopped, and its folder is
    removed when the row is complete. Raises UsageError for an entry that is none of these, before anything is
    measured, and what ``compress``, ``LLM``, ``evaluate`` and ``bench`` raise.
    """
    return _Run(model, entries, text, keep, against, options or Options(), cache, fresh, step or _silent).run()


@contextmanager
def _silent(what: str) -> Iterator[Progress]:
    yield lambda done, total: None


@dataclass(frozen=True)
class _Entry:
    name: str
    kind: str
    identity: Any  # what its figures depend on, as JSON
    recipe: Recipe | None = None


class _Run:
    def __init__(
        self,
        model: str | Path,
        entries: Sequence[str],
        text: Text,
        keep: Sequence[tuple[str, str]],
        against: str | Path | None,
        options: Options,
        cache: str | Path | None,
        fresh: bool,
        step: Step,
    ) -> None:
        self.text, self.options, self.step = text, options, step
        self.keep = [(pattern, str(parse(expression))) for pattern, expression in keep]
        if self.options.inputs is not None:
            self.options = replace(self.options, inputs=str(parse_input(self.options.inputs)))
        self.kept = Kept(Path(cache) if cache is not None else user_cache(), fresh)
        self.checkpoint = open_checkpoint(model)
        self.base_checkpoint = self.checkpoint if against is None else open_checkpoint(against)
        self.entries = [self._entry(e) for e in entries]
        if not self.entries:
            raise UsageError("there is nothing to compare; name recipes, formats or compressed folders with --recipes.")
        if len({e.name for e in self.entries}) < len(self.entries):
            raise UsageError("--recipes names the same thing twice; name each once.")
        with step("reading the model") as progress:
            self.model_key = contents_hash(Path(model), progress)
            self.base_key = self.model_key if against is None else contents_hash(Path(against), progress)
        self.machine = machine()
        self._base: LLM | None = None

    def run(self) -> Comparison:
        key = self._quality_key(BASE)
        kept = self.kept.get(key) is not None
        noise = self._part(f"{BASE}, quality", key, lambda p: self._noise(p).to_json())
        base = self._base_row(noise, kept)
        rows = [base, *(self._row(entry) for entry in self.entries)]
        best = {p.label for p in frontier([Point(r.name, r.bytes, r.kl_mean) for r in rows])}
        return Comparison(
            model=self.checkpoint.path.name,
            against=self.base_checkpoint.path.name,
            text=self.text.description,
            text_sha256=self.text.sha256,
            protocol=noise["protocol"],
            base_perplexity=noise["base_perplexity"],
            noise_floor=noise["kl_mean"],
            machine=self.machine,
            rows=[Row(**(vars(r) | {"best": r.name in best})) for r in rows],
        )

    def _entry(self, text: str) -> _Entry:
        name = text.strip()
        first, _, expression = name.partition(":")
        if name in recipes.names() or Path(name).suffix in (".yaml", ".yml"):
            recipe = recipes.load(name)
        elif expression and first in recipes.names():
            recipe = recipes.of_format(expression, recipes.load(first))
        elif name and Path(name).is_dir():
            return _Entry(name, "folder", ["folder", contents_hash(Path(name))])
        else:
            name = str(parse(name))
            return _Entry(name, "format", ["format", name, self.keep])
        options = Job(self.checkpoint, recipe, keep=self.keep).options  # refuses what cannot be done
        return _Entry(name, "recipe", ["recipe", options], recipe)

    # ------------------------------------------------------------ rows

    def _row(self, entry: _Entry) -> Row:
        quality_key, speed_key = self._quality_key(entry.identity), self._speed_key(entry.identity)
        wanted = [quality_key] + ([speed_key] if self.options.repetitions else [])
        kept = all(self.kept.get(key) is not None for key in wanted)
        folder = None
        if entry.recipe is not None:
            folder = self.kept.folder / f"{row_key('model', self.model_key, entry.identity)}.model"
        llm = None if kept else self._load(entry, folder)

        def measured(progress: Progress) -> dict[str, Any]:
            assert llm is not None  # loaded where a part is missing
            result = evaluate(llm, self.text, against=self.base, progress=progress, **self._how())
            work = json_file(folder / "gossamer.json").get("measured", {}) if folder is not None else {}
            return {**result.to_json(), "seconds": work.get("seconds"), "peak_bytes": work.get("peak_bytes")}

        quality = self._part(f"{entry.name}, quality", quality_key, measured)
        speed = self._speed(entry.name, speed_key, llm)
        if folder is not None and not self.options.keep_folders:
            del llm
            shutil.rmtree(folder, ignore_errors=True)
        return _as_row(entry.name, entry.kind, quality, speed, kept)

    def _base_row(self, noise: Mapping[str, Any], kept: bool) -> Row:
        """The base beside itself: no divergence, its own bytes and speed."""
        checkpoint = self.base_checkpoint
        key = self._speed_key(BASE)
        fast = not self.options.repetitions or self.kept.get(key) is not None
        speed = self._speed(BASE, key, None if fast else self.base)
        same = {"kl_mean": 0.0, "kl_mean_stderr": None, "kl_p99": 0.0, "top1_agreement": 1.0, "nll_increase": 0.0}
        same |= {"nll_increase_stderr": None, "seconds": None, "peak_bytes": None}
        same |= {"perplexity": noise["base_perplexity"], "formats": noise["base_formats"]}
        same |= {"bytes": noise["base_bytes"]}
        same |= {"bits_per_weight": 8 * noise["base_bytes"] / checkpoint.topology.parameters}
        return _as_row(BASE, BASE, same, speed, kept and fast)

    def _load(self, entry: _Entry, folder: Path | None) -> LLM:
        path = Path(entry.name) if entry.kind == "folder" else folder
        if entry.recipe is not None and folder is not None and not folder.exists():
            compress_by(self.checkpoint, folder, entry.recipe, keep=self.keep, watch=_Told(entry.name, self.step))
        source = self.checkpoint if path is None else open_checkpoint(path)
        form = entry.name if entry.kind == "format" else None
        keep = self.keep if entry.kind == "format" else []
        if self.options.inputs is not None:
            form, keep = None, _with_inputs(source, form, keep, self.options.inputs)
        with self.step(f"{entry.name}, loading") as progress:
            return LLM(source, format=form, keep=keep, context=self._context(source), progress=progress)

    @property
    def base(self) -> LLM:
        """Loaded when it is first needed, then kept."""
        if self._base is None:
            with self.step(f"{BASE}, loading") as progress:
                source = self.base_checkpoint
                self._base = LLM(source, context=self._context(source), progress=progress)
        return self._base

    def _context(self, source: Checkpoint) -> int:
        if self.options.window > source.config.context:
            raise UsageError(
                f"--window {self.options.window} is too long: {source.path.name} was made for up to "
                f"{source.config.context} tokens."
            )
        return self.options.window

    def _how(self) -> dict[str, Any]:
        o = self.options
        return {"tokens": o.tokens, "window": o.window, "score": o.score, "bos": o.bos}

    def _noise(self, progress: Progress) -> _Noise:
        base = self.base
        result = noise_floor(base, self.text, progress=progress, **self._how())
        return _Noise(result, base.loaded.data_bytes, formats_used(base.loaded))

    def _speed(self, name: str, key: str, llm: LLM | None) -> dict[str, Any] | None:
        if not self.options.repetitions:
            return None

        def measured(progress: Progress) -> dict[str, Any]:
            assert llm is not None
            o = self.options
            speed = bench(llm, prefill=o.prefill, decode=o.decode, repetitions=o.repetitions, progress=progress)
            return {
                "decode_tps": speed.decode_tps,
                "decode_tps_range": speed.decode_tps_range,
                "prefill_tps": speed.prefill_tps,
                "protocol": speed.protocol,
                "load_average": speed.load_average,
            }

        return self._part(f"{name}, speed", key, measured)

    # ------------------------------------------------------------ what is kept

    def _quality_key(self, identity: Any) -> str:
        model, inputs = [self.model_key, self.base_key], self._inputs(identity)
        return row_key("quality", *model, identity, inputs, self.text.sha256, self._how())

    def _inputs(self, identity: Any) -> str | None:
        return None if identity == BASE else self.options.inputs

    def _speed_key(self, identity: Any) -> str:
        o = self.options
        how = [o.repetitions, o.decode, o.prefill, o.window, self._inputs(identity)]
        model = self.base_key if identity == BASE else self.model_key
        return row_key("speed", model, identity, how, self.machine)

    def _part(self, what: str, key: str, measure: Callable[[Progress], dict[str, Any]]) -> dict[str, Any]:
        found = self.kept.get(key)
        if found is None:
            with self.step(what) as progress:
                found = measure(progress)
            self.kept.put(key, what, found)
        return found


def _with_inputs(
    source: Checkpoint, form: str | None, keep: Sequence[tuple[str, str]], inputs: str
) -> list[tuple[str, str]]:
    """Each site's format with other inputs; as it is where its weight cannot take them."""
    wanted = parse_input(inputs)
    rules = [(pattern, parse(text)) for pattern, text in keep]
    choose = chooser(None if form is None else parse(form), rules, source.topology)
    found = []
    for site in source.topology.sites:
        fmt = choose(site) or source.native(site)
        with suppress(FormatError):  # dense weights take no integer inputs
            fmt = replace(fmt, input=wanted)
        found.append((site.name, f"{fmt.weight} @ {fmt.input}"))
    return found


class _Told(Watch):
    """The phases of a compression as steps of the comparison."""

    def __init__(self, name: str, step: Step) -> None:
        self._name, self._step = name, step

    @contextmanager
    def phase(self, what: str) -> Iterator[Progress]:
        with self._step(f"{self._name}, {what}") as progress:
            yield progress


@dataclass(frozen=True)
class _Noise:
    """The noise floor, and what the base takes."""

    result: Result
    nbytes: int
    formats: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {**self.result.to_json(), "base_bytes": self.nbytes, "base_formats": self.formats}


_QUALITY = (
    *("bytes", "bits_per_weight", "formats", "kl_mean", "kl_mean_stderr", "kl_p99", "top1_agreement", "perplexity"),
    *("nll_increase", "nll_increase_stderr", "seconds", "peak_bytes"),
)


def _as_row(name: str, kind: str, quality: Mapping[str, Any], speed: Mapping[str, Any] | None, kept: bool) -> Row:
    rates = speed or {}
    return Row(
        name=name,
        kind=kind,
        **{field: quality[field] for field in _QUALITY},
        decode_tps=rates.get("decode_tps"),
        decode_tps_range=tuple(rates["decode_tps_range"]) if rates else None,
        prefill_tps=rates.get("prefill_tps"),
        best=False,
        kept=kept,
    )


# ---------------------------------------------------------------- the picture


def draw_frontier(found: Comparison) -> str:
    """Quality by bytes as an SVG file's text; larger circles decode faster."""
    points = [Point(r.name, r.bytes / 1e6, r.kl_mean, r.kl_mean_stderr, r.decode_tps) for r in found.rows]
    return standalone(scatter(f"{found.model}: quality by size", "MB", "KL (nats per token)", "tokens/s", points))
