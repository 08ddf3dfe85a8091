"""Damaged models through the command line: one sentence that names what is wrong, and no folder comes of them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from program import gossamer, refused
from safetensors.numpy import load_file, save_file
from tiny_gguf import Entry, patch

from gossamer.checkpoints.gguf import GGUFFile
from gossamer.cli.main import main

HUGE = 1 << 60


def never_compressed(model: Path, place: Path) -> str:
    """Why the model cannot be compressed; no folder may come of it."""
    sentence = refused("compress", model, "-o", place / "new" / "out", "--format", "int4/g32", "--json")
    assert not (place / "new").exists()
    return sentence


# ---------------------------------------------------------------- damaged GGUF files


def end_of_header(path: Path) -> int:
    return min(t.offset for t in GGUFFile(path).tensors.values())


@pytest.mark.parametrize("place", ["magic", "version", "keys", "vocabulary", "tensors", "data", "last byte"])
def test_a_cut_file(tiny: Path, tmp_path: Path, place: str) -> None:
    data = tiny.read_bytes()
    at = {
        "magic": 3,
        "version": 6,
        "keys": 60,
        "vocabulary": data.index(b"tokenizer.ggml.tokens") + 900,
        "tensors": data.index(b"blk.1.attn_v.weight") + 8,
        "data": end_of_header(tiny) + 5000,
        "last byte": len(data) - 1,
    }[place]
    model = tmp_path / "cut.gguf"
    model.write_bytes(data[:at])
    sentence = never_compressed(model, tmp_path)
    assert "cut.gguf" in sentence
    assert ("not a GGUF file" if place == "magic" else "fetch it again") in sentence


Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "magic": (lambda d: b"GGML" + d[4:], "not a GGUF file"),
    "version": (lambda d: patch(d, 4, "I", 99), "version 99"),
    "byte order": (lambda d: patch(d, 4, "I", 3 << 24), "big-endian"),
    "tensors": (lambda d: patch(d, 8, "Q", HUGE), f"{HUGE} tensors"),
    "keys": (lambda d: patch(d, 16, "Q", HUGE), f"{HUGE} keys"),
    "a key's length": (lambda d: patch(d, 24, "Q", HUGE), f"{HUGE} bytes of text"),
    "tensor type": (lambda d: patch(d, Entry(d, "blk.0.attn_q.weight").type, "I", 200), "type number 200"),
    "a tensor's size": (lambda d: patch(d, Entry(d, "blk.0.attn_q.weight").dims, "Q", HUGE), "blk.0.attn_q.weight"),
    "a tensor's shape": (lambda d: patch(d, Entry(d, "blk.0.attn_k.weight").dims + 8, "Q", 16), "blk.0.attn_k.weight"),
    "an offset": (lambda d: patch(d, Entry(d, "output_norm.weight").offset, "Q", HUGE), "output_norm.weight"),
    "overlap": (lambda d: patch(d, Entry(d, "output_norm.weight").offset, "Q", 0), "overlap"),
    "a name": (lambda d: d.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"), "blk.1.ffn_"),
    "a name that steers": (lambda d: d.replace(b"blk.1.ffn_up.weight", b"blk.1.\x1b[31m\nweigh"), "blk.1."),
    "layers": (lambda d: field(d, "llama.block_count", 77), "blk.2."),
    "no layers": (lambda d: field(d, "llama.block_count", 0), "layers = 0"),
    "width": (lambda d: field(d, "llama.embedding_length", 1 << 31), "hidden = 2147483648"),
    "heads": (lambda d: field(d, "llama.attention.head_count_kv", 5), "5 key-value heads"),
    "a missing key": (lambda d: d.replace(b"llama.feed_forward_length", b"llama.feed_forward_lengtj"), "feed_forward"),
    "vocabulary kind": (lambda d: d.replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert"), "bert"),
    "pre-tokenizer": (lambda d: d.replace(b"\x06\0\0\0\0\0\0\0smollm", b"\x06\0\0\0\0\0\0\0sm0llm"), "sm0llm"),
    "end token": (lambda d: field(d, "tokenizer.ggml.eos_token_id", 1 << 20), "1048576"),
}


def field(data: bytes, key: str, value: int) -> bytes:
    """The file with another value of a 32-bit key."""
    at = data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key)
    assert struct.unpack_from("<I", data, at) in [(4,), (5,)]
    return patch(data, at + 4, "I", value)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_header(tiny: Path, tmp_path: Path, name: str) -> None:
    damage, needle = DAMAGES[name]
    data = tiny.read_bytes()
    model = tmp_path / "bad.gguf"
    model.write_bytes(damage(data))
    assert model.read_bytes() != data
    sentence = never_compressed(model, tmp_path)
    assert needle in sentence
    assert "bad.gguf" in sentence


def test_scales_that_are_no_numbers(tiny: Path, tmp_path: Path) -> None:
    data = bytearray(tiny.read_bytes())
    at = GGUFFile(tiny).tensors["blk.0.ffn_down.weight"].offset
    data[at : at + 2] = b"\x00\x7e"  # the first scale, a float16
    model = tmp_path / "bad.gguf"
    model.write_bytes(data)
    assert "NaN or an infinity" in never_compressed(model, tmp_path)
    assert "bad.gguf: " in gossamer("run", model, "-p", "hi").err
    assert gossamer("run", model, "-p", "hi").code == 2


def test_random_damage_never_breaks_the_program(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some damage is no damage (a weight, a name in the metadata); the rest is refused in one line."""
    data, header, chance = tiny.read_bytes(), end_of_header(tiny), random.Random(0)
    model, codes = tmp_path / "bad.gguf", []
    for _ in range(150):
        bad = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(header if chance.random() < 0.9 else len(data))
            bad[at] = chance.randrange(256)
        model.write_bytes(bad[: chance.randrange(len(bad))] if chance.random() < 0.1 else bad)
        out = tmp_path / "out"
        codes.append(main(["compress", str(model), "-o", str(out), "--format", "int8/g32", "--json"]))
        said = capsys.readouterr()
        if codes[-1] == 0:
            codes[-1] = main(["run", str(out), "--raw", "-p", "the in", "--max-tokens", "2"])
            assert codes[-1] in (0, 2), capsys.readouterr().err
            capsys.readouterr()
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
        else:
            assert codes[-1] == 2
            assert (said.out, said.err.count("\n"), said.err[:10]) == ("", 1, "gossamer: "), said.err
        assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]
    assert 30 < codes.count(2) < 150


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound Hugging Face folder of a small Llama, with the smallest tokenizer there is."""
    path = tmp_path / "hf"
    path.mkdir()
    chance, width, ffn, vocab = np.random.default_rng(0), 32, 48, 64
    shapes = {"model.embed_tokens": (vocab, width), "model.norm": (width,)}
    layer = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width, width), "self_attn.v_proj": (width, width)}
    layer |= {"self_attn.o_proj": (width, width), "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width)}
    layer |= {"mlp.down_proj": (width, ffn), "input_layernorm": (width,), "post_attention_layernorm": (width,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    weights = {f"{name}.weight": chance.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, path / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": width}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": ffn, "rms_norm_eps": 1e-5}
    config |= {"max_position_embeddings": 128, "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    model = {"type": "BPE", "vocab": {chr(65 + i): i for i in range(vocab)}, "merges": []}
    (path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    return path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_sound_folder(folder: Path, tmp_path: Path) -> None:
    assert gossamer("compress", folder, "-o", tmp_path / "out", "--format", "int4/g32").code == 0
    assert gossamer("run", tmp_path / "out", "--raw", "-p", "ABC", "--max-tokens", "3").code == 0


def test_weights_that_are_no_numbers(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, value in (("model.layers.1.mlp.up_proj.weight", np.nan), ("model.norm.weight", np.inf)):
        bad = {**weights, name: weights[name].copy()}
        bad[name].flat[-1] = value
        save_file(bad, folder / "model.safetensors")
        sentence = never_compressed(folder, tmp_path)
        assert name.removesuffix(".weight") in sentence
        assert "NaN or an infinity" in sentence
        assert "NaN or an infinity" in refused("eval", folder, "--window", "64", "--json")


def test_a_missing_shard(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: weights[n] for n in part}, folder / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert gossamer("inspect", folder).code == 0
    (folder / "model-00002-of-00002.safetensors").unlink()
    sentence = never_compressed(folder, tmp_path)
    assert "lacks the shard 'model-00002-of-00002.safetensors'" in sentence
    assert "fetch that file" in sentence


def test_damaged_files_of_a_folder(folder: Path, tmp_path: Path) -> None:
    sound = {f.name: f.read_bytes() for f in folder.iterdir()}
    weights = sound["model.safetensors"]
    cases: list[tuple[str, bytes | None, str]] = [
        ("model.safetensors", weights[:5], "model.safetensors"),
        ("model.safetensors", weights[:500], "model.safetensors"),
        ("model.safetensors", weights[:-1], "model.safetensors"),
        ("model.safetensors", b"", "has only 0 bytes"),
        ("model.safetensors", struct.pack("<Q", HUGE) + weights[8:], "model.safetensors"),
        ("model.safetensors", weights.replace(b'"F32"', b'"F99"'), "F99"),
        ("model.safetensors", weights.replace(b'"F32"', b'"I32"'), "I32"),
        ("model.safetensors", None, "has neither model.safetensors nor model.safetensors.index.json"),
        ("config.json", None, "has no config.json"),
        ("config.json", b"", "config.json"),
        ("config.json", b"{'a': 1}", "config.json, line 1, column 2"),
        ("config.json", b"[]", "config.json should hold an object"),
        ("config.json", b"\xff" + sound["config.json"], "not UTF-8"),
        ("tokenizer.json", None, "there is no tokenizer.json"),
        ("tokenizer.json", b"{}", "tokenizer.json"),
    ]
    for file, content, needle in cases:
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content)
        assert needle in never_compressed(folder, tmp_path), (file, content and content[:40])
        (folder / file).write_bytes(sound[file])


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "MambaForCausalLM"),
        ({"num_hidden_layers": 3}, "model.layers.2."),
        ({"num_hidden_layers": 1}, "model.layers.1."),
        ({"hidden_size": 40}, "[64, 40]"),
        ({"hidden_size": "wide"}, "'wide'"),
        ({"num_attention_heads": 0}, "heads = 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"hidden_act": "tanh"}, "'tanh'"),
        ({"quantization_config": {"quant_method": "hqq"}}, "'hqq'"),
    ],
)
def test_configurations_that_cannot_be(folder: Path, tmp_path: Path, changes: dict[str, Any], needle: str) -> None:
    edit(folder / "config.json", **changes)
    sentence = never_compressed(folder, tmp_path)
    assert needle in sentence
    assert "hf" in sentence


def test_a_damaged_folder_of_ours(tiny: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    assert gossamer("compress", tiny, "-o", ours, "--format", "int4/g32").code == 0
    ledger = json.loads((ours / "gossamer.json").read_text())
    name = "model.layers.0.mlp.up_proj"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layout": 99}, "layout version 99"),
        ({"formats": {}}, "gives no format for the site"),
        ({"formats": {**ledger["formats"], name: "int5/q32"}}, f"'{name}': in format 'int5/q32'"),
        ({"formats": {**ledger["formats"], name: "int8/g32"}}, f"{name}."),
    ]
    for changes, needle in cases:
        edit(ours / "gossamer.json", **changes)
        assert needle in refused("run", ours, "-p", "hi")
        (ours / "gossamer.json").write_text(json.dumps(ledger))
    strange = {**ledger, "cost": {"data_bytes": float("nan")}}
    (ours / "gossamer.json").write_text(json.dumps(strange))
    done = gossamer("inspect", ours, "--json")  # a note that is no number is none
    assert (done.code, done.json["provenance"]["cost"]) == (0, {"data_bytes": None})


def test_an_unknown_gguf_architecture(tmp_path: Path) -> None:
    model = tiny_gguf.write(tmp_path / "odd.gguf", arch="mamba9")
    sentence = never_compressed(model, tmp_path)
    assert "odd.gguf has the architecture 'mamba9', which is not supported; supported are " in sentence
