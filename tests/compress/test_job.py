"""Whole compressions by every recipe: what is published, what the ledger says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from folders import contents

from gossamer import LLM
from gossamer.compress import run
from gossamer.compress.check import CheckError
from gossamer.compress.job import Written, compress
from gossamer.compress.recipe import Calibration, Recipe, load, names, of_format, parse_recipe
from gossamer.errors import FormatError, UsageError
from gossamer.models.checkpoint import open_checkpoint

TEXT = " ".join(f"The {i} lazy dogs and the {7 * i % 31} quick foxes are in the garden." for i in range(400))
BITS = 'formats: {"*": int4/g32, embed: int8/g32}\n'


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 128 columns, which groups of 128 and Hadamard matrices of 64 fit, and a text beside them."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("HIDDEN", 128), ("HEADS", 4), ("KV_HEADS", 2), ("FFN", 256)):
            patch.setattr(tiny_gguf, name, value)
        tiny_gguf.write(folder / "tiny.gguf")
    return folder / "tiny.gguf"


def write(source: Path, out: Path, recipe: Recipe, tokens: int = 512, **options: Any) -> Written:
    calibration = Calibration(tokens, 128, str(source.parent / "text.txt"))
    return compress(open_checkpoint(source), out, recipe, calibration=calibration, **options)


def mine(text: str) -> Recipe:
    return parse_recipe(f"name: mine\n{BITS}{text}", "mine")


def ledger_of(done: Written) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((done.path / "gossamer.json").read_text())
    return found


# ---------------------------------------------------------------- every recipe


@pytest.mark.parametrize("name", names())
def test_every_recipe_from_end_to_end(name: str, source: Path, tmp_path: Path) -> None:
    done = write(source, tmp_path / "out", load(name))
    ledger = ledger_of(done)
    checkpoint = open_checkpoint(done.path)
    assert done.data_bytes == checkpoint.data_bytes
    assert ledger["recipe"]["name"] == name
    assert ("calibration" in ledger) == load(name).calibrated
    assert list(ledger["sites"]) == list(ledger["formats"]) == [s.name for s in checkpoint.topology.sites]
    for site, entry in ledger["sites"].items():
        assert entry["format"] == ledger["formats"][site]
        packed = checkpoint.stored(checkpoint.topology.site(site))
        assert entry["bits"] == packed.bits_per_weight
        assert entry["sqnr_db"] is None or np.isfinite(entry["sqnr_db"])
        if "hessian" in load(name).needs and site != "model.embed_tokens" and name != "awq":
            assert 0 < entry["output_relative"] < 0.5, site
    assert ledger["check"]["tokens"]
    # The same text in, about the same answer out.
    tokens = LLM(source).tokenizer.encode(TEXT)[:128]
    base, ours = LLM(source).logits(tokens), LLM(done.path).logits(tokens)
    assert np.isfinite(ours).all()
    assert np.corrcoef(base.ravel(), ours.ravel())[0, 1] > 0.6


def test_the_ledger_says_what_was_done(source: Path, tmp_path: Path) -> None:
    recipe = load("minifloat")
    ledger = ledger_of(write(source, tmp_path / "out", recipe, seed=5))
    assert ledger["recipe"] == recipe.as_dict() | {"keep": {}}
    c = ledger["calibration"]
    assert (c["tokens"], c["length"], c["seed"], c["text"]) == (512, 128, 5, "text.txt")
    assert len(c["sha256"]) == 64
    assert len(ledger["transforms"]) == 4
    assert all(line.startswith("smooth(0.5): model.layers.") for line in ledger["transforms"])
    # Bias correction gives sites a bias that the family has no words for.
    assert "model.layers.1.mlp.down_proj" in ledger["biases"]
    assert ledger["predicted"]["steps"].keys() >= {"forward", "statistics", "fit", "check"}
    assert ledger["measured"]["steps"].keys() >= {"text", "inputs-0000", "embed", "layer-0001", "check"}
    assert ledger["measured"]["peak_bytes"] > 0
    assert ledger["source"]["file"] == "tiny.gguf"
    assert len(ledger["source"]["fingerprint"]) == 64


# ---------------------------------------------------------------- what calibration changes


def test_the_hessian_solver_beats_rounding_on_the_outputs_it_saw(source: Path, tmp_path: Path) -> None:
    # A search of one step is plain rounding that looks at inputs, so that the errors of outputs are measured.
    solvers = {"nearest": "{name: clip, steps: 1, lowest: 1.0, refine: 0}", "obs": "obs"}
    errors = {}
    for name, solver in solvers.items():
        done = write(source, tmp_path / name, mine(f"solver: {solver}\nsequential: group"))
        entries = ledger_of(done)["sites"].values()
        errors[name] = sum(e["output_relative"] for e in entries if e["output_relative"] is not None)
    assert errors["obs"] < 0.8 * errors["nearest"]


def test_the_first_input_is_the_same_in_every_order(source: Path, tmp_path: Path) -> None:
    done = {
        order: ledger_of(write(source, tmp_path / order, mine(f"solver: obs\nsequential: {order}")))["sites"]
        for order in ("layer", "group", "none")
    }
    first = "model.layers.0.self_attn.q_proj"
    assert done["layer"][first] == done["group"][first] == done["none"][first]
    later = "model.layers.0.self_attn.o_proj"
    assert done["layer"][later] == done["none"][later] != done["group"][later]
    last = "model.layers.1.mlp.down_proj"
    assert len({done[order][last]["output_mse"] for order in done}) == 3


def test_kept_sites_are_kept_and_calibration_goes_through_them(source: Path, tmp_path: Path) -> None:
    done = write(source, tmp_path / "out", mine("solver: obs"), keep=[("*.0.mlp.*", "f32 @ f32"), ("q", "int8/g32")])
    formats = ledger_of(done)["formats"]
    assert formats["model.layers.0.mlp.up_proj"] == "f32 @ f32"
    assert formats["model.layers.1.mlp.up_proj"] == "int4/g32"
    assert {formats[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1)} == {"int8/g32"}


def test_fewer_tokens_than_columns_and_what_was_damped(source: Path, tmp_path: Path) -> None:
    done = write(source, tmp_path / "out", mine("solver: {name: obs, damping: 0.0}"), tokens=128)
    sites = ledger_of(done)["sites"]
    lines = [line for entry in sites.values() for line in entry.get("log", [])]
    assert any("damping" in line for line in lines), sites["model.layers.0.mlp.down_proj"]


def test_another_seed_another_text_of_its_own(source: Path, tmp_path: Path) -> None:
    def self_written(out: str, seed: int) -> Written:
        calibration = Calibration(256, 128)
        return compress(
            open_checkpoint(source), tmp_path / out, mine("solver: obs"), calibration=calibration, seed=seed
        )

    first, again, other = self_written("a", 0), self_written("b", 0), self_written("c", 1)
    assert contents(first.path) == contents(again.path)
    assert ledger_of(first)["calibration"]["text"] == "text the model wrote itself, seed 0"
    assert ledger_of(first)["calibration"]["sha256"] != ledger_of(other)["calibration"]["sha256"]


def test_salient_rows_get_more_bits(source: Path, tmp_path: Path) -> None:
    done = write(source, tmp_path / "out", load("mixllm"))
    checkpoint = open_checkpoint(done.path)
    rows = sum(s.rows for s in checkpoint.topology.sites if s.layer is not None)
    wide = 0
    for site in checkpoint.topology.sites:
        fmt = checkpoint.native(site).weight
        wide += getattr(fmt, "counts", (0,))[0] if str(fmt).startswith("rows(") else 0
    assert wide == round(0.1 * rows)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "kind", "needle"),
    [
        ("formats: {q: int4/g32}", UsageError, "no format is given for model.embed_tokens"),
        ('formats: {"*": int4/g32, "*.9.*": int8/g32}', UsageError, r"'\*\.9\.\*' is no role"),
        ('formats: {"*": int4/g33}', FormatError, "int4/g33"),
        ('formats: {"*": "hadamard(48, none, int4/g32)"}', FormatError, "does not fit 128 columns"),
        ('formats: {"*": int4/g32, q: int8/g32}\nallocate: salience', UsageError, "share one format"),
        ('formats: {"*": int4/g32}\nthen: [lowrank]', UsageError, "has no low-rank part to compensate with"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    source: Path, tmp_path: Path, text: str, kind: type[Exception], needle: str
) -> None:
    with pytest.raises(kind, match=needle) as caught:
        write(source, tmp_path / "out", parse_recipe(f"name: mine\n{text}", "mine"))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the check at the end


def test_a_check_that_fails_publishes_nothing_and_keeps_the_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, tokens: object) -> dict[str, Any]:
        raise CheckError("the check failed: all scales of q are zero.")

    with monkeypatch.context() as patch:
        patch.setattr(run, "check", fail)
        with pytest.raises(CheckError, match="all scales of q are zero"):
            write(source, tmp_path / "out", of_format("int4/g32"))
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    journal = json.loads((tmp_path / ".out.partial" / "journal.json").read_text())
    assert journal["failed"] == "the check failed: all scales of q are zero."
    assert write(source, tmp_path / "out", of_format("int4/g32")).resumed
