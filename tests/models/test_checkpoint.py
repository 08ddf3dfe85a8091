"""The three kinds of checkpoint: lossless import, sizes, memory while loading, and one sentence for what is wrong."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gossamer import LLM
from gossamer.checkpoints.gguf import LOSSLESS
from gossamer.compress.job import compress
from gossamer.compress.recipe import of_format
from gossamer.engine.llm import chooser
from gossamer.errors import CheckpointError, FormatError, GossamerError, UnsupportedError
from gossamer.formats import parse
from gossamer.formats.node import ROWS_PER_STEP
from gossamer.models.checkpoint import Checkpoint, open_checkpoint
from gossamer.models.load import Loaded, load, plan
from gossamer.models.topology import Site

tiny_models = pytest.importorskip("tiny_models", reason="the oracle needs torch and gguf (make env installs them)")


def fully(checkpoint: Checkpoint, expression: str | None = None) -> Loaded:
    fmt = parse(expression) if expression else None
    return load(checkpoint, plan(checkpoint, chooser(fmt, (), checkpoint.topology)).formats)


# ---------------------------------------------------------------- GGUF types, bit for bit


def _in_our_order(site: Site, checkpoint: Any, rows: np.ndarray) -> np.ndarray:
    """Rows of a GGUF file in the order of Hugging Face: in q and k of Llama the two halves of a head alternate."""
    if checkpoint.config.family != "llama" or site.role not in ("q", "k"):
        return rows
    head = checkpoint.config.head_dim
    return rows.reshape(-1, head // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _assert_lossless(checkpoint: Any, sites: list[Site]) -> set[str]:
    """Packed, decoded weights against the gguf package's own decoding; returns the types that were seen."""
    seen = set()
    for site in sites:
        name = checkpoint._name(site.name)
        kind = checkpoint.file.tensors[name].type
        theirs = gguf.quants.dequantize(checkpoint.file.raw(name), gguf.GGMLQuantizationType[kind])
        packed = checkpoint.pack(site)
        expected = _in_our_order(site, checkpoint, theirs)
        if kind not in LOSSLESS and kind != "F32":
            expected = expected.astype(np.float16).astype(np.float32)
        else:
            assert str(packed.format) == LOSSLESS.get(kind, "f32")
        assert packed.decode().tobytes() == expected.tobytes(), site.name
        source = checkpoint.source(site)
        assert source.read(0, site.rows).tobytes() == _in_our_order(site, checkpoint, theirs).tobytes()
        assert source.read(3, 21).tobytes() == _in_our_order(site, checkpoint, theirs)[3:21].tobytes()
        seen.add(kind)
    return seen


def _of_type(kind: str, arch: str, path: Path) -> Path:
    """A small model all of whose matrices have one type."""
    if kind == "NVFP4" and kind not in gguf.GGMLQuantizationType.__members__:
        pytest.skip("the installed gguf package does not know NVFP4")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = tiny_models.Tiny("types", arch.capitalize(), sizes).model()
    return tiny_models.write_gguf(model, arch, path / "m.gguf", kind)


@pytest.mark.parametrize("kind", [*LOSSLESS, "F32"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_every_lossless_type(kind: str, arch: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(_of_type(kind, arch, tmp_path))
    assert _assert_lossless(checkpoint, list(checkpoint.topology.sites)) == {kind}
    for tensor in checkpoint.tensors():
        if len(tensor.shape) == 2:
            assert tensor.type == kind
            assert tensor.runs_as == LOSSLESS.get(kind, "f32 @ f32")


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "NVFP4"])
def test_types_run_as_they_are(kind: str, tmp_path: Path) -> None:
    """The same logits as the decoded matrices, on inputs in float32; and no site is unfused with its own inputs."""
    path = _of_type(kind, "llama", tmp_path)
    exact, stored = LLM(path, format="f32 @ f32"), LLM(path, format=f"{LOSSLESS[kind]} @ f32")
    tokens = list(range(1, 120))
    want = exact.logits(tokens)

    def differs(got: np.ndarray) -> float:
        return float(np.sqrt(((got - want).astype(np.float64) ** 2).mean()) / want.std())

    assert want.std() > 0.05
    assert differs(stored.logits(tokens)) < 1e-3
    native = LLM(path)
    assert not native.loaded.unfused
    assert {leaf.path for name in native.loaded.formats for leaf in native.explain(name)} <= {"bf16", "f32"}
    assert native.loaded.weight_bytes < 0.35 * exact.loaded.weight_bytes
    assert differs(native.logits(tokens)) < 0.1


def test_the_real_smollm2_keeps_its_bits_and_its_size(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    sites = [s for s in checkpoint.topology.sites if s.layer in (None, 0, 17, 29)]
    assert _assert_lossless(checkpoint, sites) == {"Q4_1", "Q8_0"}
    loaded = fully(checkpoint)
    # Every row count is a multiple of 16 and every column count of 32: nothing is padded.
    assert loaded.data_bytes == checkpoint.data_bytes == 96_576_768
    assert loaded.topology.parameters == 134_515_008
    assert loaded.bits_per_weight == 8 * checkpoint.data_bytes / 134_515_008
    assert {str(f) for f in loaded.formats.values()} == {"uint4/g32-m(f16)", "int8/g32"}
    assert not loaded.unfused


def test_the_real_gemma_keeps_its_bits_and_its_size(gemma3_gguf: Path) -> None:
    checkpoint = open_checkpoint(gemma3_gguf)
    sites = [s for s in checkpoint.topology.sites if s.layer in (0, 1, 2, 17)]
    assert _assert_lossless(checkpoint, sites) == {"Q5_0", "Q8_0", "Q4_K", "Q6_K"}
    assert checkpoint.topology.parameters == 268_098_176
    llm = LLM(gemma3_gguf)
    assert llm.loaded.data_bytes == checkpoint.data_bytes == 246_587_904
    assert llm.loaded.bits_per_weight == 8 * checkpoint.data_bytes / 268_098_176
    assert not llm.loaded.unfused
    assert {str(f) for f in llm.loaded.formats.values()} == {LOSSLESS[k] for k in ("Q5_0", "Q8_0", "Q4_K", "Q6_K")}


@pytest.mark.slow
def test_the_real_gemma_runs_as_it_is(gemma3_gguf: Path) -> None:
    """In its own formats on float32 inputs: the logits of float32 matrices, which test_parity compares with others'."""
    exact = LLM(gemma3_gguf, format="f32 @ f32", kv="f32")
    sites = exact.checkpoint.topology.sites
    own = [(site.name, f"{exact.checkpoint.native(site).weight} @ f32") for site in sites]
    stored = LLM(exact.checkpoint, keep=own, kv="f32")
    tokens = exact.tokenizer.encode("The quick brown fox jumps over 13 lazy dogs. Schöne Grüße aus 東京 🙂") * 3
    for a, b in zip(exact.hidden(tokens, exact.new_sequence(100)), stored.hidden(tokens, stored.new_sequence(100))):
        want, got = exact.transformer.logits(a), stored.transformer.logits(b)
        assert want.std() > 1
        assert np.abs(want - got).max() < 2e-3
        assert np.array_equal(want.argmax(axis=1), got.argmax(axis=1))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("model", "expression"),
    [*(("smollm2_gguf", text) for text in (None, "f16 @ f32", "int4/g32", "int8/row")), ("gemma3_gguf", None)],
)
def test_loading_needs_little_more_than_the_model(
    model: str, expression: str | None, request: pytest.FixtureRequest
) -> None:
    """Beside the region of the final size: the largest layer, and a few blocks of 512 rows in float32. The region and
    the mapped file are not traced: they are pages of the system."""
    checkpoint = open_checkpoint(request.getfixturevalue(model))
    tracemalloc.start()
    try:
        loaded = fully(checkpoint, expression)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    layers: dict[int | None, int] = {}
    for site in loaded.topology.sites:
        layers[site.layer] = layers.get(site.layer, 0) + loaded.packed[site.name].nbytes
    beside = loaded.topology.vector_bytes + 0.01 * loaded.data_bytes + 1e6
    assert kept < beside
    rows = 4 * ROWS_PER_STEP * max(site.cols for site in loaded.topology.sites)
    assert peak < beside + max(layers.values()) + 4 * rows


@pytest.mark.parametrize("expression", ["int4/g32 + mask(1%: f16)", "cols(16: bf16, int4/row)"])
def test_formats_of_parts_need_one_matrix_in_float32(expression: str, smollm2_gguf: Path) -> None:
    """They are found from a whole matrix in memory and a few copies of it, never from more than one."""
    checkpoint = open_checkpoint(smollm2_gguf)
    choose = chooser(parse(expression), [("embed", parse("int8/g32"))], checkpoint.topology)
    formats = plan(checkpoint, choose).formats
    tracemalloc.start()
    try:
        loaded = load(checkpoint, formats)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    largest = max(4 * s.rows * s.cols for s in loaded.topology.sites if s.role != "embed")
    # A mask's arrays may be longer than was planned, and then stay outside of the region.
    assert kept < loaded.topology.vector_bytes + 0.3 * loaded.data_bytes + 2e6
    assert peak < loaded.data_bytes + 8 * largest
    assert not loaded.unfused


def test_a_table_of_parts_is_named(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    choose = chooser(None, [("embed", parse("int8/g32 + mask(0.1%: f16)"))], checkpoint.topology)
    loaded = load(checkpoint, plan(checkpoint, choose).formats)
    assert loaded.unfused.keys() == {"model.embed_tokens"}
    assert "float32 copy" in loaded.unfused["model.embed_tokens"]


# ---------------------------------------------------------------- folders that are wrong


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2 as transformers writes it: biases, an untied head."""
    model = tiny_models.Tiny("theirs", "Qwen2", {"num_hidden_layers": 2}).model()
    return tiny_models.write_folder(model, tmp_path_factory.mktemp("theirs") / "tiny")


@pytest.fixture(scope="module")
def ours(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, compressed."""
    checkpoint = open_checkpoint(theirs)
    out = tmp_path_factory.mktemp("ours") / "packed"
    written = compress(checkpoint, out, of_format("uint4/g32 @ int8/token"), keep=[("embed", "f16 @ f32")])
    opened = open_checkpoint(out)
    planned = plan(opened)
    assert written.data_bytes == opened.data_bytes == planned.data_bytes
    assert written.bits_per_weight == planned.bits_per_weight == fully(opened).bits_per_weight
    return out


def _tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return dict(load_file(path / "model.safetensors"))


def _changed(folder: Path, out: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    """A copy of the folder with changed tensors."""
    from safetensors.numpy import save_file

    shutil.copytree(folder, out)
    tensors = _tensors(folder)
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, out / "model.safetensors")
    return out


def _refused(path: Path, *words: str, error: type[GossamerError] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        fully(open_checkpoint(path))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    for word in words:
        assert word in message


def _set(name: str, value: Any) -> Callable[[dict[str, np.ndarray]], Any]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = value(tensors[name])

    return change


def _spoilt(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[-1] = value
        return array

    return change


Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    "name", [f"{Q}.weight", f"{Q}.bias", "model.layers.1.input_layernorm.weight", "lm_head.weight", "model.norm.weight"]
)
def test_a_missing_tensor_is_named_before_anything_is_converted(name: str, theirs: Path, tmp_path: Path) -> None:
    path = _changed(theirs, tmp_path / "m", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"'{name}'"):
        open_checkpoint(path)


def test_a_wrong_shape_is_named_with_both_shapes(theirs: Path, tmp_path: Path) -> None:
    for i, (name, change) in enumerate(
        [
            (f"{Q}.weight", lambda a: a[:-1]),
            (f"{DOWN}.weight", lambda a: a.T),
            (f"{Q}.bias", lambda a: a[1:]),
            ("model.norm.weight", lambda a: a[None]),
            ("model.embed_tokens.weight", lambda a: np.concatenate([a, a])),
        ]
    ):
        _refused(_changed(theirs, tmp_path / str(i), _set(name, change)), f"'{name}'", "asks for [")


def test_a_tensor_that_is_not_used_is_named(theirs: Path, tmp_path: Path) -> None:
    for i, name in enumerate(["model.layers.2.mlp.up_proj.weight", f"{DOWN}.bias", "visual.patch_embed"]):
        path = _changed(theirs, tmp_path / str(i), lambda t, name=name: t.update({name: np.ones((2, 2), np.float32)}))
        _refused(path, name, error=UnsupportedError)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [f"{DOWN}.weight", f"{Q}.bias", "model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_numbers(name: str, value: float, theirs: Path, tmp_path: Path) -> None:
    path = _changed(theirs, tmp_path / "m", _set(name, _spoilt(value)))
    _refused(path, name.removesuffix(".weight"), "NaN", error=GossamerError)


def test_weights_of_a_type_that_is_not_read(theirs: Path, tmp_path: Path) -> None:
    path = _changed(theirs, tmp_path / "m", _set(f"{DOWN}.weight", lambda a: a.astype(np.int8)))
    _refused(path, f"'{DOWN}.weight'", "I8", error=UnsupportedError)


def test_a_quantized_folder_is_named(theirs: Path, tmp_path: Path) -> None:
    for i, entry in enumerate([{"quant_method": "hqq", "bits": 4}, {}]):
        path = _with_json(theirs, tmp_path / str(i), "config.json", quantization_config=entry)
        _refused(path, "quantized", "config.json", error=UnsupportedError)
    for i, entry in enumerate(["gptq", [], {"quant_method": "gptq", "bits": 4}]):
        path = _with_json(theirs, tmp_path / f"damaged{i}", "config.json", quantization_config=entry)
        _refused(path, "config.json", error=CheckpointError)
    fully(open_checkpoint(_with_json(theirs, tmp_path / "null", "config.json", quantization_config=None)))


def _with_json(folder: Path, out: Path, file: str, **changes: Any) -> Path:
    shutil.copytree(folder, out)
    data = json.loads((folder / file).read_text()) | changes
    (out / file).write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))
    return out


# ---------------------------------------------------------------- folders of ours that are wrong


def test_an_array_of_another_length(ours: Path, tmp_path: Path) -> None:
    for i, (name, change) in enumerate(
        [
            (f"{DOWN}.q4", lambda a: a[:-64]),
            (f"{DOWN}.scales", lambda a: np.concatenate([a, a])),
            (f"{DOWN}.zeros", lambda a: a.reshape(-1, 64)),
            ("model.embed_tokens.values", lambda a: a[64:]),
            (f"{Q}.bias", lambda a: a[:-1]),
            ("model.norm.weight", lambda a: a[:-1]),
        ]
    ):
        _refused(_changed(ours, tmp_path / str(i), _set(name, change)), f"'{name}'", "asks for [")


def test_an_array_of_another_type(ours: Path, tmp_path: Path) -> None:
    for i, (name, dtype) in enumerate([(f"{DOWN}.q4", np.int8), (f"{DOWN}.scales", np.float32)]):
        _refused(_changed(ours, tmp_path / str(i), _set(name, lambda a, dtype=dtype: a.astype(dtype))), DOWN)


def test_a_missing_array_and_one_too_many(ours: Path, tmp_path: Path) -> None:
    for i, name in enumerate([f"{DOWN}.q4", f"{DOWN}.zeros", f"{Q}.bias", "model.norm.weight"]):
        _refused(_changed(ours, tmp_path / f"less{i}", lambda tensors, name=name: tensors.pop(name)), f"'{name}'")
    for i, name in enumerate([f"{DOWN}.q1", f"{DOWN}.weight", "extra"]):
        path = _changed(ours, tmp_path / f"more{i}", lambda t, name=name: t.update({name: np.ones(64, np.uint8)}))
        _refused(path, name)


@pytest.mark.parametrize("version", [0, 2, 99, "1", None, [1], "x" * 1000])
def test_another_layout_version(version: Any, ours: Path, tmp_path: Path) -> None:
    path = _with_json(ours, tmp_path / "m", "gossamer.json", layout=version)
    _refused(path, "gossamer.json", "layout version", error=UnsupportedError)


@pytest.mark.parametrize("formats", [..., None, [], "int4/g32", {}, {"a": 1}])
def test_formats_that_are_no_table(formats: Any, ours: Path, tmp_path: Path) -> None:
    _refused(_with_json(ours, tmp_path / "m", "gossamer.json", formats=formats), "gossamer.json", "format")


def test_an_expression_that_does_not_parse(ours: Path, tmp_path: Path) -> None:
    formats = json.loads((ours / "gossamer.json").read_text())["formats"]
    for i, text in enumerate(["int5/q32", "", "int4", "int4/g0", "bf16 @ int8/token", "nonsense", "uint4/g32 @"]):
        path = _with_json(ours, tmp_path / str(i), "gossamer.json", formats={**formats, DOWN: text})
        _refused(path, "gossamer.json", DOWN)


def test_an_expression_that_does_not_fit_the_arrays(ours: Path, tmp_path: Path) -> None:
    formats = json.loads((ours / "gossamer.json").read_text())["formats"]
    for i, text in enumerate(["uint4/g64", "int4/g32", "uint8/g32", "bf16", "uint4/g32*bf16", "uint4/row"]):
        path = _with_json(ours, tmp_path / str(i), "gossamer.json", formats={**formats, DOWN: text})
        _refused(path, DOWN)


def test_sites_that_are_missing_or_too_many(ours: Path, tmp_path: Path) -> None:
    formats = json.loads((ours / "gossamer.json").read_text())["formats"]
    less = {k: v for k, v in formats.items() if k != DOWN}
    _refused(_with_json(ours, tmp_path / "less", "gossamer.json", formats=less), "gossamer.json", DOWN)
    more = {**formats, "model.layers.9.mlp.up_proj": "bf16"}
    _refused(_with_json(ours, tmp_path / "more", "gossamer.json", formats=more), "gossamer.json", "model.layers.9")


def test_sizes_that_do_not_fit_the_arrays(ours: Path, theirs: Path, tmp_path: Path) -> None:
    for i, changes in enumerate(
        [
            {"vocab_size": 1 << 27},
            {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
            {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
            {"intermediate_size": 1 << 27},
            {"num_attention_heads": 12},
            {"tie_word_embeddings": True},
        ]
    ):
        _refused(_with_json(ours, tmp_path / f"ours{i}", "config.json", **changes))
        if "tie_word_embeddings" not in changes:  # then a second table is a copy, as some checkpoints have it
            _refused(_with_json(theirs, tmp_path / f"theirs{i}", "config.json", **changes))


def test_packed_arrays_come_straight_from_the_file(ours: Path) -> None:
    checkpoint = open_checkpoint(ours)
    loaded = fully(checkpoint)
    for name, packed in loaded.packed.items():
        for array in packed.arrays.values():
            assert not array.flags.owndata, name
            assert array.ctypes.data % 64 == 0, name
    assert {str(f) for f in loaded.formats.values()} == {"uint4/g32 @ int8/token", "f16 @ f32"}


# ---------------------------------------------------------------- GGUF files that are wrong


def _gguf(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A GGUF file whose tensors went through ``change`` first (Hugging Face names)."""
    model = tiny_models.Tiny("wrong", "Qwen2", {"num_hidden_layers": 2}).model()
    tensors = dict(model.state_dict())
    change(tensors)
    model.state_dict = lambda: tensors
    return tiny_models.write_gguf(model, "qwen2", tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        (f"{Q}.weight", "blk.1.attn_q.weight"),
        (f"{Q}.bias", "blk.1.attn_q.bias"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
    ],
)
def test_gguf_tensors_are_looked_for_and_measured_first(name: str, stored: str, tmp_path: Path) -> None:
    path = _gguf(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"'{stored}'"):
        open_checkpoint(path)
    path = _gguf(tmp_path, lambda tensors: tensors.update({name: tensors[name][:-2]}))
    with pytest.raises(CheckpointError, match=f"'{stored}' has the shape"):
        open_checkpoint(path)


def test_gguf_tensors_that_are_not_used(tmp_path: Path) -> None:
    path = _gguf(tmp_path, lambda t: t.update({f"{DOWN}.bias": t["model.norm.weight"]}))
    _refused(path, "blk.0.ffn_down.bias", error=UnsupportedError)


@pytest.mark.parametrize("name", [f"{DOWN}.weight", f"{Q}.bias", "model.norm.weight"])
def test_gguf_weights_that_are_not_numbers(name: str, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = float("nan")

    _refused(_gguf(tmp_path, change), "NaN", "m.gguf", error=GossamerError)


def test_gguf_scales_that_are_not_numbers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = tiny_models.Tiny("scales", "Qwen2", sizes).model()
    path = tiny_models.write_gguf(model, "qwen2", tmp_path / "m.gguf", "Q4_1")
    tensor = open_checkpoint(path).file.tensors["blk.0.ffn_up.weight"]  # type: ignore[attr-defined]
    data = bytearray(path.read_bytes())
    data[tensor.offset + 2 : tensor.offset + 4] = np.float16(np.inf).tobytes()  # the minimum of the first block
    path.write_bytes(data)
    _refused(path, "blk.0.ffn_up.weight", "m.gguf", error=FormatError)


def test_rope_divisors_that_cannot_be(tmp_path: Path) -> None:
    tiny = next(t for t in tiny_models.TINY if t.name == "Llama 3.1 RoPE scaling")
    path = tiny_models.write_gguf(tiny.model(), "llama", tmp_path / "m.gguf")
    checkpoint = open_checkpoint(path)
    tensor = checkpoint.file.tensors["rope_freqs.weight"]  # type: ignore[attr-defined]
    for value in (0.0, -1.0, np.nan, np.inf):
        data = bytearray(path.read_bytes())
        data[tensor.offset : tensor.offset + 4] = np.float32(value).tobytes()
        wrong = tmp_path / "wrong.gguf"
        wrong.write_bytes(data)
        _refused(wrong, "'rope_freqs.weight'", "wrong.gguf")
