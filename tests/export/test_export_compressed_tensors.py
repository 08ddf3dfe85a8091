"""Folders that we write for compressed-tensors: they come back, and its own code reads the same weights."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cut import Stored
from tiny_models import TINY, write_folder

from gossamer import LLM
from gossamer.checkpoints.folder import Folder
from gossamer.errors import FormatError, UnsupportedError, UsageError
from gossamer.export.compressed_tensors import export_compressed_tensors
from gossamer.models.checkpoint import Checkpoint, open_checkpoint

CASES = {
    "int4/g64": "pack-quantized",
    "uint4/g32*bf16": "pack-quantized",
    "int3/g64*f32": "pack-quantized",
    "uint6/row*bf16": "pack-quantized",
    "int4/row @ int8/token": "pack-quantized",
    "int8/row @ int8/token": "int-quantized",
    "uint8/row*f16 @ uint8/token": "int-quantized",
    "int8/tensor @ int8/token": "int-quantized",
    "e4m3/row @ e4m3/token": "float-quantized",
    "e4m3/tensor @ e4m3/token": "float-quantized",
    "e4m3/32x64 @ e4m3/g64": "float-quantized",
    "e4m3/row": "float-quantized",
    "e4m3/tensor*f16 @ e4m3/static(0.0625)": "float-quantized",
}


def oracle() -> Any:
    """The library, which warns of its own dependencies when it is first imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("compressed_tensors", reason="the package 'compressed-tensors' is not installed")


@pytest.fixture(scope="session")
def plain(smollm2: Checkpoint, stored: Stored) -> Checkpoint:
    """Two layers of SmolLM2, nothing coded, the table small."""
    return open_checkpoint(stored(smollm2, "bf16"))


@pytest.mark.parametrize(("expression", "form"), CASES.items())
def test_codes_and_scales_come_back(
    expression: str, form: str, plain: Checkpoint, stored: Stored, tmp_path: Path
) -> None:
    source = open_checkpoint(stored(plain, expression, embed="bf16"))
    done = export_compressed_tensors(source, tmp_path / "out")
    assert (done.errors, done.overall) == ({}, 0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == form
    assert config["ignore"] == ["lm_head"]
    back = open_checkpoint(tmp_path / "out")
    for site in source.topology.sites:
        assert str(back.native(site)) == str(source.native(site))
        mine, theirs = source.pack(site), back.pack(site)
        assert all(np.array_equal(mine.arrays[name], theirs.arrays[name]) for name in mine.arrays), site.name
    for vector in source.topology.vectors:
        assert np.array_equal(source.vector(vector), back.vector(vector))
    check_by_the_library(source, Folder(tmp_path / "out"), config)


def check_by_the_library(source: Checkpoint, folder: Folder, config: Any) -> None:
    """Takes the tensors of the first sites apart with the library's own compressors."""
    oracle()
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    for site in source.topology.sites[1:8:3]:
        names = {n.removeprefix(f"{site.name}."): n for n in folder.tensors if n.startswith(f"{site.name}.")}
        state = {part: as_torch(folder, name) for part, name in names.items()}
        state["weight_scale"] = state["weight_scale"].float()  # the library computes in the type of the scales
        weight = compressor.decompress(state, scheme)["weight"]
        assert np.array_equal(weight.numpy(), source.source(site).read(0, site.rows)), site.name


def as_torch(folder: Folder, name: str) -> torch.Tensor:
    dtype = folder.tensors[name].dtype
    raw = torch.from_numpy(folder.raw(name).copy())
    views = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
    return raw.view(views[dtype]) if dtype in views else raw


def test_transformers_scores_the_same(plain: Checkpoint, stored: Stored, tmp_path: Path) -> None:
    oracle()
    import transformers

    folder = stored(plain, "int4/g64 @ f32", embed="bf16 @ f32")
    export_compressed_tensors(open_checkpoint(folder), tmp_path / "out")
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    logging.disable(logging.NOTSET)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The capital of France is Paris, which lies on the river Seine."
    llm = LLM(folder, kv="f32")
    ids = llm.tokenizer.encode(text)
    assert tokenizer(text)["input_ids"] == ids
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].float().numpy()
    ours = np.asarray(llm.logits(ids))
    assert model.dtype == torch.float32  # f16 scales and a bf16 table fit in nothing smaller
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(theirs).max() > 10


def test_several_schemes_stand_beside_each_other(plain: Checkpoint, stored: Stored, tmp_path: Path) -> None:
    source = open_checkpoint(
        stored(plain, "int4/g64*bf16", embed="bf16", down="int8/row*bf16 @ int8/token", o="bf16", v="int8/g32*bf16")
    )
    done = export_compressed_tensors(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    assert quantization["ignore"] == ["lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in range(2))]
    assert [len(g["targets"]) for g in quantization["config_groups"].values()] == [8, 2, 2]
    back = open_checkpoint(tmp_path / "out")
    assert {s.name: str(back.native(s)) for s in back.topology.sites} == done.types
    oracle()
    from compressed_tensors.quantization import QuantizationConfig

    QuantizationConfig.model_validate(quantization)


def test_the_smallest_type_that_holds_all_is_named(plain: Checkpoint, stored: Stored, tmp_path: Path) -> None:
    # Norms of the real model are bf16 numbers.
    for expression, dtype in (("int4/g64*bf16", "bfloat16"), ("int4/g64*f32", "float32")):
        out = tmp_path / dtype
        export_compressed_tensors(open_checkpoint(stored(plain, expression, embed="bf16")), out)
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_what_cannot_be_said_is_refused_or_stored_anew(plain: Checkpoint, stored: Stored, tmp_path: Path) -> None:
    source, out = open_checkpoint(stored(plain, "nf4/g64", embed="int8/g32", down="int4/g64")), tmp_path / "out"
    with pytest.raises(UnsupportedError, match="quantizes linear layers, and this is an embedding"):
        export_compressed_tensors(source, out)
    with pytest.raises(FormatError, match=r"'model\.embed_tokens' takes none"):
        export_compressed_tensors(source, out, ["int4/g64"])
    with pytest.raises(FormatError, match=r"int8/token-o\(2\) cannot be said"):
        export_compressed_tensors(source, out, ["int4/g32 @ int8/token-o(2)"])
    with pytest.raises(FormatError, match="cannot be said in compressed-tensors"):
        export_compressed_tensors(source, out, ["nf4/g64"])
    assert not list(tmp_path.iterdir())
    done = export_compressed_tensors(source, out, ["uint8/g32", "F32"])
    assert done.errors.pop("model.embed_tokens") == 0
    assert len(done.errors) == 12
    assert all(0 < error < 0.01 for error in done.errors.values())
    assert 0 < done.overall < max(done.errors.values())


def test_groups_must_fill_the_rows(plain: Checkpoint, stored: Stored, tmp_path: Path) -> None:
    source = open_checkpoint(stored(plain, "int4/g128", embed="bf16"))
    with pytest.raises(UnsupportedError, match="rows of 576 elements are no whole groups of 128"):
        export_compressed_tensors(source, tmp_path / "out")


def test_a_plain_model_is_not_called_quantized(plain: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plain numbers throughout"):
        export_compressed_tensors(plain, tmp_path / "out")


def test_families_with_biases_and_other_norms(tmp_path: Path, stored: Stored) -> None:
    for model in TINY:
        if model.name not in ("Qwen2", "Gemma 3, window of 24"):
            continue
        folder = open_checkpoint(write_folder(model.model(), tmp_path / model.cls))
        source = open_checkpoint(stored(folder, "int8/row", embed="f32", head="f32"))
        export_compressed_tensors(source, tmp_path / f"{model.cls}-out")
        back = open_checkpoint(tmp_path / f"{model.cls}-out")
        assert back.config == source.config
        tokens = [3, 1, 4, 1, 5, 92, 65]
        first, second = (LLM(checkpoint, format="f32 @ f32") for checkpoint in (source, back))
        assert np.array_equal(first.logits(tokens), second.logits(tokens))


def test_positions_that_transformers_has_no_words_for(tmp_path: Path, stored: Stored) -> None:
    from tiny_models import write_gguf

    model = next(t for t in TINY if t.name == "Llama 3.1 RoPE scaling")
    file = write_gguf(model.model(), "llama", tmp_path / "tiny.gguf")
    source = open_checkpoint(stored(open_checkpoint(file), "int8/row", embed="f32", head="f32"))
    with pytest.raises(UnsupportedError, match="frequency by frequency"):
        export_compressed_tensors(source, tmp_path / "out")
