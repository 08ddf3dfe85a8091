"""The bench's arithmetic, its two kinds of probe failure, its order, and random models of real shapes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from gossamer import ops
from gossamer.engine.kv import kv_bytes
from gossamer.engine.llm import LLM
from gossamer.errors import FormatError, ResourceError, UsageError
from gossamer.evaluate import SHAPES, bench, machine, random_weights, roofline, shape_model, shapes, speed
from gossamer.evaluate.random_weights import random_matrix
from gossamer.evaluate.roofline import Peaks, decode_work, prefill_work
from gossamer.formats import Dense, parse, parse_weight, project
from gossamer.formats.dispatch import linear, make_runner
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
    """Makes the probe say what the test wants: the bandwidths around each decode, one pair a repetition."""

    def say(*gbps: float) -> None:
        pairs = zip(gbps[::2], gbps[1::2])
        values = iter([v for pair in pairs for v in (50, 50, *pair)])  # a prefill's two come first
        monkeypatch.setattr(speed, "probe", lambda: Peaks(next(values), 1000, 500, 250))

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
    prompt, decode = result.cells
    assert (prompt.work, prompt.batch, prompt.tokens, prompt.bound_by) == ("prefill", 1, 40, "bf16")
    assert (decode.work, decode.batch, decode.tokens, decode.bound_by) == ("decode", 1, 8, "bandwidth")
    assert (prompt.bandwidth_gbps, decode.bandwidth_gbps) == (50, 10.25)
    assert decode.bound_tps == pytest.approx(10.25e9 / read)
    assert decode.share == pytest.approx(result.bandwidth_fraction)
    assert prompt.share == pytest.approx(prompt.ours.median / prompt.bound_tps)
    assert prompt.peer is prompt.ratio is None
    assert json.loads(json.dumps(result.to_json()))["cells"][1]["ours"]["median"] == result.decode_tps


def test_the_least_work_of_a_step():
    model = shape_model(TINY, "int8/row @ int8/token", keep=[("down", "f16 @ f32"), ("head", "bf16")])
    body = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 2 * 64 * 96)
    down, head = 2 * 96 * 64, 1003 * 64
    work = prefill_work(model, 40, "f16")
    assert work.macs == {"int8": 40 * body, "f32": 40 * down, "bf16": head}
    assert work.bytes == model.weight_bytes
    assert prefill_work(model, 513, "f16").bytes == 2 * model.weight_bytes
    one, three = (decode_work(model, batch, 20, "f16") for batch in (1, 3))
    assert (
        three.macs
        == {kind: 3 * n for kind, n in one.macs.items()}
        == {
            "int8": 3 * body,
            "f32": 3 * down,
            "bf16": 3 * head,
        }
    )
    table = model.packed["model.embed_tokens"]
    row, context = table.nbytes // 1003, kv_bytes(TINY, 32) // 32 // 2 * (20 + 8)
    assert one.bytes == model.weight_bytes - table.nbytes + row + context
    assert three.bytes - one.bytes == 2 * (row + context)


def test_the_roofline():
    work = roofline.Work(4_000_000_000, {"int8": 10**12, "f32": 10**11})
    # 0.1 s of reading beside 1 s + 0.4 s of multiplying; then the other way round.
    assert work.bound(Peaks(40, 2000, 1000, 500)) == (pytest.approx(1.4), "int8")
    assert work.bound(Peaks(1, 2000, 1000, 500)) == (pytest.approx(4.0), "bandwidth")
    assert work.bound(Peaks(40, 2000, 1000, 100)) == (pytest.approx(3.0), "f32")
    assert roofline.Work(8, {}).bound(Peaks(2, 1, 1, 1)) == (4e-9, "bandwidth")
    a, b = Peaks(10, 20, 30, 40), Peaks(11.2, 20, 32, 40)
    assert a.between(b) == Peaks(10.6, 20, 31, 40)
    assert [a.agree(b, name) for name in ("bandwidth", "int8", "bf16", "f32")] == [False, True, True, True]


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        ("int4/g32", {"bf16": 64 * 96}),
        ("f16 @ f32", {"f32": 64 * 96}),
        ("int4/g32 @ int8/token", {"int8": 64 * 96}),
        ("cols(32: bf16 @ bf16, int4/row) @ int8/token", {"bf16": 64 * 32, "int8": 64 * 64}),
        ("int4/g32 + rank8(bf16)", {"bf16": 64 * 96 + 8 * (64 + 96)}),
        ("int4/g32 + mask(1%: f16)", {"bf16": 64 * 96, "f32": 61}),
    ],
)
def test_what_multiplies_a_site(text, macs):
    fmt = parse(text)
    assert roofline.arithmetic(make_runner(random_matrix(fmt.weight, 64, 96), fmt)) == macs


class Fake:
    """A side that writes down what it is asked and says how long it took."""

    def __init__(self, name, log, seconds):
        self.name, self.log, self.seconds = name, log, iter(seconds)

    def prefill(self, tokens):
        self.log.append((self.name, "prefill", tokens))
        return next(self.seconds)

    def decode(self, batch, steps):
        self.log.append((self.name, "decode", batch, steps))
        return next(self.seconds)


def test_both_sides_take_turns(monkeypatch):
    log = []
    warm, times = [9, 9, 9], [1, 2, 4, 1, 2, 5]
    monkeypatch.setattr(speed, "Ours", lambda *a: Fake("ours", log, [*warm, *times]))
    peer = Fake("peer", log, [*warm, 2, 4, 4, 3, 6, 10])
    monkeypatch.setattr(speed, "probe", lambda: log.append("probe") or Peaks(10, 1000, 500, 250))
    result = bench(shape_model(TINY, "int4/g32"), prefill=30, decode=10, batches=(1, 4), repetitions=2, peer=peer)
    jobs = [("prefill", 30), ("decode", 1, 10), ("decode", 4, 10)]
    warming = [("prefill", 30), ("decode", 1, 4), ("decode", 4, 4)]
    turns = [step for job in jobs for step in ("probe", ("ours", *job), "probe", ("peer", *job))]
    assert log == [(side, *job) for side in ("ours", "peer") for job in warming] + turns * 2
    prompt, one, four = result.cells
    assert (prompt.ours.median, prompt.peer.low, prompt.peer.high) == (30, 10, 15)
    assert (prompt.ratio.median, prompt.ratio.low, prompt.ratio.high) == (2.5, 2, 3)
    assert (one.tokens, one.ours.median, one.ratio.median) == (10, 5, 2.5)
    assert (four.tokens, four.batch, four.ours.high, four.ours.low) == (40, 4, 10, 8)
    assert (four.ratio.low, four.ratio.high) == (1, 2)
    assert "both sides in turn" in result.protocol


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
    assert any("1 of 3 repetitions do not count towards the share of decode at batch 1" in n for n in result.notes)
    assert (result.cells[0].dropped, result.cells[1].dropped) == (0, 1)
    probes(10, 12, 9, 10.5)
    result = bench(model, prefill=8, decode=4, repetitions=2)
    assert (result.dropped, result.bandwidth_fraction) == (2, None)
    assert result.cells[1].share is None
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
        monkeypatch.setattr(speed, "last_cache_bytes", lambda cache=cache: cache)
        probes(10, 10)
        result = bench(model, prefill=4, decode=2, repetitions=1)
        assert any("last cache" in note for note in result.notes) == said
        assert result.cold == (None if cache is None else not said)


def test_cache_size_is_read_from_the_system(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    assert machine.last_cache_bytes() is None
    for index, size in enumerate(["48K", "2M", "strange"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert machine.last_cache_bytes() == 2 << 20


def test_peak_memory_is_what_the_system_says(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(machine, "_CLEAR", tmp_path / "no" / "clear_refs")
    assert machine.peak_rss_mb() is None
    machine.forget_peak_rss()  # a system that does not allow it
    (tmp_path / "status").write_text("VmPeak:\t 9 kB\nVmHWM:\t  5000 kB\n")
    assert machine.peak_rss_mb() == 5.12


def test_options_that_cannot_work(probes, monkeypatch):
    model = shape_model(TINY, "f32 @ f32")
    with pytest.raises(UsageError, match="256"):
        bench(model, prefill=257)
    with pytest.raises(UsageError, match="at least 1"):
        bench(model, decode=0)
    for batches in ((), (1, 0)):
        with pytest.raises(UsageError, match="batches of"):
            bench(model, batches=batches)
    with pytest.raises(UsageError, match="--threads 0"):
        bench(model, threads=0, prefill=4, decode=2)


def test_a_probe_without_memory(monkeypatch):
    monkeypatch.setattr(roofline, "PROBE_BYTES", 1 << 60)
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
    "expression",
    [
        *("f32", "bf16", "int8/g32", "int4/row", "int5/g64", "uint4/g32", "uint8/g128-m(f16)", "kmeans3/row"),
        *("e2m1/g32*e8m0", "uint4/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))", "int6/g16*(int8/g16)", "planes(int4/g64)"),
    ],
)
def test_random_matrices_are_what_the_format_encodes(expression, monkeypatch):
    monkeypatch.setattr(random_weights, "_SAMPLE", 3 * 16 * 72)  # three panels, so that they repeat
    fmt = parse_weight(expression)
    matrices = random_weights.RandomMatrices()
    for rows in (200, 5, 48, 16):
        packed = matrices.make(fmt, rows, 72)
        packed.validate("a random matrix")
        values, _ = matrices.blocks[str(fmt), 72]
        whole = rows // 16 * 16
        decoded = packed.decode()
        if whole:
            np.testing.assert_array_equal(decoded[:whole], project(fmt, np.tile(values, (5, 1))[:whole]))
        np.testing.assert_array_equal(decoded[whole:], project(fmt, values)[: rows - whole])
        assert 0.5 < decoded.std() * np.sqrt(72) < 1.5


@pytest.mark.parametrize(
    "expression",
    [
        *("int4/tensor", "ternary/tensor", "kmeans4/tensor", "e4m3/128x128", "e2m1/g16*(e4m3/tensor)"),
        *("int4/32x32*(int8/row)", "mask(1%: f16)", "mask(2.5%: int8/tensor)", "int4/g32 + mask(0.5%: bf16)"),
        *("int4/g32 + rank4(bf16)", "cols(16: bf16, 24: int8/row, int4/row)", "rows(17: int8/g32, 5: bf16, int4/g32)"),
        *("hadamard(24, 7, int4/row)", "permute(int4/g32)", "scale(int4/g32)", "permute(cols(8: bf16, int4/row))"),
    ],
)
def test_random_matrices_of_every_other_format(expression, monkeypatch):
    """They are sound, have the right size and values of the right size, and run."""
    monkeypatch.setattr(random_weights, "_SAMPLE", 3 * 16 * 72)
    site = parse(expression)
    for rows in (200, 48, 37):
        packed = random_matrix(site.weight, rows, 72)
        packed.validate("a random matrix")
        assert packed.shape == (rows, 72)
        decoded = packed.decode()
        assert decoded.shape == (rows, 72)
        assert np.isfinite(decoded).all()
        if "mask" not in expression:
            assert 0.4 < decoded[rows // 2 :].std() * np.sqrt(72) < 2
        x = np.random.default_rng(1).standard_normal((2, 72), np.float32)
        out = np.empty((2, rows), np.float32)
        linear([make_runner(packed, parse(f"{expression} @ f32"))], x, [out])
        assert np.abs(out - x @ decoded.T).max() < 1e-4


def test_a_large_random_matrix_takes_as_long_as_filling_it():
    """Encoding a matrix of this size takes minutes."""
    started = time.perf_counter()
    for text in ("e2m1/g16*(e4m3/tensor)", "uint4/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))", "int4/g128 + rank32(bf16)"):
        packed = random_matrix(parse_weight(text), 28672, 8192)
        assert packed.nbytes > 28672 * 8192 * 4 // 8
    assert time.perf_counter() - started < 30


def test_a_format_that_is_not_laid_out_by_panels_is_encoded(monkeypatch):
    class Whole(Dense):
        """One more element than its panels take."""

        def fields(self, rows, cols):
            return {k: replace(f, used=f.used + 1) for k, f in super().fields(rows, cols).items()}

    monkeypatch.setattr(random_weights, "_SAMPLE", 16 * 8)
    decoded = random_matrix(Whole("f32"), 40, 8).decode()
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
    with pytest.raises(UsageError, match="'nothing' matches no site"):
        shape_model(TINY, "int4/g32", keep=[("nothing", "bf16")])
    with pytest.raises(FormatError, match="int5"):
        shape_model("smollm2-135m", "int5/q32")
    monkeypatch.setattr(shapes, "available_memory", lambda: 10**9)
    with pytest.raises(ResourceError, match=r"llama-3-8b stored as int4/g32 needs 4\.5 GB and 1\.0 GB"):
        shape_model("llama-3-8b")
