"""Configurations: what each family's two kinds of file read as, and what is written reads back."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from configs import FAMILIES, HF, LLAMA3, gguf, read, refused

from gossamer.errors import UnsupportedError
from gossamer.models.config import Config, Fields, Rope
from gossamer.models.family import BY_NAME, by_hf, to_hf

# ---------------------------------------------------------------- reading


def test_sizes_and_family() -> None:
    for family in FAMILIES:
        c = read(family, head_dim=32)
        assert (c.family, c.vocab, c.hidden, c.layers, c.heads, c.kv_heads) == (family, 100, 64, 4, 4, 2)
        assert (c.head_dim, c.ffn, c.context, c.norm_eps) == (32, 96, 4096, 1e-5)


def test_missing_entries_mean_what_the_family_means_by_them() -> None:
    without = {"head_dim": ..., "num_key_value_heads": ..., "num_attention_heads": 64, "hidden_size": 1024}
    assert [(c.head_dim, c.kv_heads) for c in (read(f, **without) for f in FAMILIES)] == [
        (256, 4),  # gemma3
        (16, 64),  # llama
        (16, 8),  # mistral
        (16, 32),  # qwen2
        (128, 32),  # qwen3
    ]
    assert read("mistral", num_key_value_heads=None).kv_heads == 4
    assert read("gemma3").tied
    assert not read("llama").tied


def test_biases() -> None:
    assert read("llama").biased == frozenset()
    assert read("llama", attention_bias=True).biased == frozenset("qkvo")
    assert read("llama", mlp_bias=True).biased == frozenset({"gate", "up", "down"})
    assert read("qwen2").biased == frozenset("qkv")
    assert read("qwen3").biased == frozenset()
    assert read("gemma3", attention_bias=True).biased == frozenset("qkvo")


def test_windows() -> None:
    assert read("llama", sliding_window=16).windows == (0,) * 4  # Llama has none
    assert read("mistral", sliding_window=16).windows == (16,) * 4
    assert read("mistral", sliding_window=None).windows == (0,) * 4
    assert read("mistral").windows == (4096,) * 4
    for family in ("qwen2", "qwen3"):
        assert read(family, sliding_window=16).windows == (0,) * 4
        used = {"use_sliding_window": True, "sliding_window": 16}
        assert read(family, **used, max_window_layers=1).windows == (0, 16, 16, 16)
        assert read(family, **used).windows == (0,) * 4  # 28 layers without come first
        mixed = ["sliding_attention", "full_attention"] * 2
        assert read(family, **used, layer_types=mixed).windows == (16, 0, 16, 0)
    assert read("gemma3", sliding_window=16, num_hidden_layers=7).windows == (16,) * 5 + (0, 16)
    assert read("gemma3", sliding_window=16, sliding_window_pattern=2).windows == (16, 0, 16, 0)


def test_old_and_new_rope_styles_are_the_same() -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        assert set(read(family).ropes) == {Rope(10000.0)}
        assert read(family, rope_theta=5e5) == read(family, rope_parameters={"rope_theta": 5e5})
        assert read(family, rope_theta=500000) == read(
            family, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
        )
        old = read(family, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})
        assert old == read(family, rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0})
        assert set(old.ropes) == {Rope(5e5, "linear", 2.0)}
        old = read(family, rope_theta=5e5, rope_scaling=LLAMA3)
        assert old == read(family, rope_parameters={**LLAMA3, "rope_theta": 5e5})
        assert set(old.ropes) == {Rope(5e5, "llama3", 8.0, 1.0, 4.0, 512)}
    old = read("gemma3", rope_theta=1e6, rope_local_base_freq=2e4, rope_scaling={"rope_type": "linear", "factor": 8.0})
    new = read(
        "gemma3",
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    )
    assert old == new
    assert set(read("gemma3", num_hidden_layers=6).ropes) == {Rope(1e4), Rope(1e6)}


@pytest.mark.parametrize(
    "entry",
    [
        {"rope_type": "default", "rope_theta": 12345.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {**LLAMA3, "rope_theta": 500000.0},
    ],
)
@pytest.mark.parametrize("head_dim", [2, 64, 128])
def test_frequencies_are_those_of_transformers(entry: dict[str, Any], head_dim: int) -> None:
    pytest.importorskip("torch", reason="the oracle needs torch (make env installs it)")
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers (make env installs it)")
    theirs = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=dict(entry)
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    ours = read("llama", head_dim=head_dim, rope_parameters=entry).ropes[0].inverse_frequencies(head_dim)
    np.testing.assert_allclose(ours, rotary.inv_freq.numpy(), rtol=1e-6)  # a few roundings of float32


def test_gguf_ropes() -> None:
    assert set(gguf("llama").ropes) == {Rope(10000.0)}
    assert set(gguf("llama", rope__freq_base=5e5).ropes) == {Rope(5e5)}
    assert set(gguf("qwen2", rope__scaling__type="linear", rope__scaling__factor=4.0).ropes) == {
        Rope(1e4, "linear", 4.0)
    }
    assert set(gguf("qwen2", rope__scaling__factor=4.0).ropes) == {Rope(1e4, "linear", 4.0)}
    assert set(gguf("qwen3", rope__scaling__type="none", rope__scaling__factor=4.0).ropes) == {Rope(1e4)}
    assert set(gguf("qwen3", rope__scaling__type="linear", rope__scaling__factor=0.0).ropes) == {Rope(1e4)}
    c = gguf("gemma3", block_count=6, rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert c.ropes == (Rope(1e4),) * 5 + (Rope(1e6, "linear", 8.0),)
    assert c.windows == (512,) * 5 + (0,)


def test_gemma_scales_its_scores_by_the_head_size_except_in_the_27b() -> None:
    assert gguf("gemma3").scale == 1 / math.sqrt(16)
    assert gguf("gemma3", block_count=62, attention__key_length=128, attention__value_length=128).scale == 1 / 4
    assert read("gemma3", query_pre_attn_scalar=168).scale == 1 / math.sqrt(168)


# ---------------------------------------------------------------- writing


ROUND_TRIPS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *((family, {"tie_word_embeddings": tied}) for family in FAMILIES for tied in (True, False)),
    *((family, {"head_dim": 48, "num_key_value_heads": 1}) for family in FAMILIES),
    *((f, {"rope_theta": 5e5, "rope_scaling": LLAMA3}) for f in FAMILIES),
    *((f, {"rope_scaling": {"type": "linear", "factor": 2.5}}) for f in FAMILIES),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "default", "frequency_divisors": [1.0] * 7 + [8.5]}}),
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"sliding_window": None}),
    *((f, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}) for f in ("qwen2", "qwen3")),
    *((f, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}) for f in ("qwen2", "qwen3")),
    ("qwen3", {"attention_bias": True}),
    ("gemma3", {"attention_bias": True, "query_pre_attn_scalar": 168, "num_hidden_layers": 13}),
    ("gemma3", {"sliding_window": 11, "num_hidden_layers": 12, "rope_local_base_freq": 123.5, "rope_theta": 7e5}),
    ("gemma3", {"layer_types": ["full_attention"] * 4}),
    ("gemma3", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 3}),
]


@pytest.mark.parametrize(("family", "changes"), ROUND_TRIPS, ids=lambda value: str(value)[:60])
def test_a_written_config_reads_back_equal(family: str, changes: dict[str, Any]) -> None:
    config = read(family, **changes)
    text = json.dumps(to_hf(config))
    found = by_hf(json.loads(text), "config.json")
    assert found.name == family
    assert found.from_hf(Fields(json.loads(text), "config.json"), found.name) == config
    assert to_hf(config)["model_type"] == HF[family]["model_type"]


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention__sliding_window": 128}),  # Mistral under its GGUF name
        ("qwen2", {}),
        ("qwen3", {"attention__key_length": 32, "attention__value_length": 32}),
        ("gemma3", {"block_count": 18}),
        ("gemma3", {"block_count": 62}),
    ],
)
def test_a_gguf_config_can_be_written_as_a_folder(arch: str, changes: dict[str, Any]) -> None:
    config = gguf(arch, **changes)
    data = json.loads(json.dumps(to_hf(config)))
    found = by_hf(data, "config.json")
    assert found.from_hf(Fields(data, "config.json"), found.name) == config


STANDARD = [(family, changes) for family, changes in ROUND_TRIPS if "frequency_divisors" not in str(changes)]


@pytest.mark.parametrize(("family", "changes"), STANDARD, ids=lambda value: str(value)[:60])
def test_transformers_reads_what_is_written(family: str, changes: dict[str, Any]) -> None:
    pytest.importorskip("torch", reason="the oracle needs torch (make env installs it)")
    transformers = pytest.importorskip("transformers", reason="the oracle needs transformers (make env installs it)")
    data = to_hf(read(family, **changes))
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(data)))
    for key, value in data.items():
        if key not in ("architectures", "model_type"):
            assert getattr(theirs, key) == value, key


def test_what_a_config_cannot_say_is_not_written() -> None:
    config = read("llama")
    for wrong in (
        Config(**{**vars(config), "windows": (16,) * 4}),
        Config(**{**vars(config), "biased": frozenset("qkv")}),
        Config(**{**vars(config), "ropes": (Rope(1e4), Rope(1e5)) * 2}),
    ):
        assert "'llama'" in refused(UnsupportedError, to_hf, wrong)


def test_every_family_is_tested() -> None:
    assert sorted(BY_NAME()) == FAMILIES
