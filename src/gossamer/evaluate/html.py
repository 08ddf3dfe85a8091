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
from gossamer.evaluate.sites import SiteError, by_role

__all__ = ["COMPARE", "EVAL", "page"]

Json = Mapping[str, Any]

EVAL, COMPARE = "eval", "compare"  # what the key "kind" of a file of results says

_LONG = 400  # characters of a value in the ledger
_MANY = 300  # entries of the ledger
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#222;--faint:#666;--rule:#ddd;--soft:#f5f5f3;--link:#0060a0}
@media (prefers-color-scheme:dark){:root{--paper:#16181c;--ink:#e6e6e6;--faint:#a5a5a5;--rule:#3a3a3a;--soft:#1f2228;
--link:#8fc7ff}}
body{margin:0 auto;max-width:52rem;padding:1.5rem 1rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin:.2em 0}h2{font-size:1.15rem;margin:2.2em 0 .4em;border-top:1px solid var(--rule);
padding-top:1em}p,figcaption{max-width:44rem}.faint,figcaption,caption{color:var(--faint)}
figure{margin:1em 0}figcaption{font-size:.85rem}svg{width:100%;height:auto;display:block}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.3em 0}th,td{padding:.25em .8em .25em 0;border-bottom:1px solid var(--rule);
text-align:right;vertical-align:top}th:first-child,td:first-child,.text td,.text th{text-align:left}
.text td{overflow-wrap:anywhere}thead th{border-bottom:2px solid var(--rule)}tbody th{font-weight:normal}
details{margin:.6em 0}summary{cursor:pointer;color:var(--link)}blockquote{margin:.3em 0;padding:.4em .8em;
background:var(--soft);white-space:pre-wrap}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin:1em 0}.tiles div{background:var(--soft);padding:.6em 1em;
border-radius:6px}.tiles b{display:block;font-size:1.25rem}.tiles span{font-size:.8rem;color:var(--faint)}
"""


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
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{charts.STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
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
        facts.append((_size(cost["data_bytes"]), "tensors, norms and biases"))
        facts.append((f"{cost['bits_per_weight']:.3f}", "bits per weight"))
        if source.get("bytes"):
            facts.append((f"{source['bytes'] / cost['data_bytes']:.2f} x", f"smaller than {source.get('file', '')}"))
    for data in evals:
        if data.get("kl_mean") is not None:
            facts.append((_plus_minus(data["kl_mean"], data.get("kl_mean_stderr")), "KL, nats per token"))
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
            (r.role, r.nbytes, f"{_size(r.nbytes)}, {r.bits_per_weight:.2f} bits, {100 * r.nbytes / total:.0f} %")
            for r in roles
        ],
    )
    return [
        "<h2>Where the bytes are</h2>",
        _figure(chart, "Packed arrays of the matrices of each role, scales and padding counted."),
        _table(
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
        value = _output_decibels(site) if measured else site.sqnr_db
        if layer is not None and value is not None:
            series.setdefault(site.role, []).append((layer, value))
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
    table = _table("Every site", ["site", "format", "bytes", "bits/weight", "SQNR (dB)", "output error"], rows)
    return [
        "<h2>Error by layer</h2>",
        _figure(charts.lines("Error by layer", "layer", what, series), caption),
        f"<details><summary>All {len(rows)} sites</summary>{table}</details>",
    ]


def _quality(data: Json) -> list[str]:
    if data.get("perplexity") is None:
        return []
    noise = data.get("noise_floor") or {}
    rows = [
        ["perplexity", _plus_minus(data["perplexity"], data.get("perplexity_stderr"))],
        ["perplexity of the base", _value(data.get("base_perplexity"))],
        [
            "increase of the cost of a token (nats)",
            _plus_minus(data.get("nll_increase"), data.get("nll_increase_stderr")),
        ],
        ["bits per byte", _value(data.get("bits_per_byte"))],
        ["KL(base || this), mean (nats per token)", _plus_minus(data.get("kl_mean"), data.get("kl_mean_stderr"))],
        ["KL, 99th percentile", _value(data.get("kl_p99"))],
        ["KL, first and second half of the text", " and ".join(map(_value, data.get("kl_halves") or ())) or "-"],
        ["noise floor: KL of the base from itself in another precision", _value(noise.get("kl_mean"))],
        ["same most likely token", _percent(data.get("top1_agreement"))],
    ]
    parts = [
        f"<h2>Quality{_against(data)}</h2>",
        f"<p>{escape(str(data.get('text', '')))}. {escape(str(data.get('protocol', '')))}</p>",
        _table(f"{data.get('tokens', 0):,} tokens scored", ["", "figure"], [r for r in rows if r[1] != "-"]),
    ]
    buckets = data.get("kl_by_confidence") or []
    if buckets:
        told = [
            (f"{b['low']:g} to {b['high']:g}", b["kl_mean"] or 0.0, f"{_value(b['kl_mean'])} ({b['tokens']:,} tokens)")
            for b in buckets
        ]
        parts.append(
            _figure(
                charts.bars("KL by how sure the base is", told),
                "Mean KL of the tokens at which the base gave its likeliest token a probability in this range.",
            )
        )
        parts.append(
            _table(
                "By the base's highest probability",
                ["probability", "tokens", "KL", "same most likely token"],
                [
                    [
                        f"{b['low']:g} to {b['high']:g}",
                        f"{b['tokens']:,}",
                        _plus_minus(b["kl_mean"], b["kl_mean_stderr"]),
                        _percent(b["top1_agreement"]),
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
            _percent(t["accuracy"], t["accuracy_stderr"]),
            _percent(t["accuracy_normalised"], t["accuracy_normalised_stderr"]),
            _percent(t["chance"]),
            _value(t["answer_bits_per_byte"]),
            _percent(t.get("base_accuracy")),
            _percent(t.get("difference"), t.get("difference_stderr")),
            _percent(t.get("flips")),
        ]
        for t in tasks
    ]
    headers = ["task", "items", "accuracy", "by length", "chance", "bits per byte", "base", "difference", "flips"]
    shown = [i for i in range(len(headers)) if any(row[i] != "-" for row in rows)]
    return [
        f"<h2>Tasks{_against(data)}</h2>",
        _table(
            "Without examples, first items by number; standard errors over items",
            [headers[i] for i in shown],
            [[row[i] for i in shown] for row in rows],
        ),
    ]


def _writing(data: Json) -> list[str]:
    found = data.get("similarity")
    if not found:
        return []
    rows = [
        ["tokens both begin with", _plus_minus(found["same_prefix"], found["same_prefix_stderr"])],
        ["answers that are equal", _percent(found["identical"])],
        ["edit similarity of tokens", _plus_minus(found["edit"], found["edit_stderr"])],
        ["chrF of the text", _plus_minus(found["chrf"], found["chrf_stderr"])],
    ]
    answers = "".join(
        f"<h3>{escape(prompt)}</h3><p class=faint>base</p><blockquote>{escape(base)}</blockquote>"
        f"<p class=faint>this model</p><blockquote>{escape(ours)}</blockquote>"
        for prompt, base, ours in found["answers"]
    )
    return [
        f"<h2>Answers{_against(data)}</h2>",
        _table(f"{found['prompts']} prompts, at most {found['max_tokens']} tokens, greedy", ["", "mean"], rows),
        f"<details><summary>All answers</summary>{answers}</details>",
    ]


def _frontier(data: Json) -> list[str]:
    rows = data["rows"]
    points = [
        Point(r["name"], r["bytes"] / 1e6, r["kl_mean"], r.get("kl_mean_stderr"), r.get("decode_tps")) for r in rows
    ]
    chart = charts.scatter("Quality by size", "MB", "KL (nats per token)", "tokens/s", points)
    noise = data.get("noise_floor")
    caption = "Lower left is better; the line joins what no other beats in both. A larger circle decodes faster. " + (
        f"The base differs from itself in another precision by {number(noise)}." if noise else ""
    )
    table = _table(
        f"{data.get('text', '')}. {data.get('protocol', '')}",
        ["", "bytes", "bits/weight", "KL", "KL 99 %", "same token", "perplexity", "decode (tokens/s)"],
        [
            [
                r["name"],
                f"{r['bytes']:,}",
                f"{r['bits_per_weight']:.3f}",
                _plus_minus(r["kl_mean"], r.get("kl_mean_stderr")),
                _value(r["kl_p99"]),
                _percent(r["top1_agreement"]),
                _value(r["perplexity"]),
                _value(r.get("decode_tps")),
            ]
            for r in rows
        ],
    )
    return [f"<h2>Frontier of {escape(str(data.get('model', '')))}</h2>", _figure(chart, caption), table]


def _provenance(ledger: Json) -> list[str]:
    parts = ["<h2>Where it comes from</h2>"]
    predicted, measured = ledger.get("predicted"), ledger.get("measured")
    if isinstance(predicted, Mapping) or isinstance(measured, Mapping):
        before, after = dict(_flat(predicted or {})), dict(_flat(measured or {}))
        rows = [[name, before.get(name, "-"), after.get(name, "-")] for name in dict.fromkeys([*before, *after])]
        parts.append(_table("Said before the run, and what it was", ["", "predicted", "measured"], rows))
    left = {k: v for k, v in ledger.items() if k not in ("formats", "sites", "predicted", "measured")}
    rows = [[name, value] for name, value in _flat(left)]
    more = f" ({len(rows) - _MANY} more entries are left out)" if len(rows) > _MANY else ""
    parts.append(_table(f"Ledger{more}", ["entry", "value"], rows[:_MANY], text=True))
    return parts


# ---------------------------------------------------------------- pieces


def _table(caption: str, headers: Sequence[str], rows: Sequence[Sequence[str]], text: bool = False) -> str:
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in headers)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(c)}</td>" for c in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table{" class=text" if text else ""}><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _figure(chart: str, caption: str) -> str:
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>" if chart else ""


def _flat(data: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Entries of a nested object as (path, text)."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(data, list) and any(isinstance(v, Mapping | list) for v in data):
        for i, value in enumerate(data):
            yield from _flat(value, f"{prefix}[{i}]")
    else:
        text = ", ".join(map(str, data)) if isinstance(data, list) else _plain(data)
        yield prefix, text if len(text) <= _LONG else f"{text[:_LONG]} ..."


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)


def _against(data: Json) -> str:
    return f", against {escape(str(data['against']))}" if data.get("against") else ""


def _layer(name: str) -> int | None:
    _, found, rest = name.partition(".layers.")
    index = rest.partition(".")[0]
    return int(index) if found and index.isdigit() else None


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"


def _decibels(site: SiteError) -> str:
    if site.exact:
        return "exact"
    return "-" if site.sqnr_db is None else f"{site.sqnr_db:.1f}"


def _output_decibels(site: SiteError) -> float | None:
    return -10 * math.log10(site.output_relative) if site.output_relative else None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _value(value: float | None) -> str:
    return "-" if value is None else number(value)


def _plus_minus(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return number(value) if error is None else f"{number(value)} \u00b1 {number(error)}"


def _percent(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} \u00b1 {100 * error:.1f} %"
