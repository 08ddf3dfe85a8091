"""Errors of sites, against whole matrices, and what a ledger says of them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from gossamer.compress.job import compress
from gossamer.compress.recipe import of_format
from gossamer.engine.llm import LLM
from gossamer.errors import UsageError
from gossamer.evaluate.sites import by_role, ledger_errors, stored_errors
from gossamer.models.checkpoint import open_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))

import tiny_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    keep = [("embed", "int8/g32"), ("down", "f32")]
    compress(open_checkpoint(tiny), tmp_path / "out", of_format("int4/g32"), keep=keep)
    return tmp_path / "out"


def test_errors_of_weights(tiny, folder):
    base, candidate = open_checkpoint(tiny), open_checkpoint(folder)
    seen = []
    rows = stored_errors(base, candidate, lambda *p: seen.append(p))
    assert [r.name for r in rows] == [s.name for s in base.topology.sites]
    assert seen[-1] == (15, 15)
    for row, site in zip(rows, base.topology.sites):
        w, q = base.source(site).read(0, site.rows), candidate.source(site).read(0, site.rows)
        if site.role == "down":
            assert row.exact
            assert row.sqnr_db is None
        elif not row.exact:
            assert row.sqnr_db == pytest.approx(10 * math.log10((w**2).sum() / ((w - q) ** 2).sum()), rel=1e-4)
            assert row.sqnr_db > 15
        assert row.format == str(candidate.native(site))
        assert row.nbytes == candidate.pack(site).nbytes
        assert row.bits_per_weight == 8 * row.nbytes / (site.rows * site.cols)
    roles = {r.role: r for r in by_role(rows)}
    assert set(roles) == {s.role for s in base.topology.sites}
    q = [r for r in rows if r.role == "q"]
    assert roles["q"].nbytes == sum(r.nbytes for r in q)
    assert roles["q"].sqnr_db == pytest.approx(np.mean([r.sqnr_db for r in q]))
    assert roles["q"].bits_per_weight == pytest.approx(q[0].bits_per_weight)
    assert (roles["q"].name, roles["q"].format, roles["down"].exact) == ("2 sites", "int4/g32", True)


def test_a_model_in_memory_has_the_errors_of_its_folder(tiny, folder):
    base = open_checkpoint(tiny)
    loaded = LLM(tiny, format="int4/g32", keep=[("embed", "int8/g32"), ("down", "f32")]).loaded
    assert stored_errors(base, loaded) == stored_errors(base, open_checkpoint(folder))


def test_another_model_as_base(tiny, smollm2_gguf):
    with pytest.raises(UsageError, match=r"has no site 'model\.embed_tokens' of .* choose the model that was"):
        stored_errors(open_checkpoint(smollm2_gguf), open_checkpoint(tiny))


def test_what_a_ledger_says(tiny, folder):
    def without_outputs(rows):
        return [(r.name, r.format, r.nbytes, r.exact, r.sqnr_db and round(r.sqnr_db, 3)) for r in rows]

    measured = stored_errors(open_checkpoint(tiny), open_checkpoint(folder))
    assert without_outputs(ledger_errors(open_checkpoint(folder))) == without_outputs(measured)
    path = folder / "gossamer.json"
    ledger = json.loads(path.read_text())
    name = "model.layers.1.mlp.up_proj"
    ledger["sites"] = {
        name: {"sqnr_db": 21.5, "output_relative": 0.003, "output_mse": 2},
        "model.layers.0.mlp.up_proj": {"sqnr_db": "much", "output_mse": True},
        "model.layers.0.mlp.gate_proj": 7,
        "model.layers.0.mlp.down_proj": {"sqnr_db": None, "output_mse": 0.0},
    }
    path.write_text(json.dumps(ledger))
    rows = {r.name: r for r in ledger_errors(open_checkpoint(folder))}
    assert (rows[name].sqnr_db, rows[name].output_relative, rows[name].output_mse) == (21.5, 0.003, 2.0)
    assert rows["model.layers.0.mlp.up_proj"].sqnr_db is rows["model.layers.0.mlp.gate_proj"].output_mse is None
    assert rows["model.layers.0.mlp.up_proj"].output_mse is None
    assert rows["model.layers.0.mlp.down_proj"].exact
    assert sum(r.exact for r in rows.values()) == 1
    assert len(rows) == 15
    del ledger["sites"]
    path.write_text(json.dumps(ledger))
    assert ledger_errors(open_checkpoint(folder)) == []
