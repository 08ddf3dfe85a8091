"""A compression from a checkpoint to a published folder: what shall be done, and the one call that does it.

Layers are read, fitted and written one at a time, so memory does not grow with the depth of the model. Every finished
layer is a part that survives a kill: the same call goes on after it and publishes the bytes of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import gossamer
from gossamer.checkpoints.place import Workplace, workplace
from gossamer.compress import allocation
from gossamer.compress.allocate import by_role
from gossamer.compress.calibrate import fingerprint
from gossamer.compress.calibration_text import SELF, CalibrationText, calibration_text
from gossamer.compress.preflight import WRITES_AS_IS, WRITES_IN, Prediction, predict, refuse_disk, refuse_memory
from gossamer.compress.recipe import Calibration, Recipe
from gossamer.compress.run import Run, Written
from gossamer.compress.steps import ALLOCATORS
from gossamer.compress.watch import SILENT, Watch
from gossamer.compress.write import documents
from gossamer.engine.llm import chooser
from gossamer.errors import CheckpointError, FormatError, ResourceError
from gossamer.formats import SiteFormat, parse
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.load import Plan, Progress, plan
from gossamer.models.topology import Site

__all__ = ["Job", "Written", "compress"]

Keep = Sequence[tuple[str, str]]


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
        self.formats, kept = self._choose()
        blocks = [site for site in checkpoint.topology.sites if site.layer is not None]
        self.open_sites = [site for site in blocks if site.name not in kept]  # that the allocator may decide on
        decides = recipe.allocate.options
        allocation.refuse(decides, self.open_sites, self.formats)
        settled = {s.name: allocation.expected(decides, s, self.formats[s.name]) for s in self.open_sites}
        self.plan: Plan = plan(checkpoint, lambda site: settled.get(site.name, self.formats[site.name]))

    def _choose(self) -> tuple[dict[str, SiteFormat], set[str]]:
        """Formats by ``keep``, else the recipe's, else (where it gives none) the checkpoint's own; and who is kept."""
        sites = self.checkpoint.topology.sites
        choose = chooser(None, [(pattern, parse(text)) for pattern, text in self.keep], self.checkpoint.topology)
        kept = {site.name: fmt for site in sites if (fmt := choose(site)) is not None}
        rest = [site for site in sites if site.name not in kept]
        # A pattern all of whose sites are kept otherwise has nothing to say, and is no mistake.
        rules = {
            key: fmt
            for key, fmt in self.recipe.formats.items()
            if any(fnmatchcase(s.name, key) for s in rest) or not any(fnmatchcase(s.name, key) for s in sites)
        }
        given = by_role(rest, rules) if rules else {site.name: self.checkpoint.native(site) for site in rest}
        return {site.name: kept.get(site.name) or given[site.name] for site in sites}, set(kept)

    @property
    def fit_needs(self) -> frozenset[str]:
        """What must be known of a site's input or loss when it is fitted."""
        late = ALLOCATORS[self.recipe.allocate.name].needs - {"fisher"}
        return self.recipe.solver.needs | late

    @property
    def wants_fisher(self) -> bool:
        """Whether the solver counts weights by their Fisher information."""
        return "fisher" in self.recipe.solver.needs

    def chooses_late(self, site: Site) -> bool:
        """Whether the allocator decides when the site's input is known."""
        return self.recipe.allocate.name == "wide_groups" and any(s.name == site.name for s in self.open_sites)

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
            # The number first: it changes what the text's hash is of.
            found["--calibration-tokens"] = f"{self.calibration.tokens} of {self.calibration.length}"
            content = f" ({self.text.sha256[:12]})" if self.text else ""
            found["--calibration"] = f"{self.calibration.text}{content}"
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
            return Run(job, place, watch).run()
        except (FormatError, CheckpointError):
            place.keep = False  # the same weights would fail again
            raise
        except ResourceError as error:
            raise ResourceError(_told(str(error), place)) from None


def _told(message: str, place: Workplace) -> str:
    """A message about the workplace, which means nothing to a person, as one about the folder that was asked for."""
    return re.sub(re.escape(str(place.folder)) + r"[\w./-]*", lambda _: str(place.out), message)
