"""The page: well formed, self-contained, with what it was given and nothing that runs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from gossamer.errors import UsageError
from gossamer.evaluate.html import page
from gossamer.evaluate.sites import SiteError

HOSTILE = '<img src=x onerror="alert(1)">&'
VOID = {"meta", "br"}

LEDGER = {
    "layout": 1,
    "version": "0.1.0",
    "recipe": {"name": HOSTILE, "format": "int4/g32", "steps": [{"a": 1}, {"b": [1, 2]}]},
    "formats": {"model.embed_tokens": "int8/g32"},
    "cost": {"data_bytes": 75_800_000, "bits_per_weight": 4.507},
    "source": {"file": HOSTILE, "bytes": 98_362_432},
    "predicted": {"seconds": 100, "steps": {"fit": 60}},
    "measured": {"seconds": 120.5, "peak_bytes": None},
    "long": "x" * 1000,
}
SITES = [
    SiteError("model.embed_tokens", "embed", "int8/g32", 30_000_000, 8.5, None, True),
    SiteError("model.layers.0.mlp.up_proj", "up", HOSTILE, 500_000, 4.5, 21.25, False, 1e-4, 0.01),
    SiteError("model.layers.1.mlp.up_proj", "up", "int4/g32", 500_000, 4.5, 19.75, False, 2e-4, 0.001),
]
EVAL = {
    "kind": "eval",
    "model": HOSTILE,
    "against": HOSTILE,
    "text": HOSTILE,
    "protocol": "2 windows.",
    "tokens": 512,
    "perplexity": 37.636,
    "perplexity_stderr": 1.25,
    "bits_per_byte": 1.31,
    "base_perplexity": 28.57,
    "nll_increase": 0.2757,
    "nll_increase_stderr": 0.0006,
    "kl_mean": 0.35969,
    "kl_mean_stderr": 0.01427,
    "kl_p99": 1.81,
    "kl_halves": [0.345, 0.374],
    "top1_agreement": 0.703,
    "noise_floor": {"kl_mean": 9.3e-5},
    "kl_by_confidence": [
        {"low": 0.0, "high": 0.5, "tokens": 312, "kl_mean": 0.4, "kl_mean_stderr": 0.02, "top1_agreement": 0.6},
        {"low": 0.5, "high": 1.0, "tokens": 0, "kl_mean": None, "kl_mean_stderr": None, "top1_agreement": None},
    ],
    "tasks": [
        {
            "task": "piqa",
            "items": 200,
            "accuracy": 0.65,
            "accuracy_stderr": 0.034,
            "accuracy_normalised": 0.66,
            "accuracy_normalised_stderr": 0.033,
            "chance": 0.5,
            "answer_bits_per_byte": 1.29,
            "base_accuracy": 0.67,
            "difference": -0.02,
            "difference_stderr": 0.015,
            "flips": 0.06,
        }
    ],
    "similarity": {
        "prompts": 1,
        "max_tokens": 64,
        "same_prefix": 3.0,
        "same_prefix_stderr": None,
        "identical": 0.0,
        "edit": 0.5,
        "edit_stderr": None,
        "chrf": 0.6,
        "chrf_stderr": None,
        "answers": [["Why?", "Because.", HOSTILE]],
    },
}
ROW = {"bits_per_weight": 5.0, "kl_p99": 1.0, "top1_agreement": 0.7, "perplexity": 30.0}
COMPARED = {
    "kind": "compare",
    "model": HOSTILE,
    "text": "BoolQ",
    "protocol": "2 windows.",
    "noise_floor": 9.3e-5,
    "rows": [
        {"name": "base", "bytes": 96_000_000, "kl_mean": 0.0, "kl_mean_stderr": None, "decode_tps": 120.0} | ROW,
        {"name": HOSTILE, "bytes": 90_000_000, "kl_mean": 0.28, "kl_mean_stderr": 0.004, "decode_tps": 160.0} | ROW,
    ],
}
RESULTS = [("eval.json", EVAL), ("compare.json", COMPARED)]


class Checked(HTMLParser):
    """Tags that close in order, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_everything_on_one_page():
    html = page(HOSTILE, ledger=LEDGER, sites=SITES, results=RESULTS)
    seen = Checked(html)
    names = {tag for tag, _ in seen.tags}
    assert {"table", "svg", "figure", "details"} <= names
    assert not {"script", "img", "link", "iframe"} & names
    assert HOSTILE in seen.text
    assert "http" not in html  # nothing is fetched
    assert not re.search(r"url\(|@import", html)
    assert '<html lang="en">' in html
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    ids = [a["id"] for _, a in seen.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    for heading in ("Where the bytes are", "Error by layer", "Quality", "Tasks", "Answers", "Frontier", "comes from"):
        assert heading in seen.text
    for figure in (
        *("0.360 \u00b1 0.014", "28.6", "0.345 and 0.374", "9.3e-5", "70.3 %", "75.8 MB", "1.30 x"),
        *("65.0 \u00b1 3.4 %", "-2.0 \u00b1 1.5 %", "6.0 %", "90,000,000", "0.2800 \u00b1 0.0040", "120.5"),
        "recipe.steps[1].b",
    ):
        assert figure in seen.text, figure
    assert "x" * 400 + " ..." in seen.text
    assert "x" * 401 not in seen.text


def test_columns_in_which_nothing_is_known_are_left_out():
    row = dict.fromkeys(EVAL["tasks"][0]) | {"task": "lambada", "items": 5, "accuracy": 0.2, "chance": 0.0}
    seen = Checked(page("x", results=[("e", {"kind": "eval", "tasks": [row]})])).text
    assert "by length" not in seen
    assert "flips" not in seen
    assert "20.0 %" in seen


def test_errors_by_layer_are_of_outputs_where_they_were_measured():
    assert "signal to noise of the outputs" in page("x", sites=SITES)
    weights = [SiteError(s.name, s.role, s.format, s.nbytes, s.bits_per_weight, s.sqnr_db, s.exact) for s in SITES]
    assert "signal to noise of the weights" in page("x", sites=weights)
    unknown = [SiteError(s.name, s.role, s.format, s.nbytes, s.bits_per_weight, None, False) for s in SITES]
    text = Checked(page("x", sites=unknown)).text
    assert "Error by layer" not in text
    assert "SQNR" not in text  # a column without figures


def test_results_that_are_none():
    with pytest.raises(UsageError, match=r"b\.json holds no results that a report shows"):
        page("x", results=[("a/b.json", {"model": "m"})])
    broken = {"kind": "compare", "rows": [{"name": "a"}]}
    with pytest.raises(UsageError, match=r"lack what a report shows .* write them again"):
        page("x", results=[("a.json", broken)])
    with pytest.raises(UsageError, match="lack what a report shows"):
        page("x", ledger={"cost": {"data_bytes": "many", "bits_per_weight": 4}})
