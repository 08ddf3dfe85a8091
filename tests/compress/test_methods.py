"""The recipes of the published methods, and what is told about them."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest
import yaml

from gossamer.compress import methods as told
from gossamer.compress.allocate import by_role, settle
from gossamer.compress.methods import method, methods
from gossamer.errors import UsageError
from gossamer.evaluate.shapes import SHAPES
from gossamer.formats import Coded, Hadamard, Mask, Planes, Rank, Sum, parse, parse_weight
from gossamer.models.topology import describe

FOLDER = files("gossamer.compress") / "recipes"
RECIPES = {f.name[:-5]: yaml.safe_load(f.read_text()) for f in FOLDER.iterdir() if f.name.endswith(".yaml")}
PUBLISHED = (
    *("rtn", "rtn-clip", "hqq", "gptq", "awq", "smoothquant", "quik", "spqr", "squeezellm", "finequant", "dgq"),
    *("qserve", "flexq", "mixllm", "llm-int8", "zeroquant-fp", "zeroquant-fp-lorc", "minifloat", "block-fp"),
    *("fast-2bit", "nf4", "fp8", "w8a8", "w4a16", "apmm", "lut", "marlin", "d2moe", "quest-ptq"),
)


def weight(name):
    return settle(RECIPES[name]["formats"]["*"], next(s for s in describe(SHAPES["llama-3-8b"]).sites if s.layer == 0))


def test_every_published_method_is_there():
    assert set(PUBLISHED) <= set(RECIPES)
    assert {m.name for m in methods()} == set(RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_says_what_it_is(name):
    data = RECIPES[name]
    assert data["name"] == name
    assert all(isinstance(data[key], str) and data[key].strip() for key in ("title", "paper", "mechanism"))
    assert 2015 < data["year"] < 2100
    assert data["claims"]
    assert all(isinstance(c, str) for c in data["claims"])
    assert data["link"].startswith("https://")
    assert set(data["formats"]) >= {"*", "embed", "head"}
    if "arXiv" in data["paper"]:
        assert data["link"].rpartition("/")[2] in data["paper"]
    assert ("calibration" in data) == ("needs" in data)


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_its_formats_hold_every_site_of_every_shape(name, shape):
    sites = describe(SHAPES[shape]).sites
    found = by_role(sites, RECIPES[name]["formats"])
    assert set(found) == {s.name for s in sites}
    for fmt in found.values():
        assert parse(str(fmt)) == fmt
    wide = RECIPES[name].get("allocate", {}).get("wide")
    if wide:
        assert isinstance(parse_weight(wide), Coded)


def test_formats_are_those_of_the_papers():
    assert isinstance(weight("hqq").weight.minimum, str)  # a real zero point
    spqr, mask = weight("spqr").weight.terms
    assert isinstance(mask, Mask)
    assert (spqr.number.name, spqr.scale.number.name, spqr.minimum.number.name) == ("uint3", "uint3", "uint3")
    assert str(weight("quik")) == "cols(256: bf16 @ bf16, int4/row @ uint4/token)"
    assert weight("llm-int8").input.outlier == 6
    assert weight("dgq").weight.scale.number.name == "int8"
    assert str(weight("qserve")) == "uint4/g128*(int8/row) @ int8/token"
    inner = parse(RECIPES["qserve"]["formats"]["gate"]).weight
    assert isinstance(inner, Hadamard)
    assert inner.inner == weight("qserve").weight
    assert [t.number.name for t in weight("d2moe").weight.terms] == ["uint2", "bipolar1", "bipolar1"]
    assert isinstance(weight("apmm").weight, Planes)
    assert isinstance(weight("quest-ptq").weight, Hadamard)
    lorc = weight("zeroquant-fp-lorc").weight
    assert isinstance(lorc, Sum)
    assert isinstance(lorc.terms[1], Rank)


def test_scales_of_zeroquant_fp_are_powers_of_two_apart():
    import numpy as np

    from gossamer.formats import ArraySource, encode

    w = np.random.default_rng(0).standard_normal((32, 1024)).astype(np.float32)
    w[:, 256:512] *= 0.3
    w[:, 512:768] *= 0.02
    fmt = weight("zeroquant-fp").weight
    packed = encode(fmt, ArraySource(w))
    rows = {"scales." + k: packed.arrays["scales." + k] for k in fmt.scale.fields(32, 4)}
    scales = fmt.scale.decode_rows({k[7:]: v for k, v in rows.items()}, 32, 4, 0, 32)
    ratios = np.log2(scales.max(axis=1, keepdims=True) / scales)
    assert (ratios == np.round(ratios)).all()
    assert ratios.max() >= 4


def test_cost_counts_the_bytes():
    assert method("gptq").bits == pytest.approx(4.125, abs=1e-3)
    assert method("llm-int8").bits == pytest.approx(8.006, abs=1e-3)
    assert 4.5 < method("mixllm").bits < 4.6  # 10 percent of the rows in 8 bits
    assert 2.8 < method("fast-2bit").bits < 3.4
    assert method("finequant").at_most
    assert not method("mixllm").at_most


def test_steps_are_told_in_order():
    assert method("minifloat").steps == ("smooth", "obs", "bias")
    assert method("zeroquant-fp-lorc").steps == ("obs", "lowrank")
    assert method("mixllm").steps == ("salience", "obs")
    assert method("rtn").steps == ("nearest",)


def test_results_are_read_from_beside_the_recipes(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "rtn.yaml").write_text((FOLDER / "rtn.yaml").read_text())
    (tmp_path / "recipes" / "measured.json").write_text(json.dumps({"rtn": [{"model": "tiny", "KL": 0.25}]}))
    monkeypatch.setattr(told, "files", lambda package: tmp_path)
    methods.cache_clear()
    try:
        assert [m.name for m in methods()] == ["rtn"]
        assert method("rtn").measured == ({"model": "tiny", "KL": 0.25},)
    finally:
        methods.cache_clear()


def test_a_name_that_is_none_is_refused():
    with pytest.raises(UsageError, match="'gtpq' is no method that comes as a recipe; did you mean 'gptq'"):
        method("gtpq")
    with pytest.raises(UsageError, match="there are apmm, awq, "):
        method("x" * 50)


def test_prose_is_clean():
    for name in RECIPES:
        text = (FOLDER / f"{name}.yaml").read_text()
        assert re.fullmatch(r"[ -~\n]*", text), name
