"""Charts: sound SVG with the right geometry, that says in words what it shows."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from gossamer.evaluate.charts import Point, bars, frontier, lines, number, scatter, standalone


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1"),
        (0.25, "0.25"),
        (0.05612, "0.0561"),
        (0.000123, "0.000123"),
        (0.0000931, "9.3e-5"),
        (12.345, "12.3"),
        (999.6, "1,000"),
        (1234.5, "1,234"),
        (98_362_432, "9.8e7"),
        (123_456, "123,456"),
        (-3.14159, "-3.14"),
        (100, "100"),
    ],
)
def test_numbers_for_people(value, text):
    assert number(value) == text


def _parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


HOSTILE = '<script>alert("&")</script>'


def test_bars_are_as_long_as_their_values():
    root = _parsed(bars("Bytes", [("a", 10.0, "ten"), (HOSTILE, 5.0, HOSTILE), ("c", 0.0, "none")]))
    widths = [float(r.get("width")) for r in root.findall("rect")]
    assert widths[1] == pytest.approx(widths[0] / 2, abs=0.1)
    assert widths[2] == 0
    assert root.find("title").text == "Bytes"
    assert root.find("desc").text == f"a: ten; {HOSTILE}: {HOSTILE}; c: none"
    assert root.get("aria-labelledby").split() == [root.find("title").get("id"), root.find("desc").get("id")]
    assert _parsed(bars("Nothing", [])).findall("rect") == []


def test_lines_end_where_their_names_stand():
    series = {"q": [(1, 20.0), (0, 10.0), (2, 15.0)], "k": [(0, 12.0), (2, 14.9)], HOSTILE: []}
    root = _parsed(lines("Error", "layer", "dB", series))
    paths = [p for p in root.findall("path") if "line" in p.get("class").split()]
    assert len(paths) == 2
    points = [tuple(map(float, pair.split())) for pair in re.split("[ML]", paths[0].get("d")) if pair]
    assert [p[0] for p in points] == sorted(p[0] for p in points)
    heights = [p[1] for p in points]
    assert heights[1] < heights[2] < heights[0]  # the larger, the higher
    assert (heights[0] - heights[2]) == pytest.approx((heights[0] - heights[1]) / 2, abs=0.2)
    names = [float(t.get("y")) for t in root.findall("text") if t.text in series]
    assert abs(names[0] - names[1]) >= 14
    assert "q: from 10 to 20" in root.find("desc").text
    assert paths[0].get("class") != paths[1].get("class")
    assert lines("Error", "layer", "dB", {"q": []}) == ""
    _parsed(lines("Error", "layer", "dB", {"q": [(3, 7.0)]}))  # one point, no range


POINTS = [
    Point("base", 96.6, 0.0),
    Point("int4", 90.0, 0.28, 0.003, 140.0),
    Point(HOSTILE, 85.0, 0.39, None, 35.0),
    Point("worse", 91.0, 0.4),
]


def test_the_frontier():
    assert [p.x for p in frontier(POINTS)] == [85.0, 90.0, 96.6]
    assert frontier([Point("a", 1, 1), Point("b", 1, 1), Point("c", 1, 2)]) == [Point("a", 1, 1)]
    assert frontier([]) == []


def test_scatter():
    root = _parsed(scatter("Quality", "MB", "KL", "tokens/s", POINTS))
    circles = {c.find("title").text.split(":")[0]: c for c in root.findall("circle")}
    assert set(circles) == {p.label for p in POINTS}
    at = {name: (float(c.get("cx")), float(c.get("cy")), float(c.get("r"))) for name, c in circles.items()}
    assert at[HOSTILE][0] < at["int4"][0] < at["worse"][0] < at["base"][0]
    assert at["worse"][1] < at[HOSTILE][1] < at["int4"][1] < at["base"][1]
    assert at["int4"][2] - 4 == pytest.approx(2 * (at[HOSTILE][2] - 4), abs=0.1)  # four times the speed
    assert circles["worse"].get("class") != circles["int4"].get("class") == circles["base"].get("class")
    assert len([p for p in root.findall("path") if p.get("class") == "whisker"]) == 1
    ticks = [float(t.text.replace(",", "")) for t in root.findall("text") if re.fullmatch(r"[\d.,]+", t.text)]
    assert {0.2, 0.3, 0.4} <= set(ticks)
    assert scatter("Quality", "MB", "KL", "tokens/s", []) == ""
    _parsed(scatter("Quality", "MB", "KL", "tokens/s", POINTS[:1]))  # no value above zero


def test_a_chart_alone_is_a_file():
    svg = standalone(scatter("Quality", "MB", "KL", "tokens/s", POINTS))
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme:dark" in root.find("{*}style").text
    assert all(math.isfinite(float(n)) for n in re.findall(r'c[xy]="([^"]*)"', svg))
