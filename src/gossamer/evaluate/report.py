"""A bench of several formats as one JSON object, and as a picture drawn from it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.errors import ResourceError, UsageError
from gossamer.evaluate.peer import LlamaCpp
from gossamer.evaluate.speed import Speed

__all__ = ["SCHEMA", "check_picture", "draw", "report"]

SCHEMA = 1

_SUFFIXES = (".svg", ".png", ".pdf")
_OURS, _PEER, _BOUND = "#1f4e79", "#c0864a", "#444444"


def report(rows: Sequence[tuple[str, Speed]], peer: LlamaCpp | None = None) -> dict[str, Any]:
    """What ``bench --json`` writes: see docs/measurements.md. ``rows`` are (format as asked for, what it reached)."""
    first = rows[0][1]
    return {
        "schema": SCHEMA,
        "model": first.model,
        "threads": first.threads,
        "isa": first.isa,
        "load_average": os.getloadavg()[0],
        "peer": None if peer is None else peer.to_json(),
        "rows": [{"format": text} | speed.to_json() for text, speed in rows],
    }


def check_picture(path: str) -> None:
    """Raises UsageError or ResourceError for a picture that could not be drawn, before anything is timed."""
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise UsageError(f"--plot {path} must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ResourceError("--plot needs matplotlib; install it with 'pip install matplotlib'.") from None


def draw(data: Mapping[str, Any], path: str | Path) -> None:
    """Bars of tokens a second by format, a panel for each piece of work: medians, with the spread of the repetitions
    as whiskers, the peer beside, and the roofline of each as a line above."""
    check_picture(str(path))
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    rows = data["rows"]
    works = [(c["work"], c["batch"]) for c in rows[0]["cells"]]
    sides = [("ours", "gossamer", _OURS)]
    if data["peer"] is not None:
        sides.append(("peer", data["peer"]["name"], _PEER))
    width = 0.8 / len(sides)
    figure, axes = plt.subplots(1, len(works), figsize=(1.5 + 2.2 * len(works), 3.2 + 0.1 * len(rows)), squeeze=False)
    for at, (axis, (work, batch)) in enumerate(zip(axes[0], works)):
        cells = [row["cells"][at] for row in rows]
        for side, (key, name, color) in enumerate(sides):
            found = [c[key] for c in cells]
            places = [i + (side - (len(sides) - 1) / 2) * width for i in range(len(cells))]
            middle = [r["median"] for r in found]
            spread = [[r["median"] - r["low"] for r in found], [r["high"] - r["median"] for r in found]]
            axis.bar(places, middle, width, yerr=spread, capsize=2, color=color, label=name)
        for i, c in enumerate(cells):
            label = "roofline" if i == 0 else None
            axis.plot(
                [i - 0.45, i + 0.45], [c["bound_tps"]] * 2, color=_BOUND, linestyle="--", linewidth=1, label=label
            )
        axis.set_title(
            f"prefill of {cells[0]['tokens']}" if work == "prefill" else f"decode, batch {batch}", fontsize=9
        )
        axis.set_xticks(range(len(rows)), [row["format"] for row in rows], rotation=30, ha="right", fontsize=7)
        axis.set_ylim(0, None)
        axis.tick_params(axis="y", labelsize=7)
        for edge in ("top", "right"):
            axis.spines[edge].set_visible(False)
    axes[0][0].set_ylabel("tokens / s", fontsize=9)
    figure.suptitle(f"{data['model']}, {data['threads']} threads, {data['isa']}", fontsize=9, x=0.02, ha="left")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper right", ncols=3, fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
