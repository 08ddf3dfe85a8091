"""What ``compress`` writes: the same model bit for bit, in files that others read, of exactly the size it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import tiny_gguf
import tiny_models
from folders import contents
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from gossamer import LLM, ops
from gossamer.checkpoints.safetensors import SafetensorsFile
from gossamer.compress.job import Written, compress
from gossamer.compress.preflight import Prediction
from gossamer.compress.recipe import of_format
from gossamer.compress.watch import Watch
from gossamer.engine.llm import chooser
from gossamer.errors import UnsupportedError, UsageError
from gossamer.formats import parse
from gossamer.models.checkpoint import Checkpoint, open_checkpoint

Keep = Sequence[tuple[str, str]]

MIXED: Keep = (
    ("embed", "int8/g32"),
    ("*.0.self_attn.*", "uint5/row"),
    ("down", "bf16"),
    ("*.1.mlp.up_proj", "f32 @ f32"),
    ("up", "uint4/g64-m(f16)"),
)
HF = {t.name: t for t in tiny_models.TINY}
NAMES = (
    "Llama, biases",
    "Llama 3.1 RoPE scaling",
    "Mistral, window of 31",
    "Qwen2",
    "Qwen2, window of 40 from layer 2 on",
    "Qwen3",
    "Gemma 3, window of 24, linear RoPE scaling",
)


def write(source: Path | Checkpoint, out: Path, fmt: str = "int4/g32 @ int8/token", keep: Keep = MIXED) -> Written:
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    return compress(checkpoint, out, of_format(fmt), keep=keep)


class Refusing(Watch):
    """The work must not begin."""

    def predicted(self, prediction: Prediction) -> None:
        raise AssertionError("the work began")


def check_size(done: Written) -> None:
    """The promise of the size: bits_per_weight is 8 x the data section / parameters, exactly."""
    checkpoint = open_checkpoint(done.path)
    file = SafetensorsFile(done.path / "model.safetensors")
    header = 8 + int.from_bytes((done.path / "model.safetensors").read_bytes()[:8], "little")
    assert done.data_bytes == file.data_bytes == checkpoint.data_bytes
    assert done.data_bytes == (done.path / "model.safetensors").stat().st_size - header
    assert done.bits_per_weight == 8 * done.data_bytes / checkpoint.topology.parameters
    assert done.folder_bytes == sum(f.stat().st_size for f in done.path.iterdir())
    ledger = json.loads((done.path / "gossamer.json").read_text())
    assert ledger["cost"] == {"data_bytes": done.data_bytes, "bits_per_weight": done.bits_per_weight}


def check_logits(source: Path | Checkpoint, done: Written, fmt: str, keep: Keep, tokens: Sequence[int]) -> LLM:
    """The written folder, loaded."""
    in_memory, written = LLM(source, format=fmt, keep=keep), LLM(done.path)
    assert written.loaded.formats == in_memory.loaded.formats
    assert written.loaded.data_bytes == in_memory.loaded.data_bytes == done.data_bytes
    assert np.array_equal(written.logits(tokens), in_memory.logits(tokens))
    return written


def folder(tmp: Path, name: str, **options: Any) -> Path:
    return tiny_models.write_folder(HF[name].model(), tmp / "hf", **options)


# ---------------------------------------------------------------- every kind of source


def test_a_gguf_file(tiny: Path, tmp_path: Path) -> None:
    done = write(tiny, tmp_path / "out")
    check_size(done)
    check_logits(tiny, done, "int4/g32 @ int8/token", MIXED, range(200))


@pytest.mark.parametrize("name", NAMES)
def test_a_hugging_face_folder(name: str, tmp_path: Path) -> None:
    source = folder(tmp_path, name)
    done = write(source, tmp_path / "out")
    check_size(done)
    check_logits(source, done, "int4/g32 @ int8/token", MIXED, range(200))
    theirs, ours = AutoConfig.from_pretrained(source), AutoConfig.from_pretrained(done.path)
    assert type(ours) is type(theirs)
    what = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    what += ["vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"]
    what += ["head_dim", "attention_bias", "mlp_bias", "layer_types", "sliding_window", "query_pre_attn_scalar"]
    for key in what:
        if key == "head_dim" and getattr(theirs, key, None) is None:
            continue  # theirs leaves it to hidden / heads, ours says it
        assert getattr(ours, key, None) == getattr(theirs, key, None), key


def test_biases_and_gains_are_kept_as_they_are(tmp_path: Path) -> None:
    source = folder(tmp_path, "Qwen2")
    done = write(source, tmp_path / "out")
    with safetensors.safe_open(source / "model.safetensors", "numpy") as theirs:
        names = [n for n in theirs.keys() if n.endswith((".bias", "norm.weight"))]  # noqa: SIM118 - not a dictionary
        assert sum(n.endswith(".bias") for n in names) == 3 * 4
        with safetensors.safe_open(done.path / "model.safetensors", "numpy") as ours:
            for name in names:
                assert np.array_equal(ours.get_tensor(name), theirs.get_tensor(name)), name


def test_a_folder_of_several_shards(tmp_path: Path) -> None:
    source = folder(tmp_path, "Qwen3", max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    done = write(source, tmp_path / "out", keep=())
    assert [f.name for f in done.path.glob("*.safetensors")] == ["model.safetensors"]
    check_logits(source, done, "int4/g32 @ int8/token", (), range(100))


def test_a_folder_of_ours_again(tiny: Path, tmp_path: Path) -> None:
    first = write(tiny, tmp_path / "first", "int8/g32", ())
    second = write(first.path, tmp_path / "second", "int4/g64", (("embed", "int8/g32"),))
    check_size(second)
    check_logits(first.path, second, "int4/g64", (("embed", "int8/g32"),), range(200))
    source = json.loads((second.path / "gossamer.json").read_text())["source"]
    assert source["kind"] == "gossamer"
    assert source["recipe"]["formats"] == {"*": "int8/g32"}
    assert "sites" not in source
    assert source["source"]["general.name"] == "tiny"


def test_the_same_formats_again_are_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    first = write(tiny, tmp_path / "first")
    second = write(first.path, tmp_path / "second")
    assert (first.path / "model.safetensors").read_bytes() == (second.path / "model.safetensors").read_bytes()


def test_bytes_do_not_depend_on_the_threads(tiny: Path, tmp_path: Path) -> None:
    before = ops.threads()
    try:
        for threads in (1, 3):
            ops.set_threads(threads)
            write(tiny, tmp_path / str(threads))
    finally:
        ops.set_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


# ---------------------------------------------------------------- what others read


def test_the_real_model(smollm2_gguf: Path, tmp_path: Path) -> None:
    keep = (("embed", "int8/g32"), ("*.layers.2?.mlp.down_proj", "int8/row"))
    checkpoint = open_checkpoint(smollm2_gguf)
    done = write(checkpoint, tmp_path / "out", "int4/g64", keep)
    check_size(done)
    text = "The quick brown fox jumps over 13 lazy dogs.\n\tSchöne Grüße 🙂 def f(x): return x**2"
    tokens = checkpoint.tokenizer().encode(text)
    llm = check_logits(checkpoint, done, "int4/g64", keep, tokens)
    config = AutoConfig.from_pretrained(done.path)
    assert (config.model_type, config.hidden_size, config.tie_word_embeddings) == ("llama", 576, True)
    tokenizer = AutoTokenizer.from_pretrained(done.path)
    assert tokenizer(text).input_ids == tokens
    assert tokenizer.decode(tokens) == text
    messages = [{"role": "user", "content": "Hello"}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert llm.chat_tokens(messages) == tokenizer(theirs, add_special_tokens=False).input_ids
    assert GenerationConfig.from_pretrained(done.path).eos_token_id == list(llm.tokenizer.eos_ids)


def test_the_second_real_model(gemma3_gguf: Path, tmp_path: Path) -> None:
    keep = (("embed", "int8/g32"),)
    checkpoint = open_checkpoint(gemma3_gguf)
    done = write(checkpoint, tmp_path / "out", "int4/g32", keep)
    check_size(done)
    text = "La souris    mange 12 fromages; 東京 🙂"
    tokens = checkpoint.tokenizer().encode(text)
    check_logits(checkpoint, done, "int4/g32", keep, tokens)
    config = AutoConfig.from_pretrained(done.path)
    assert (config.model_type, config.sliding_window) == ("gemma3_text", 512)
    assert config.layer_types.count("full_attention") == 3
    assert AutoTokenizer.from_pretrained(done.path)(text).input_ids == tokens


def test_suggested_sampling_is_kept(tmp_path: Path) -> None:
    source = folder(tmp_path, "Llama, tied table")
    suggestion = {"do_sample": True, "temperature": 0.7, "top_p": 0.8}
    (source / "generation_config.json").write_text(json.dumps(suggestion))
    done = write(source, tmp_path / "out")
    assert json.loads((done.path / "generation_config.json").read_text()) == suggestion
    assert open_checkpoint(done.path).generation() == suggestion


# ---------------------------------------------------------------- which site gets which format


def formats(source: Path, fmt: str | None, keep: Keep) -> dict[str, str]:
    checkpoint = open_checkpoint(source)
    choose = chooser(parse(fmt) if fmt else None, [(p, parse(f)) for p, f in keep], checkpoint.topology)
    return {site.name: str(choose(site)) for site in checkpoint.topology.sites}


def test_patterns_are_roles_or_names_and_the_first_counts(tiny: Path) -> None:
    rules = [("embed", "int8/g32"), ("*.1.mlp.*", "bf16"), ("down", "f16"), ("*self_attn.[qk]_proj", "uint5/row")]
    chosen = formats(tiny, "int4/g32", rules)
    assert chosen["model.embed_tokens"] == "int8/g32"
    assert chosen["model.layers.0.mlp.down_proj"] == "f16"
    assert chosen["model.layers.1.mlp.down_proj"] == "bf16"
    assert {chosen[f"model.layers.{i}.self_attn.{p}_proj"] for i in (0, 1) for p in "qk"} == {"uint5/row"}
    assert {chosen[f"model.layers.{i}.self_attn.{p}_proj"] for i in (0, 1) for p in "vo"} == {"int4/g32"}
    assert chosen["model.layers.0.mlp.up_proj"] == "int4/g32"


@pytest.mark.parametrize("pattern", ["emebd", "model.layers.2.*", "DOWN", "lm_head", "q_proj"])
def test_a_pattern_that_matches_nothing_is_refused(tiny: Path, pattern: str) -> None:
    with pytest.raises(UsageError, match="matches no site; give a role \\(embed, q, k, v, o, gate, up, down\\)"):
        formats(tiny, "int4/g32", [("embed", "bf16"), (pattern, "bf16")])


def test_what_a_configuration_cannot_say_is_refused_before_any_work(tmp_path: Path) -> None:
    source = tiny_gguf.write(tmp_path / "odd.gguf", q_bias=True)
    checkpoint = open_checkpoint(source)
    with pytest.raises(UnsupportedError, match="cannot be written as a folder"):
        compress(checkpoint, tmp_path / "out", of_format(None), watch=Refusing())
    assert [f.name for f in tmp_path.iterdir()] == ["odd.gguf"]
