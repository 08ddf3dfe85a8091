"""Pieces of an HTML page: tables, figures, and how a value is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from gossamer.evaluate.charts import number

__all__ = ["STYLE", "figure", "flat", "percent", "plus_minus", "size", "table", "value"]

_LONG = 400  # characters of a value

STYLE = """
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


def table(caption: str, headers: Sequence[str], rows: Sequence[Sequence[str]], text: bool = False) -> str:
    """Columns in which nothing is known are left out."""
    shown = [i for i in range(len(headers)) if i == 0 or any(row[i] != "-" for row in rows)]
    headers, rows = [headers[i] for i in shown], [[row[i] for i in shown] for row in rows]
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in headers)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(c)}</td>" for c in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table{" class=text" if text else ""}><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(chart: str, caption: str) -> str:
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>" if chart else ""


def flat(data: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Entries of a nested object as (path, text)."""
    if isinstance(data, Mapping):
        for key, inner in data.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(data, list) and any(isinstance(v, Mapping | list) for v in data):
        for i, inner in enumerate(data):
            yield from flat(inner, f"{prefix}[{i}]")
    else:
        text = ", ".join(map(str, data)) if isinstance(data, list) else _plain(data)
        yield prefix, text if len(text) <= _LONG else f"{text[:_LONG]} ..."


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)


def size(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"


def value(value: float | None) -> str:
    return "-" if value is None else number(value)


def plus_minus(value: float | None, error: float | None) -> str:
    """Both with the digits that the error leaves: two of its own."""
    if value is None:
        return "-"
    if error is None or not error > 0:
        return number(value)
    digits = min(max(1 - math.floor(math.log10(error)), 0), 7)
    return f"{value:,.{digits}f} \u00b1 {error:,.{digits}f}"


def percent(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} \u00b1 {100 * error:.1f} %"
