"""One page about a compressed model: sizes, errors, quality, tasks, the frontier, provenance. Nothing is fetched.

The page is a single file without scripts; charts are SVG inside it, and every chart stands beside its figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gossamer.errors import UsageError
from gossamer.evaluate import charts
from gossamer.evaluate.charts import Point, number
from gossamer.evaluate.markup import STYLE, figure, flat, percent, plus_minus, size, table, value
from gossamer.evaluate.sites import SiteError, by_role

__all__ = ["COMPARE", "EVAL", "page"]

Json = Mapping[str, Any]

EVAL, COMPARE = "eval", "compare"  # what the key "kind" of a file of results says

_MANY = 300  # entries of the ledger


def page(
    title: str,
    *,
    ledger: Json | None = None,
    sites: Sequence[SiteError] = (),
    results: Sequence[tuple[str, Json]] = (),
) -> str:
    """The page as HTML text.

    ``ledger`` is a folder's gossamer.json, ``sites`` its errors, ``results`` what ``eval --json`` and ``compare``
    wrote, each with the name of its file. Raises UsageError for results that are neither, or damaged.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    try:
        evals = [data for name, data in _of_kind(results, EVAL)]
        compared = [data for name, data in _of_kind(results, COMPARE)]
        parts += _tiles(ledger, evals)
        if sites:
            parts += _sizes(sites)
            parts += _layers(sites)
        for data in evals:
            parts += _quality(data)
            parts += _tasks(data)
            parts += _writing(data)
        for data in compared:
            parts += _frontier(data)
        if ledger:
            parts += _provenance(ledger)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"the results or the ledger lack what a report shows ({type(error).__name__}: {error}); write them again "
            "with 'gossamer eval --json' or 'gossamer compare'."
        ) from None
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{charts.STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _of_kind(results: Sequence[tuple[str, Json]], kind: str) -> Iterator[tuple[str, Json]]:
    for name, data in results:
        found = data.get("kind")
        if found not in (EVAL, COMPARE):
            raise UsageError(
                f"{Path(name).name} holds no results that a report shows; give what 'gossamer eval --json' or "
                "'gossamer compare -o' wrote."
            )
        if found == kind:
            yield name, data


# ---------------------------------------------------------------- sections


def _tiles(ledger: Json | None, evals: Sequence[Json]) -> list[str]:
    facts: list[tuple[str, str]] = []
    cost = (ledger or {}).get("cost") or {}
    source = (ledger or {}).get("source") or {}
    recipe = (ledger or {}).get("recipe") or {}
    if isinstance(recipe, Mapping) and recipe.get("name"):
        facts.append((str(recipe["name"]), "recipe"))
    if "data_bytes" in cost:
        facts.append((size(cost["data_bytes"]), "tensors, norms and biases"))
        facts.append((f"{cost['bits_per_weight']:.3f}", "bits per weight"))
        if source.get("bytes"):
            facts.append((f"{source['bytes'] / cost['data_bytes']:.2f} x", f"smaller than {source.get('file', '')}"))
    for data in evals:
        if data.get("kl_mean") is not None:
            facts.append((plus_minus(data["kl_mean"], data.get("kl_mean_stderr")), "KL, nats per token"))
        if data.get("perplexity") is not None:
            facts.append((number(data["perplexity"]), "perplexity"))
    if not facts:
        return []
    return [
        '<div class="tiles">'
        + "".join(f"<div><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in facts)
        + "</div>"
    ]


def _sizes(sites: Sequence[SiteError]) -> list[str]:
    roles = by_role(sites)
    total = sum(r.nbytes for r in roles)
    chart = charts.bars(
        "Bytes of each role",
        [
            (r.role, r.nbytes, f"{size(r.nbytes)}, {r.bits_per_weight:.2f} bits, {100 * r.nbytes / total:.0f} %")
            for r in roles
        ],
    )
    return [
        "<h2>Where the bytes are</h2>",
        figure(chart, "Packed arrays of the matrices of each role, scales and padding counted."),
        table(
            "By role: errors are means over the sites",
            ["role", "sites", "format", "bytes", "bits/weight", "SQNR (dB)", "output error"],
            [
                [
                    r.role,
                    r.name,
                    r.format,
                    f"{r.nbytes:,}",
                    f"{r.bits_per_weight:.3f}",
                    _decibels(r),
                    _share(r.output_relative),
                ]
                for r in roles
            ],
        ),
    ]


def _layers(sites: Sequence[SiteError]) -> list[str]:
    """Errors by layer, a line for each role: of outputs where they were measured, else of weights."""
    measured = any(s.output_relative for s in sites)
    series: dict[str, list[tuple[float, float]]] = {}
    for site in sites:
        layer = _layer(site.name)
        decibels = _output_decibels(site) if measured else site.sqnr_db
        if layer is not None and decibels is not None:
            series.setdefault(site.role, []).append((layer, decibels))
    if not series:
        return []
    what = "signal to noise of the outputs (dB)" if measured else "signal to noise of the weights (dB)"
    caption = "Higher is closer to the base. " + (
        "Outputs on calibration text: 10 log10 of their mean square by the mean square error."
        if measured
        else "10 log10 of the sum of squared weights by the sum of squared differences."
    )
    rows = [
        [s.name, s.format, f"{s.nbytes:,}", f"{s.bits_per_weight:.3f}", _decibels(s), _share(s.output_relative)]
        for s in sites
    ]
    every = table("Every site", ["site", "format", "bytes", "bits/weight", "SQNR (dB)", "output error"], rows)
    return [
        "<h2>Error by layer</h2>",
        figure(charts.lines("Error by layer", "layer", what, series), caption),
        f"<details><summary>All {len(rows)} sites</summary>{every}</details>",
    ]


def _quality(data: Json) -> list[str]:
    if data.get("perplexity") is None:
        return []
    noise = data.get("noise_floor") or {}
    rows = [
        ["perplexity", plus_minus(data["perplexity"], data.get("perplexity_stderr"))],
        ["perplexity of the base", value(data.get("base_perplexity"))],
        [
            "increase of the cost of a token (nats)",
            plus_minus(data.get("nll_increase"), data.get("nll_increase_stderr")),
        ],
        ["bits per byte", value(data.get("bits_per_byte"))],
        ["KL(base || this), mean (nats per token)", plus_minus(data.get("kl_mean"), data.get("kl_mean_stderr"))],
        ["KL, 99th percentile", value(data.get("kl_p99"))],
        ["KL, first and second half of the text", " and ".join(map(value, data.get("kl_halves") or ())) or "-"],
        ["noise floor: KL of the base from itself in another precision", value(noise.get("kl_mean"))],
        ["same most likely token", percent(data.get("top1_agreement"))],
    ]
    parts = [
        f"<h2>Quality{_against(data)}</h2>",
        f"<p>{escape(str(data.get('text', '')))}. {escape(str(data.get('protocol', '')))}</p>",
        table(f"{data.get('tokens', 0):,} tokens scored", ["", "figure"], [r for r in rows if r[1] != "-"]),
    ]
    buckets = data.get("kl_by_confidence") or []
    if buckets:
        told = [
            (f"{b['low']:g} to {b['high']:g}", b["kl_mean"] or 0.0, f"{value(b['kl_mean'])} ({b['tokens']:,} tokens)")
            for b in buckets
        ]
        parts.append(
            figure(
                charts.bars("KL by how sure the base is", told),
                "Mean KL of the tokens at which the base gave its likeliest token a probability in this range.",
            )
        )
        parts.append(
            table(
                "By the base's highest probability",
                ["probability", "tokens", "KL", "same most likely token"],
                [
                    [
                        f"{b['low']:g} to {b['high']:g}",
                        f"{b['tokens']:,}",
                        plus_minus(b["kl_mean"], b["kl_mean_stderr"]),
                        percent(b["top1_agreement"]),
                    ]
                    for b in buckets
                ],
            )
        )
    return parts


def _tasks(data: Json) -> list[str]:
    tasks = data.get("tasks") or []
    if not tasks:
        return []
    rows = [
        [
            t["task"],
            f"{t['items']:,}",
            percent(t["accuracy"], t["accuracy_stderr"]),
            percent(t["accuracy_normalised"], t["accuracy_normalised_stderr"]),
            percent(t["chance"]),
            value(t["answer_bits_per_byte"]),
            percent(t.get("base_accuracy")),
            percent(t.get("difference"), t.get("difference_stderr")),
            percent(t.get("flips")),
        ]
        for t in tasks
    ]
    headers = ["task", "items", "accuracy", "by length", "chance", "bits per byte", "base", "difference", "flips"]
    caption = "Without examples, first items by number; standard errors over items"
    return [f"<h2>Tasks{_against(data)}</h2>", table(caption, headers, rows)]


def _writing(data: Json) -> list[str]:
    found = data.get("similarity")
    if not found:
        return []
    rows = [
        ["tokens both begin with", plus_minus(found["same_prefix"], found["same_prefix_stderr"])],
        ["answers that are equal", percent(found["identical"])],
        ["edit similarity of tokens", plus_minus(found["edit"], found["edit_stderr"])],
        ["chrF of the text", plus_minus(found["chrf"], found["chrf_stderr"])],
    ]
    answers = "".join(
        f"<h3>{escape(prompt)}</h3><p class=faint>base</p><blockquote>{escape(base)}</blockquote>"
        f"<p class=faint>this model</p><blockquote>{escape(ours)}</blockquote>"
        for prompt, base, ours in found["answers"]
    )
    return [
        f"<h2>Answers{_against(data)}</h2>",
        table(f"{found['prompts']} prompts, at most {found['max_tokens']} tokens, greedy", ["", "mean"], rows),
        f"<details><summary>All answers</summary>{answers}</details>",
    ]


def _frontier(data: Json) -> list[str]:
    rows = data["rows"]
    points = [
        Point(r["name"], r["bytes"] / 1e6, r["kl_mean"], r.get("kl_mean_stderr"), r.get("decode_tps")) for r in rows
    ]
    chart = charts.scatter("Quality by size", "MB", "KL (nats per token)", "tokens/s", points)
    noise = data.get("noise_floor")
    caption = "Lower left is better; the line joins what no other beats in both. A larger circle decodes faster."
    if noise:
        caption += f" The base, on the lower edge, differs from itself in another precision by {number(noise)}."
    rows_shown = table(
        f"{data.get('text', '')}. {data.get('protocol', '')}",
        ["", "bytes", "bits/weight", "KL", "KL 99 %", "same token", "perplexity", "decode (tokens/s)"],
        [
            [
                r["name"],
                f"{r['bytes']:,}",
                f"{r['bits_per_weight']:.3f}",
                plus_minus(r["kl_mean"], r.get("kl_mean_stderr")),
                value(r["kl_p99"]),
                percent(r["top1_agreement"]),
                value(r["perplexity"]),
                value(r.get("decode_tps")),
            ]
            for r in rows
        ],
    )
    return [f"<h2>Frontier of {escape(str(data.get('model', '')))}</h2>", figure(chart, caption), rows_shown]


def _provenance(ledger: Json) -> list[str]:
    parts = ["<h2>Where it comes from</h2>"]
    predicted, measured = ledger.get("predicted"), ledger.get("measured")
    if isinstance(predicted, Mapping) or isinstance(measured, Mapping):
        before, after = dict(flat(predicted or {})), dict(flat(measured or {}))
        rows = [[name, before.get(name, "-"), after.get(name, "-")] for name in dict.fromkeys([*before, *after])]
        parts.append(table("Said before the run, and what it was", ["", "predicted", "measured"], rows))
    left = {k: v for k, v in ledger.items() if k not in ("formats", "sites", "predicted", "measured")}
    rows = [[name, said] for name, said in flat(left)]
    more = f" ({len(rows) - _MANY} more entries are left out)" if len(rows) > _MANY else ""
    parts.append(table(f"Ledger{more}", ["entry", "value"], rows[:_MANY], text=True))
    return parts


def _against(data: Json) -> str:
    return f", against {escape(str(data['against']))}" if data.get("against") else ""


def _layer(name: str) -> int | None:
    _, found, rest = name.partition(".layers.")
    index = rest.partition(".")[0]
    return int(index) if found and index.isdigit() else None


def _decibels(site: SiteError) -> str:
    if site.exact:
        return "exact"
    return "-" if site.sqnr_db is None else f"{site.sqnr_db:.1f}"


def _output_decibels(site: SiteError) -> float | None:
    return -10 * math.log10(site.output_relative) if site.output_relative else None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"
