"""Logits equal to those of ``transformers``, for every family and kind of checkpoint.

``docs/parity.md`` holds the same comparisons as a table; ``python benchmarks/parity.py --write`` renews it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gossamer import LLM
from gossamer.models.config import Config
from gossamer.models.transformer import Transformer

oracle = pytest.importorskip("oracle", reason="the oracle needs torch and transformers (make env installs them)")
tiny_models = oracle.tiny_models


def _check(rows: Iterable[oracle.Row]) -> list[oracle.Row]:
    checked = []
    for row in rows:
        print(oracle.table([row]).splitlines()[-1])
        assert row.spread >= 1, row
        assert row.largest <= oracle.TOLERANCE, row
        assert row.clear >= 0.5, row  # or the next line would say little
        assert row.agree == 1, row
        assert row.chunked, row
        checked.append(row)
    return checked


@pytest.mark.parametrize("tiny", tiny_models.TINY, ids=lambda tiny: tiny.name)
def test_random_models_of_every_family(tiny: tiny_models.Tiny) -> None:
    config = tiny.config()
    rows = _check(oracle.tiny_rows(tiny))
    prompt = rows[0].tokens - oracle.STEPS + 1
    assert prompt > max(getattr(config, "sliding_window", None) or 0, 64)
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        assert prompt > rope["original_max_position_embeddings"]
    if rope.get("rope_type") == "linear":
        assert prompt > config.max_position_embeddings / rope["factor"]
    wanted = [pair for pair in oracle.expected() if pair[0] == tiny.name]
    assert [(row.architecture, row.checkpoint) for row in rows] == wanted


@pytest.mark.slow
def test_smollm2(smollm2_gguf: Path) -> None:
    assert len(_check(oracle.smollm2_rows(smollm2_gguf))) == 3


@pytest.mark.slow
def test_gemma3(gemma3_gguf: Path) -> None:
    (row,) = _check(oracle.gemma3_rows(gemma3_gguf))
    assert row.tokens - oracle.STEPS > 512  # the window


# ---------------------------------------------------------------- the comparison itself


@pytest.fixture(scope="module", params=["Llama 3.1 RoPE scaling", "Mistral, window of 31", "Gemma 3, window of 24"])
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    tiny = next(t for t in tiny_models.TINY if t.name == request.param)
    model = tiny.model()
    llm = oracle.load(tiny_models.write_folder(model, tmp_path_factory.mktemp("sensitive")))
    return llm, oracle.oracle_path(model, np.random.default_rng(2).integers(0, 256, 100).tolist(), 100)


def _with(llm: LLM, config: Config) -> None:
    llm.transformer = Transformer(config, llm.transformer.runners, llm.transformer.vectors)


def test_the_smallest_mistake_is_seen(compared: tuple[LLM, oracle.Path64]) -> None:
    llm, path = compared
    c = llm.config
    wrong = {
        "RoPE base": replace(c, ropes=tuple(replace(r, theta=r.theta * 1.01) for r in c.ropes)),
        "RoPE of one layer": replace(c, ropes=(replace(c.ropes[0], theta=c.ropes[0].theta * 1.05), *c.ropes[1:])),
        "attention scale": replace(c, attn_scale=c.scale * 1.01),
        "norm epsilon": replace(c, norm_eps=c.norm_eps * 10),
    }
    if any(c.windows):
        wrong["window + 1"] = replace(c, windows=tuple(w + 1 if w else 0 for w in c.windows))
        wrong["window - 1"] = replace(c, windows=tuple(w - 1 if w else 0 for w in c.windows))
        wrong["no window"] = replace(c, windows=(0,) * c.layers)
    if c.ropes[0].kind == "llama3":
        wrong["RoPE scaling"] = replace(c, ropes=tuple(replace(r, kind="default") for r in c.ropes))
        wrong["linear RoPE scaling"] = replace(c, ropes=tuple(replace(r, kind="linear") for r in c.ropes))
    if len(set(c.ropes)) > 1:
        wrong["one RoPE for all"] = replace(c, ropes=(c.ropes[0],) * c.layers)
    try:
        for name, config in wrong.items():
            _with(llm, config)
            row = oracle.compare(llm, path, "", "")
            assert row.largest > oracle.TOLERANCE, (name, row)
    finally:
        _with(llm, c)
    assert oracle.compare(llm, path, "", "").largest <= oracle.TOLERANCE


# ---------------------------------------------------------------- the document


def test_the_document_has_every_row() -> None:
    documented = oracle.documented()
    assert list(documented) == oracle.expected()
    for pair, (tokens, compared, largest, spread, clear, agree) in documented.items():
        assert int(tokens) > int(compared) - 1 >= oracle.STEPS, pair
        assert float(largest) <= oracle.TOLERANCE, pair
        assert float(spread) >= 1, pair
        assert clear.endswith("%"), pair
        assert agree == "100%", pair
