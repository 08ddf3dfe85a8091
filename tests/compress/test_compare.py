"""Comparisons as a library: speed, resuming a recipe, and what is said while it works."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf

from gossamer.compress import compare as module
from gossamer.compress.compare import Options, compare, draw_frontier
from gossamer.compress.kept import contents_hash
from gossamer.errors import ResourceError, UsageError
from gossamer.evaluate import Text

TEXT = Text("the heather in the ether there " * 40, "words", "abc")
QUICK = Options(tokens=64, window=64, repetitions=0)


def test_speed_is_measured_once(tiny: Path, tmp_path: Path) -> None:
    options = Options(tokens=64, window=64, repetitions=1, decode=2, prefill=8)
    first = compare(tiny, ["int4/g32"], TEXT, options=options, cache=tmp_path)
    assert all(r.decode_tps > 0 and r.prefill_tps > 0 for r in first.rows)
    assert all(r.decode_tps_range == (r.decode_tps, r.decode_tps) for r in first.rows)
    second = compare(tiny, ["int4/g32"], TEXT, options=options, cache=tmp_path)
    assert [r.decode_tps for r in second.rows] == [r.decode_tps for r in first.rows]
    assert [r.kept for r in second.rows] == [True, True]
    without = compare(tiny, ["int4/g32"], TEXT, options=QUICK, cache=tmp_path)
    assert [(r.kept, r.decode_tps) for r in without.rows] == [(True, None)] * 2
    assert json.loads(json.dumps(second.to_json()))["machine"]["threads"] >= 1
    assert "int4/g32" in draw_frontier(second)


def test_what_a_kept_row_depends_on(tiny: Path, tmp_path: Path) -> None:
    def kept(model: Path = tiny, text: Text = TEXT, options: Options = QUICK, **more: Any) -> list[bool]:
        found = compare(model, ["int4/g32"], text, options=options, cache=tmp_path / "cache", **more)
        return [r.kept for r in found.rows]

    assert kept() == [False, False]
    assert kept() == [True, True]
    assert kept(fresh=True) == [False, False]
    assert kept(keep=[("down", "bf16")]) == [True, False]  # the base has its own formats
    assert kept(options=replace(QUICK, score="all")) == [False, False]
    assert kept(options=replace(QUICK, bos=True)) == [False, False]
    assert kept(text=TEXT._replace(sha256="abd")) == [False, False]
    assert kept(tiny_gguf.write(tmp_path / "other.gguf", seed=1)) == [False, False]
    for damage in ("{", "[]", '{"schema": 0, "figures": {}}'):
        for path in (tmp_path / "cache").iterdir():
            path.write_text(damage)
        assert kept() == [False, False]


def test_a_recipe_that_was_stopped_goes_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(tiny, ["rtn:int4/g32"], TEXT, options=QUICK, cache=tmp_path / "whole")
    evaluate = module.evaluate

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(tiny, ["rtn:int4/g32"], TEXT, options=QUICK, cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("*.model")  # compressed, not yet measured
    monkeypatch.setattr(module, "evaluate", evaluate)
    monkeypatch.setattr(module, "compress_by", stopped)  # would compress once more
    found = compare(tiny, ["rtn:int4/g32"], TEXT, options=QUICK, cache=tmp_path / "cache")
    assert not folder.exists()
    assert found.rows[1].kl_mean == whole.rows[1].kl_mean
    assert found.rows[1].seconds > 0


def test_what_is_said(tiny: Path, tmp_path: Path) -> None:
    said = []

    @contextmanager
    def step(what: str):
        said.append(what)
        yield lambda done, total: None

    compare(tiny, ["int4/g32", "rtn:int8/g32"], TEXT, options=QUICK, cache=tmp_path, step=step)
    assert said[0] == "reading the model"
    assert {"base, loading", "base, quality", "int4/g32, loading", "int4/g32, quality"} <= set(said)
    assert any(s.startswith("rtn:int8/g32, ") for s in said)


def test_other_inputs(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = ["int4/g32 @ f32", "rtn:int4/g32"]
    options = replace(QUICK, inputs="int8/token", keep_folders=True)
    keep = [("embed", "bf16")]
    found = compare(tiny, entries, TEXT, keep=keep, options=options, cache=tmp_path)
    for row in found.rows[1:]:
        assert row.formats == {"int4/g32 @ int8/token": 14, "bf16": 1}  # dense weights take no integers
    assert found.rows[1].kl_mean == found.rows[2].kl_mean
    assert list(found.rows[0].formats) == ["uint4/g32-m(f16)", "int8/g32"]
    (folder,) = tmp_path.glob("*.model")
    monkeypatch.setattr(module, "compress_by", None)  # what is there is not made again
    again = compare(tiny, entries, TEXT, keep=keep, options=replace(QUICK, inputs=" f32 "), cache=tmp_path)
    assert again.rows[0].kept
    assert not again.rows[1].kept
    assert again.rows[2].formats == {"int4/g32 @ f32": 14, "bf16 @ f32": 1}
    assert not folder.exists()  # taken, then removed


def test_another_base(tiny: Path, tmp_path: Path) -> None:
    alone = compare(tiny, ["int4/g32"], TEXT, options=QUICK, cache=tmp_path)
    other = tmp_path / "other"
    module.compress_by(module.open_checkpoint(tiny), other, module.recipes.of_format("int4/g32"))
    found = compare(tiny, ["int4/g32"], TEXT, against=other, options=QUICK, cache=tmp_path)
    assert found.against == "other"
    assert found.rows[1].kl_mean == 0  # the same weights
    assert found.rows[0].bytes == found.rows[1].bytes < alone.rows[0].bytes


def test_the_key_of_a_model_is_of_its_contents(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny.read_bytes())
    assert contents_hash(copy) == contents_hash(tiny)
    seen = []
    data = bytearray(tiny.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert contents_hash(copy, lambda *p: seen.append(p)) != contents_hash(tiny)
    assert seen[-1] == (len(data), len(data))


def test_what_cannot_be_compared(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(tiny, [], TEXT, options=QUICK, cache=tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ResourceError, match="name another place with --cache"):
        compare(tiny, ["int4/g32"], TEXT, options=QUICK, cache=file)
