"""Which site gets which format, where a recipe lets the weights or the loss decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.compress.allocate import Level, aligned, finequant, salience, settle, wide_groups
from gossamer.compress.fit import read_site
from gossamer.compress.solvers.factor import UnstableError, inverse_factor
from gossamer.compress.statistics import Statistics
from gossamer.compress.steps import FineQuant, Salience, WideGroups
from gossamer.errors import UsageError
from gossamer.formats import Coded, Cols, SiteFormat, parse
from gossamer.models.checkpoint import Checkpoint
from gossamer.models.topology import Site

__all__ = ["Chosen", "expected", "for_model", "for_site", "refuse"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

DAMPING = 0.01  # of a Hessian whose inverse says how much a column matters


@dataclass
class Chosen:
    """Formats, and what ``formats.encode_with`` is told at sites that are split."""

    formats: dict[str, SiteFormat]
    hints: dict[str, dict[str, Any]] = field(default_factory=dict)


def expected(options: Any, site: Site, fmt: SiteFormat) -> SiteFormat:
    """About what a site will get, for sizes that are told before anything is looked at."""
    if isinstance(options, Salience) and 0 < options.percent < 100:
        split = f"rows({options.percent:g}%: {options.wide}, {fmt.weight}) @ {fmt.input}"
        return settle(split, site)
    if isinstance(options, WideGroups):
        groups = -(-site.cols // options.group)
        columns = len(aligned(np.zeros(groups), options.block, options.count)) * options.group
        if 0 < columns < site.cols:
            return SiteFormat(Cols((columns,), (parse(options.wide).weight, fmt.weight)), fmt.input)
    return fmt


def refuse(options: Any, sites: Sequence[Site], formats: Mapping[str, SiteFormat]) -> None:
    """Raises UsageError for formats among which the allocator cannot choose."""
    if isinstance(options, Salience) and len({formats[site.name] for site in sites}) > 1:
        raise UsageError(
            "salience ranks the rows of all linear layers in one list, so they share one format; give '*' alone, and "
            "--keep for sites that shall stay out."
        )
    if isinstance(options, FineQuant):
        for site in sites:
            if not isinstance(formats[site.name].weight, Coded):
                raise UsageError(
                    f"finequant chooses the groups of a format such as int4/g64, not of {formats[site.name]}."
                )


def for_model(
    options: Any,
    checkpoint: Checkpoint,
    sites: Sequence[Site],
    formats: Mapping[str, SiteFormat],
    scores: Mapping[str, F64] | None,
) -> Chosen:
    """Formats that are settled before any site is fitted; ``scores`` are row saliences."""
    if isinstance(options, FineQuant):
        found: dict[str, SiteFormat] = {}
        for site in sites:
            fmt = formats[site.name]
            assert isinstance(fmt.weight, Coded)  # else refused
            number, given = fmt.weight.number.name, str(fmt.input)
            found |= finequant(
                [site],
                lambda s: read_site(checkpoint, s),
                number=number,
                input=given,
                alpha=options.alpha,
                least=options.least,
            )
        return Chosen(found)
    if isinstance(options, Salience):
        assert scores is not None
        if not sites:
            return Chosen({})
        narrow = formats[sites[0].name]
        wide = SiteFormat(parse(options.wide).weight, narrow.input)
        level = Level(wide, options.percent, scores)
        done = salience(sites, [level], narrow, multiple=options.multiple)
        return Chosen(done.formats, done.hints)
    return Chosen({})


def for_site(options: Any, site: Site, fmt: SiteFormat, w: F32, stats: Statistics | None) -> Chosen:
    """What is settled when a site is about to be fitted and its input is known."""
    if not isinstance(options, WideGroups):
        return Chosen({site.name: fmt})
    assert stats is not None
    assert stats.hessian is not None
    inverse = _inverse_diagonal(stats.hessian, site.name)
    done = wide_groups(
        [site],
        lambda s: w,
        wide=f"{parse(options.wide).weight} @ {fmt.input}",
        narrow=str(SiteFormat(fmt.weight, fmt.input)),
        group=options.group,
        block=options.block,
        count=options.count,
        inverse=lambda s: inverse,
        score=options.score,
    )
    return Chosen(done.formats, done.hints)


def _inverse_diagonal(hessian: F32, where: str) -> F32:
    """The diagonal of (H + damping)^-1, float32 [cols]."""
    dead = np.asarray(np.diagonal(hessian) == 0)
    damping = DAMPING
    while damping <= 10:
        try:
            upper = inverse_factor(hessian, np.arange(len(hessian)), dead, damping)
        except UnstableError:
            damping *= 10
            continue
        found: F32 = np.einsum("kc,kc->c", upper, upper)
        return found
    raise UsageError(f"the second moments of the inputs of {where} cannot be inverted; calibrate with more text.")
