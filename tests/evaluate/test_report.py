"""The JSON of a bench, and the picture drawn from it."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from gossamer.errors import ResourceError, UsageError
from gossamer.evaluate import bench, shape_model, speed
from gossamer.evaluate.report import draw, report
from gossamer.evaluate.roofline import Peaks

from .test_speed import TINY

CELL = {"work", "batch", "tokens", "ours", "peer", "ratio", "bound_tps", "bound_by", "share", "dropped", "bytes"}
CELL |= {"bandwidth_gbps", "int8_gops", "bf16_gops", "f32_gops", "macs"}


@pytest.fixture
def data(monkeypatch):
    monkeypatch.setattr(speed, "probe", lambda: Peaks(10, 1000, 500, 250))
    peer = SimpleNamespace(
        prefill=lambda tokens: 0.5,
        decode=lambda batch, steps: 0.5,
        to_json=lambda: {"name": "llama.cpp", "bits_per_weight": 4.5},
    )
    rows = []
    for fmt in ("int4/g32", "int8/row @ int8/token"):
        model = shape_model(TINY, fmt)
        rows.append((fmt, bench(model, name="tiny", prefill=8, decode=2, repetitions=2, peer=peer)))
    return json.loads(json.dumps(report(rows, peer)))


def test_the_schema(data):
    assert data.keys() == {"schema", "model", "threads", "isa", "load_average", "peer", "rows"}
    assert (data["schema"], data["model"]) == (1, "tiny")
    assert data["peer"]["bits_per_weight"] == 4.5
    assert [row["format"] for row in data["rows"]] == ["int4/g32", "int8/row @ int8/token"]
    for row in data["rows"]:
        assert [(c["work"], c["batch"]) for c in row["cells"]] == [("prefill", 1), ("decode", 1)]
        for cell in row["cells"]:
            assert cell.keys() == CELL
            for key in ("ours", "peer", "ratio"):
                assert 0 < cell[key]["low"] <= cell[key]["median"] <= cell[key]["high"]
            assert cell["peer"]["median"] == cell["tokens"] / 0.5
    assert data["rows"][1]["cells"][0]["macs"].keys() == {"int8"}


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture(data, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    draw(data, tmp_path / f"bench.{suffix}")
    assert (tmp_path / f"bench.{suffix}").stat().st_size > 2000
    alone = data | {"peer": None}
    draw(alone, tmp_path / f"alone.{suffix}")
    assert (tmp_path / f"alone.{suffix}").read_bytes() != (tmp_path / f"bench.{suffix}").read_bytes()


def test_pictures_that_cannot_be_drawn(data, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"x\.gif must end in \.svg, \.png or \.pdf"):
        draw(data, tmp_path / "x.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ResourceError, match="pip install matplotlib"):
        draw(data, tmp_path / "x.svg")
