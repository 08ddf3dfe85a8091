"""Configurations that cannot be right: one sentence each, and nothing is allocated from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from configs import FAMILIES, HF, LLAMA3, SIZES, gguf, read, refused

from gossamer.errors import CheckpointError, UnsupportedError
from gossamer.models.config import Config
from gossamer.models.family import by_gguf, by_hf

REQUIRED = [k for k in SIZES if k not in ("num_key_value_heads", "rms_norm_eps")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_entry_is_named(family: str, key: str) -> None:
    assert f"'{key}'" in refused(CheckpointError, read, family, **{key: ...})
    assert f"'{key}'" in refused(CheckpointError, read, family, **{key: None})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", SIZES)
def test_a_wrong_type_is_named(family: str, key: str) -> None:
    for value in ("64", [64], {"a": 1}, True, math.nan, "x" * 10000, "a\nb"):
        message = refused(CheckpointError, read, family, **{key: value})
        assert f"'{key}'" in message
        assert "config.json" in message


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", [k for k in SIZES if k != "rms_norm_eps"])
def test_sizes_that_no_model_has(family: str, key: str) -> None:
    for value in (0, -1, -(1 << 70), 1 << 29, 1 << 62, 10**400):
        message = refused(CheckpointError, read, family, **{key: value, "head_dim": 16})
        assert "config.json" in message


def test_many_layers_are_refused_before_they_are_listed() -> None:
    for family in FAMILIES:
        refused(CheckpointError, read, family, num_hidden_layers=5000)
    assert read("llama", num_hidden_layers=4096).layers == 4096


@pytest.mark.parametrize("value", [math.inf, -math.inf, -1e-5, 10**400])
def test_norm_epsilon(value: float) -> None:
    refused(CheckpointError, read, "llama", rms_norm_eps=value)


def test_heads() -> None:
    assert "4 heads" in refused(CheckpointError, read, "llama", num_key_value_heads=3)
    assert "15 elements" in refused(UnsupportedError, read, "llama", head_dim=15)
    assert "'head_dim'" in refused(CheckpointError, read, "qwen3", head_dim="128")


@pytest.mark.parametrize(
    "data",
    [
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        {"architectures": "GPT2LMHeadModel"},
        {"model_type": "gpt2"},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": [{}], "model_type": "llama"},
        {"architectures": {"a": 1}},
        {"model_type": ["llama"]},
        {"architectures": 7},
        {"architectures": ["A\nB" * 1000]},
        {},
    ],
)
def test_an_unknown_architecture_lists_what_is_supported(data: dict[str, Any]) -> None:
    message = refused(UnsupportedError, by_hf, data, "config.json")
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"):
        assert name in message


def test_an_architecture_is_found_by_either_entry() -> None:
    for family, entry in HF.items():
        assert by_hf(entry, "").name == family
        assert by_hf({"model_type": entry["model_type"]}, "").name == family
        assert by_hf({"architectures": entry["architectures"][0]}, "").name == family


@pytest.mark.parametrize("name", ["gpt2", None, 7, ["llama"], np.array([1, 2]), "llama\n" * 100])
def test_an_unknown_gguf_architecture_lists_what_is_supported(name: Any) -> None:
    message = refused(UnsupportedError, by_gguf, name, "m.gguf")
    assert all(known in message for known in ("llama", "qwen2", "qwen3", "gemma3"))


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "yarn"),
        ({"type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear", "factor": -2.0}, "factor"),
        ({"rope_type": "linear", "factor": math.inf}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": ["linear"]}, "rope_type"),
        ({"rope_type": "default", "rope_theta": 0.0}, "rope_theta"),
        ({"rope_type": "default", "rope_theta": math.nan}, "rope_theta"),
        ({"rope_type": "default", "rope_theta": 10**400}, "rope_theta"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor"),
        ({**LLAMA3, "high_freq_factor": -1.0}, "high_freq_factor"),
        ({**LLAMA3, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({**LLAMA3, "original_max_position_embeddings": 8192.5}, "original_max_position_embeddings"),
        ({"rope_type": "default", "frequency_divisors": [1.0, 0.0]}, "frequency_divisors"),
        ({"rope_type": "default", "frequency_divisors": [1.0, math.inf]}, "frequency_divisors"),
        ({"rope_type": "default", "frequency_divisors": ["a"]}, "frequency_divisors"),
        ({"rope_type": "default", "frequency_divisors": [1.0]}, "divisors"),
    ],
)
@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_rope_entries_that_cannot_be(entry: dict[str, Any], word: str, style: str) -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        assert word in refused(CheckpointError, read, family, **{style: entry})
    nested = entry if style == "rope_scaling" else {"full_attention": entry}
    assert word in refused(CheckpointError, read, "gemma3", num_hidden_layers=6, head_dim=16, **{style: nested})


def test_rope_entries_of_another_shape() -> None:
    for family in FAMILIES:
        assert "rope_theta" in refused(CheckpointError, read, family, rope_theta=-1)
        assert "rope_theta" in refused(CheckpointError, read, family, rope_theta="1e4")
        for style in ("rope_scaling", "rope_parameters"):
            assert style in refused(CheckpointError, read, family, **{style: ["linear"]})
    refused(UnsupportedError, read, "llama", partial_rotary_factor=0.25)
    nested = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    refused(UnsupportedError, read, "qwen3", rope_parameters=nested)
    refused(CheckpointError, read, "gemma3", rope_parameters={"full_attention": "default"})
    refused(CheckpointError, read, "gemma3", rope_parameters={"rope_type": "linear", "factor": 8.0})


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize(
    "kinds",
    [
        ["full_attention"] * 3,
        ["full_attention"] * 5,
        [],
        ["full_attention"] * 3 + ["linear_attention"],
        ["full_attention"] * 3 + [[]],
        "full_attention",
        7,
    ],
)
def test_layer_types_that_do_not_fit(family: str, kinds: Any) -> None:
    refused(CheckpointError, read, family, layer_types=kinds)


def test_windows_that_cannot_be() -> None:
    for window in (0, -1, 1 << 40, "512", 1.5):
        for family, more in (
            ("mistral", {}),
            ("gemma3", {}),
            ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
        ):
            assert "'sliding_window'" in refused(CheckpointError, read, family, sliding_window=window, **more)
    mixed = ["sliding_attention"] * 4
    assert "use_sliding_window" in refused(CheckpointError, read, "qwen3", layer_types=mixed, sliding_window=16)
    assert "use_sliding_window" in refused(CheckpointError, read, "qwen3", use_sliding_window="yes")
    refused(CheckpointError, read, "gemma3", sliding_window_pattern=0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("mistral", {"hidden_act": ["silu"]}),
        ("qwen2", {"hidden_act": "relu"}),
        ("gemma3", {"hidden_activation": "gelu"}),
        ("gemma3", {"attn_logit_softcapping": 50.0}),
        ("gemma3", {"final_logit_softcapping": 30.0}),
        ("gemma3", {"use_bidirectional_attention": True}),
        ("gemma3", {"query_pre_attn_scalar": 0}),
        ("gemma3", {"query_pre_attn_scalar": -4}),
        ("llama", {"tie_word_embeddings": "true"}),
        ("llama", {"attention_bias": 1}),
    ],
)
def test_what_the_code_does_not_do_is_refused(family: str, changes: dict[str, Any]) -> None:
    (key,) = changes
    assert f"'{key}'" in refused(CheckpointError, read, family, **changes)


@pytest.mark.parametrize(
    ("arch", "changes", "word"),
    [
        ("llama", {"context_length": ...}, "llama.context_length"),
        ("llama", {"attention__layer_norm_rms_epsilon": ...}, "llama.attention.layer_norm_rms_epsilon"),
        ("qwen2", {"block_count": "4"}, "qwen2.block_count"),
        ("llama", {"block_count": 1 << 40}, "layers"),
        ("llama", {"attention__head_count": 0}, "heads"),
        ("llama", {"attention__head_count_kv": 3}, "heads"),
        ("llama", {"attention__head_count_kv": np.array([2, 2])}, "attention.head_count_kv"),
        ("llama", {"attention__key_length": 15, "attention__value_length": 15}, "15"),
        ("llama", {"attention__value_length": 8}, "value heads"),
        ("llama", {"rope__dimension_count": 8}, "rotates"),
        ("llama", {"expert_count": 8}, "llama.expert_count"),
        ("llama", {"expert_count": np.array([8, 8])}, "llama.expert_count"),
        ("llama", {"rope__scaling__type": "yarn"}, "yarn"),
        ("llama", {"rope__scaling__type": 3}, "rope.scaling.type"),
        ("llama", {"rope__scaling__factor": -1.0}, "rope.scaling.factor"),
        ("llama", {"rope__scale_linear": 4.0}, "rope.scale_linear"),
        ("llama", {"rope__freq_base": 0.0}, "rope.freq_base"),
        ("llama", {"attention__sliding_window": -5}, "sliding_window"),
        ("qwen2", {"attention__sliding_window": 128}, "sliding_window"),
        ("gemma3", {"attention__sliding_window": ...}, "sliding_window"),
        ("gemma3", {"rope__scaling__type": "yarn", "rope__scaling__factor": 8.0}, "yarn"),
        ("llama", {"vocab_size": ...}, "vocab_size"),
    ],
)
def test_gguf_metadata_that_cannot_be(arch: str, changes: dict[str, Any], word: str) -> None:
    message = refused(CheckpointError, gguf, arch, **changes)
    assert word in message
    assert "m.gguf" in message


def test_a_config_keeps_its_promises_however_it_is_made() -> None:
    good = vars(read("llama"))
    for change in ({"layers": 5}, {"windows": ()}, {"heads": 0}, {"head_dim": 7}, {"norm_eps": math.nan}):
        refused(CheckpointError, Config, **{**good, **change})
