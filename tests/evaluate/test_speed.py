"""The bench's arithmetic, its two kinds of probe failure, and random models of real shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from gossamer import ops
from gossamer.engine.kv import kv_bytes
from gossamer.engine.llm import LLM
from gossamer.errors import FormatError, ResourceError, UsageError
from gossamer.evaluate import SHAPES, bench, shape_model, shapes, speed
from gossamer.formats import Dense, parse_weight, project
from gossamer.models.config import Config, Rope
from gossamer.models.topology import describe

TINY = Config(
    family="llama",
    vocab=1003,  # not a whole number of panels
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=96,
    context=256,
    norm_eps=1e-5,
    ropes=(Rope(1e4),) * 2,
    windows=(0, 8),
    tied=False,
    biased=frozenset("qkv"),
)


@pytest.fixture
def probes(monkeypatch):
    """Makes the probe say what the test wants, without a gibibyte of memory."""

    def say(*gbps: float) -> None:
        values = iter(gbps)
        monkeypatch.setattr(speed, "_probe", lambda: next(values))

    return say


def test_rates_and_bytes(probes):
    probes(10, 10.5)
    model = shape_model(TINY, "int8/g32")
    seen = []
    result = bench(model, prefill=40, decode=8, repetitions=1, progress=lambda *p: seen.append(p))
    table = model.packed["model.embed_tokens"]
    assert result.weight_bytes == sum(p.nbytes for p in model.packed.values())
    assert result.weight_bytes_per_token == result.weight_bytes - table.nbytes + table.nbytes // 1003
    # The first layer reads all of a mean context of 20 keys and values, the second a window of 8.
    assert result.kv_bytes_per_token == kv_bytes(TINY, 32) // 32 // 2 * (20 + 8)
    read = result.weight_bytes_per_token + result.kv_bytes_per_token
    assert result.decode_gbps == pytest.approx(read * result.decode_tps / 1e9)
    assert result.bandwidth_gbps == 10.25
    assert result.bandwidth_fraction == pytest.approx(result.decode_gbps / 10.25)
    assert result.decode_tps_range == (result.decode_tps, result.decode_tps)
    assert result.prefill_tps > 0
    assert result.dropped == 0
    assert result.load_s is None
    assert result.unfused_sites == {}
    assert result.formats == {"int8/g32": 16}
    assert (result.model, result.kv, result.isa) == ("llama", "f16", ops.isa())
    assert seen == [(1, 1)]
    assert json.loads(json.dumps(result.to_json()))["decode_tps"] == result.decode_tps


def test_a_tied_table_counts_once(probes):
    probes(10, 10)
    result = bench(shape_model(replace(TINY, tied=True), "f16 @ f32"), prefill=8, decode=2, repetitions=1)
    assert result.weight_bytes_per_token == result.weight_bytes


def test_unsteady_repetitions_are_dropped(probes):
    model = shape_model(TINY, "int4/g32")
    probes(10, 12, 20, 20, 10, 9)
    result = bench(model, prefill=8, decode=4, repetitions=3)
    assert result.dropped == 1
    assert result.bandwidth_gbps == pytest.approx((20 + 9.5) / 2)
    assert any("1 of 3 repetitions" in note for note in result.notes)
    probes(10, 12, 9, 10.5)
    result = bench(model, prefill=8, decode=4, repetitions=2)
    assert (result.dropped, result.bandwidth_fraction) == (2, None)
    assert any("quieter machine" in note for note in result.notes)


def test_threads_are_put_back(probes):
    before = ops.threads()
    probes(10, 10)
    result = bench(shape_model(TINY, "f32 @ f32"), threads=before + 1, prefill=4, decode=2, repetitions=1)
    assert result.threads == before + 1
    assert ops.threads() == before


def test_a_real_model_with_the_real_probe(smollm2_gguf):
    result = bench(LLM(smollm2_gguf), prefill=32, decode=4, repetitions=1, name="smollm2")
    assert result.model == "smollm2"
    assert result.bandwidth_gbps > 1
    assert result.load_s is not None
    assert result.load_s > 0
    assert result.peak_rss_mb is not None
    assert result.peak_rss_mb > result.weight_bytes / 1e6
    assert result.weights == 134_479_872


def test_small_weights_are_said_to_be_in_the_cache(probes, monkeypatch):
    model = shape_model(TINY, "int4/g32")
    for cache, said in ((1 << 25, True), (1024, False), (None, False)):
        monkeypatch.setattr(speed, "_last_cache_bytes", lambda cache=cache: cache)
        probes(10, 10)
        notes = bench(model, prefill=4, decode=2, repetitions=1).notes
        assert any("last cache" in note for note in notes) == said


def test_cache_size_is_read_from_the_system(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_CACHES", tmp_path)
    assert speed._last_cache_bytes() is None
    for index, size in enumerate(["48K", "2M", "strange"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert speed._last_cache_bytes() == 2 << 20


def test_options_that_cannot_work(probes, monkeypatch):
    model = shape_model(TINY, "f32 @ f32")
    with pytest.raises(UsageError, match="256"):
        bench(model, prefill=257)
    with pytest.raises(UsageError, match="at least 1"):
        bench(model, decode=0)
    with pytest.raises(UsageError, match="--threads 0"):
        bench(model, threads=0, prefill=4, decode=2)


def test_a_probe_without_memory(monkeypatch):
    monkeypatch.setattr(speed, "PROBE_BYTES", 1 << 60)
    with pytest.raises(ResourceError, match="memory bandwidth cannot be measured"):
        bench(shape_model(TINY, "f32 @ f32"), prefill=4, decode=2, repetitions=1)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3-8b", 8_030_261_248),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
        ("gemma-3-1b", 999_885_952),
        ("mistral-7b", 7_241_732_096),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name, parameters):
    assert describe(SHAPES[name]).parameters == parameters


def test_every_shape_is_tested():
    assert len(SHAPES) == 8


@pytest.mark.parametrize(
    "expression", ["f32", "bf16", "int8/g32", "int4/row", "int5/g64", "uint4/g32", "uint8/g128-m(f16)"]
)
def test_random_matrices_are_what_the_format_encodes(expression, monkeypatch):
    monkeypatch.setattr(shapes, "_SAMPLE", 3 * 16 * 72)  # three panels, so that they repeat
    fmt = parse_weight(expression)
    matrices = shapes._RandomMatrices(fmt)
    for rows in (200, 5, 48, 16):
        packed = matrices.make(rows, 72)
        packed.validate("a random matrix")
        values, _ = matrices.blocks[72]
        whole = rows // 16 * 16
        decoded = packed.decode()
        if whole:
            np.testing.assert_array_equal(decoded[:whole], project(fmt, np.tile(values, (5, 1))[:whole]))
        np.testing.assert_array_equal(decoded[whole:], project(fmt, values)[: rows - whole])
        assert 0.5 < decoded.std() * np.sqrt(72) < 1.5


def test_a_format_that_is_not_laid_out_by_panels_is_encoded(monkeypatch):
    class Whole(Dense):
        """One more element than its panels take."""

        def fields(self, rows, cols):
            return {k: replace(f, used=f.used + 1) for k, f in super().fields(rows, cols).items()}

    monkeypatch.setattr(shapes, "_SAMPLE", 16 * 8)
    packed = shapes._RandomMatrices(Whole("f32")).make(40, 8)
    decoded = packed.decode()
    np.testing.assert_array_equal(decoded[:16], decoded[16:32])
    assert (decoded[32:] == decoded[:8]).all()
    assert decoded.std() > 0


def test_matrices_have_memory_of_their_own():
    model = shape_model(TINY, "int4/g32")
    arrays = [a for p in model.packed.values() for a in p.arrays.values()]
    spans = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_shape_errors(monkeypatch):
    with pytest.raises(UsageError, match=r"'llama' is not known; choose smollm2-135m, llama-3\.2-1b"):
        shape_model("llama")
    with pytest.raises(FormatError, match="int5"):
        shape_model("smollm2-135m", "int5/q32")
    monkeypatch.setattr(shapes, "available_memory", lambda: 10**9)
    with pytest.raises(ResourceError, match=r"llama-3-8b stored as int4/g32 needs 4\.5 GB and 1\.0 GB"):
        shape_model("llama-3-8b")
