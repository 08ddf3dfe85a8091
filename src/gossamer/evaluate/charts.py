"""Charts as SVG text, drawn by hand: they stand inside a page or alone, and follow a light or dark scheme.

Series differ in colour, dash and marker, so that none is told by colour alone. Every chart has a title and a
description for those who do not see it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["STYLE", "Point", "bars", "frontier", "lines", "number", "scatter", "standalone"]

WIDTH = 760
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 132, 14, 44
_SERIES = 8  # colours; more series begin again with another dash

# Colours that people with any kind of colour vision tell apart (Okabe and Ito, 2008), lighter in the dark.
STYLE = """
.chart{--bg:#fff;--ink:#222;--faint:#8a8a8a;--grid:#ddd;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#a6568b;--c4:#7a6a00;
--c5:#2b9ccf;--c6:#555;--c7:#b8860b;font:12px system-ui,sans-serif}
@media (prefers-color-scheme:dark){.chart{--bg:#16181c;--ink:#e6e6e6;--faint:#9a9a9a;--grid:#3a3a3a;--c0:#56b4e9;
--c1:#ff9a4d;--c2:#3fd1a4;--c3:#dd8fc4;--c4:#e6d94a;--c5:#8fd3f4;--c6:#bbb;--c7:#f0c75e}}
.chart text{fill:var(--ink)}.chart .faint{fill:var(--faint)}
.chart .grid{stroke:var(--grid);stroke-width:1}.chart .axis{stroke:var(--faint);stroke-width:1}
.chart .line{fill:none;stroke-width:2}.chart .front{fill:none;stroke:var(--faint);stroke-width:1.5;stroke-dasharray:5 4}
.chart .over{paint-order:stroke;stroke:var(--bg);stroke-width:4px;stroke-linejoin:round}
.chart .whisker{stroke:var(--faint);stroke-width:1.5}
""" + "".join(f".chart .f{i}{{fill:var(--c{i})}}.chart .s{i}{{stroke:var(--c{i})}}" for i in range(_SERIES))


def number(value: float) -> str:
    """A figure for people: about three digits, thousands parted."""
    size = abs(value)
    if value == 0 or 1e-4 <= size < 1e4:
        digits = 0 if size >= 1000 else max(0, 2 - math.floor(math.log10(size))) if value else 0
        text = f"{value:,.{min(digits, 6)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:,.0f}" if 1e4 <= size < 1e7 else f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")


def bars(title: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars of (label, value >= 0, what stands beside it)."""
    top = max((v for _, v, _ in rows), default=0) or 1
    left = 12 + 7 * max((len(label) for label, _, _ in rows), default=0)
    room = WIDTH - left - 190
    parts = []
    for i, (label, value, beside) in enumerate(rows):
        y = 26 * i
        width = room * value / top
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect class="f0" x="{left}" y="{y + 4}" width="{width:.1f}" height="18" rx="2"/>')
        parts.append(f'<text x="{left + width + 8:.1f}" y="{y + 17}">{escape(beside)}</text>')
    described = "; ".join(f"{label}: {beside}" for label, _, beside in rows)
    return _svg(title, described, 26 * len(rows), parts)


def lines(title: str, x_name: str, y_name: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A line with markers for each series of (x, y); a series' name stands at its end."""
    series = {name: sorted(points) for name, points in series.items() if points}
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    if not xs:
        return ""
    height = 300
    x_axis = _Axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis(min(ys), max(ys), height - _BOTTOM, _TOP)
    parts = _frame(x_axis, y_axis, x_name, y_name, height, whole=True)
    for i, points in enumerate(series.values()):
        at = [(x_axis(x), y_axis(y)) for x, y in points]
        dash = ("", "7 3", "2 2", "9 3 2 3")[(i + i // _SERIES) % 4]
        style = f' stroke-dasharray="{dash}"' if dash else ""
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        parts.append(f'<path class="line s{i % _SERIES}" d="{path}"{style}/>')
        parts += [_marker(i, x, y) for x, y in at]
    ends = [(y_axis(points[-1][1]), i, name) for i, (name, points) in enumerate(series.items())]
    for y, i, name in _apart(ends, 14):
        parts.append(_marker(i, WIDTH - _RIGHT + 16, y))
        parts.append(f'<text x="{WIDTH - _RIGHT + 26}" y="{y + 4:.1f}">{escape(name)}</text>')
    described = "; ".join(
        f"{name}: from {number(min(y for _, y in points))} to {number(max(y for _, y in points))}"
        for name, points in series.items()
    )
    return _svg(title, f"{y_name} by {x_name}. {described}", height, parts)


@dataclass(frozen=True)
class Point:
    """A thing to compare: ``x`` and ``y`` are better when smaller; ``spread`` is the standard error of y; ``more`` a
    third figure, better when larger, shown by the area of the circle."""

    label: str
    x: float
    y: float
    spread: float | None = None
    more: float | None = None


def scatter(title: str, x_name: str, y_name: str, more_name: str, points: Sequence[Point]) -> str:
    """Labelled circles, y on a logarithmic axis, and the line of those that no other beats in both x and y.

    A point whose y is not above zero lies on the axis.
    """
    if not points:
        return ""
    height = 420
    above = [p.y for p in points if p.y > 0]
    floor = min(above) / 2 if above else 0.1
    x_axis = _Axis(min(p.x for p in points), max(p.x for p in points), _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis(floor, max(above, default=1.0), height - _BOTTOM, _TOP, log=True)
    parts = _frame(x_axis, y_axis, x_name, y_name, height)
    best = frontier(points)
    if len(best) > 1:
        steps = [(x_axis(p.x), y_axis(max(p.y, floor))) for p in best]
        path = f"M{steps[0][0]:.1f} {steps[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in steps[1:])
        parts.append(f'<path class="front" d="{path}"/>')
    most = max((p.more for p in points if p.more), default=None)
    labels = []
    for p in points:
        x, y = x_axis(p.x), y_axis(max(p.y, floor))
        radius = 4 + 8 * math.sqrt(p.more / most) if p.more and most else 5.0
        if p.spread and p.y > 0:
            low, high = y_axis(max(p.y - p.spread, floor)), y_axis(p.y + p.spread)
            parts.append(f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        told = f"{p.label}: {number(p.x)} {x_name}, {number(p.y)} {y_name}"
        told += f", {number(p.more)} {more_name}" if p.more else ""
        color = 0 if p in best else 6
        parts.append(
            f'<circle class="f{color} s{color}" fill-opacity=".55" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
            f"<title>{escape(told)}</title></circle>"
        )
        labels.append((y - 5, x + radius + 3, p.label))  # above the line that leaves the point
    for y, x, label in _beside(labels):
        anchor = ' text-anchor="end"' if x > WIDTH - 7 * len(label) else ""
        at = x - 28 if anchor else x
        parts.append(f'<text class="over" x="{at:.1f}" y="{y:.1f}"{anchor}>{escape(label)}</text>')
    described = "; ".join(f"{p.label}: {number(p.x)}, {number(p.y)}" for p in points)
    return _svg(title, f"{y_name} by {x_name}. {described}", height, parts)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both x and y, from the smallest x on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not best or point.y < best[-1].y:
            best.append(point)
    return best


def standalone(svg: str) -> str:
    """A chart as a file of its own."""
    head = '<svg xmlns="http://www.w3.org/2000/svg"'
    return svg.replace("<svg", head, 1).replace(
        "</title>", f"</title><style>{STYLE}@media (prefers-color-scheme:dark){{svg{{background:#16181c}}}}</style>", 1
    )


# ---------------------------------------------------------------- parts


class _Axis:
    """From values to pixels, widened to round ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self.log, self.start, self.end = log, start, end
        if log:
            low, high = math.log10(low), math.log10(max(high, low * 1.01))
            pad = 0.06 * (high - low)
            self.low, self.high = low - pad, high + pad
            powers = [10.0**e for e in range(math.floor(low) - 1, math.ceil(high) + 1)]
            for steps in ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)):
                ticks = sorted({m * p for p in powers for m in steps})
                self.ticks = [t for t in ticks if self.low <= math.log10(t) <= self.high]
                if len(self.ticks) >= 3:
                    break
            return
        if high == low:
            low, high = low - abs(low or 1) / 10, high + abs(high or 1) / 10
        step = _round_step((high - low) / 5)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        self.ticks = [i * step for i in range(first, last + 1)]
        self.low, self.high = self.ticks[0], self.ticks[-1]

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _frame(x_axis: _Axis, y_axis: _Axis, x_name: str, y_name: str, height: float, whole: bool = False) -> list[str]:
    bottom, right = height - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for tick in y_axis.ticks:
        y = y_axis(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="faint" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_axis.ticks:
        if whole and tick != int(tick):
            continue
        text = (
            f'<text class="faint" x="{x_axis(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>'
        )
        parts.append(text)
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{height - 8}" text-anchor="middle">{escape(x_name)}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>')
    return parts


def _marker(i: int, x: float, y: float) -> str:
    shape = i % 4
    color = f"f{i % _SERIES}"
    if shape == 0:
        return f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    path = ("", "M-3 -3h6v6h-6z", "M0 -4l4 7h-8z", "M0 -4l4 4-4 4-4-4z")[shape]
    return f'<path class="{color}" d="{path}" transform="translate({x:.1f} {y:.1f})"/>'


def _apart(ends: Sequence[tuple[float, int, str]], gap: float) -> list[tuple[float, int, str]]:
    """Heights of labels, at least ``gap`` from each other, as near to where they belong as a sweep down gives."""
    placed: list[tuple[float, int, str]] = []
    for y, i, name in sorted(ends):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, i, name))
    return placed


def _beside(labels: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Labels moved down where one would cover another."""
    placed: list[tuple[float, float, str]] = []
    for y, x, label in sorted(labels):
        for py, px, other in placed:
            if abs(y - py) < 13 and x < px + 7 * len(other) and px < x + 7 * len(label):
                y = py + 13
        placed.append((y, x, label))
    return placed


def _svg(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    key = f"{zlib.crc32((title + description).encode()):x}"
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="t{key} d{key}">'
        f'<title id="t{key}">{escape(title)}</title><desc id="d{key}">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )
