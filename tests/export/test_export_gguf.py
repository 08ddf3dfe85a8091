"""GGUF files that we write: the same bytes come back, and what they cannot say is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cut import Stored, two_layers
from tiny_models import TINY, Tiny, write_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gossamer import LLM
from gossamer.checkpoints.gguf import GGUFFile
from gossamer.checkpoints.one_file import publish_file
from gossamer.errors import FormatError, ResourceError, UnsupportedError, UsageError
from gossamer.export.gguf import export_gguf
from gossamer.export.gguf_keys import rope_factors
from gossamer.models.checkpoint import Checkpoint, open_checkpoint
from gossamer.models.config import Config
from gossamer.models.gguf_checkpoint import GgufCheckpoint


def same_tensors(first: Path, second: Path, layers: int | None = None) -> int:
    """Compares every tensor of the second file with the first; returns how many there are."""
    with GGUFFile(first) as a, GGUFFile(second) as b:
        kept = {n for n in a.tensors if layers is None or not n.startswith("blk.") or int(n.split(".")[1]) < layers}
        assert set(b.tensors) == kept
        for name, tensor in b.tensors.items():
            assert (tensor.type, tensor.shape) == (a.tensors[name].type, a.tensors[name].shape), name
            assert np.array_equal(b.raw(name), a.raw(name)), name
        return len(b.tensors)


def test_a_file_comes_back_by_way_of_a_folder(tiny: Path, stored: Stored, tmp_path: Path) -> None:
    done = export_gguf(open_checkpoint(stored(open_checkpoint(tiny))), tmp_path / "out.gguf")
    same_tensors(tiny, tmp_path / "out.gguf")
    assert (done.errors, done.overall) == ({}, 0)
    assert done.total_bytes == (tmp_path / "out.gguf").stat().st_size
    with GGUFFile(tiny) as a, GGUFFile(tmp_path / "out.gguf") as b:
        assert done.data_bytes == a.data_bytes == b.data_bytes
        for key in set(a.metadata) - {"tokenizer.ggml.token_type"}:
            assert b.metadata[key] == a.metadata[key], key
        assert b.metadata["general.file_type"] == 3  # mostly Q4_1
    first, second = LLM(tiny), LLM(tmp_path / "out.gguf")
    assert np.array_equal(first.logits([1, 2, 3]), second.logits([1, 2, 3]))
    assert second.tokenizer.encode("the <|im_start|>inner") == first.tokenizer.encode("the <|im_start|>inner")


def test_smollm2_comes_back(smollm2: Checkpoint, smollm2_gguf: Path, stored: Stored, tmp_path: Path) -> None:
    export_gguf(open_checkpoint(stored(smollm2)), tmp_path / "out.gguf")
    assert same_tensors(smollm2_gguf, tmp_path / "out.gguf", layers=2) == 20


def test_gemma_comes_back_and_keeps_its_keys(gemma3: Checkpoint, gemma3_gguf: Path, tmp_path: Path) -> None:
    export_gguf(gemma3, tmp_path / "out.gguf")
    assert same_tensors(gemma3_gguf, tmp_path / "out.gguf", layers=2) == 28
    with GGUFFile(gemma3_gguf) as a, GGUFFile(tmp_path / "out.gguf") as b:
        for key in set(a.metadata) - {"general.file_type"}:
            equal = np.array_equal(a.metadata[key], b.metadata[key])
            assert equal, key
        assert b.typed_metadata()["tokenizer.ggml.scores"][1:] == a.typed_metadata()["tokenizer.ggml.scores"][1:]


def test_formats_of_fewer_bits_keep_their_values(tiny: Path, stored: Stored, tmp_path: Path) -> None:
    folder = stored(open_checkpoint(tiny), "int3/g32", embed="bf16", down="int4/g160", o="int8/row*f16")
    done = export_gguf(open_checkpoint(folder), tmp_path / "out.gguf")
    assert set(done.types.values()) == {"Q4_0", "Q8_0", "BF16"}
    mine, theirs = open_checkpoint(folder), open_checkpoint(tmp_path / "out.gguf")
    for site in mine.topology.sites:
        assert np.array_equal(mine.source(site).read(0, site.rows), theirs.source(site).read(0, site.rows)), site.name


def test_what_no_type_holds_is_refused_or_stored_anew(tiny: Path, stored: Stored, tmp_path: Path) -> None:
    checkpoint, out = open_checkpoint(stored(open_checkpoint(tiny), "nf4/g32", embed="int8/g32")), tmp_path / "out.gguf"
    with pytest.raises(UnsupportedError, match=r"'model\.layers\.0\.self_attn\.q_proj' is stored as nf4/g32"):
        export_gguf(checkpoint, out)
    with pytest.raises(FormatError, match="rows of 96 elements are no whole blocks of Q6_K"):
        export_gguf(checkpoint, out, ["Q6_K"])
    with pytest.raises(UsageError, match="--lossy IQ2_S"):
        export_gguf(checkpoint, out, ["IQ2_S"])
    assert not list(tmp_path.iterdir())
    done = export_gguf(checkpoint, out, ["Q6_K", "Q8_0"])
    assert len(done.errors) == 14
    back = open_checkpoint(out)
    lost = total = 0.0
    for site in checkpoint.topology.sites:
        w = checkpoint.source(site).read(0, site.rows).astype(np.float64)
        gap = np.square(back.source(site).read(0, site.rows) - w).sum()
        if site.name in done.errors:
            assert np.isclose(done.errors[site.name], np.sqrt(gap / np.square(w).sum()), rtol=1e-5)
            assert 1e-3 < done.errors[site.name] < 1e-2
        lost, total = lost + gap, total + np.square(w).sum()
    assert np.isclose(done.overall, np.sqrt(lost / total), rtol=1e-5)
    exact = export_gguf(checkpoint, tmp_path / "exact.gguf", ["F32"])
    assert set(exact.errors.values()) == {0.0}


# ------------------------------------------------------------ families, from folders that transformers wrote


def folder_of(tiny_model: Tiny, folder: Path) -> Path:
    write_folder(tiny_model.model(), folder)
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    inner = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[("t", "h")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.save(str(folder / "tokenizer.json"))
    return folder


WRITTEN = {
    *("Llama, biases", "Llama, tied table", "Llama 3.1 RoPE scaling", "Llama, linear RoPE scaling"),
    *("Qwen2", "Qwen3", "Gemma 3, window of 24"),
}


@pytest.mark.parametrize("model", [t for t in TINY if t.name in WRITTEN], ids=lambda t: t.name)
def test_families(model: Tiny, tmp_path: Path) -> None:
    folder = folder_of(model, tmp_path / "hf")
    out = tmp_path / "out.gguf"
    assert export_gguf(open_checkpoint(folder), out, progress=None).errors == {}
    mine, theirs = (LLM(path, format="f32 @ f32", kv="f32") for path in (folder, out))
    assert isinstance(theirs.checkpoint, GgufCheckpoint)
    tokens = torch.randint(0, 250, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    gap = np.abs(mine.logits(tokens) - theirs.logits(tokens)).max()
    assert gap < (1e-4 if "3.1" in model.name else 1e-6)  # its divisors are rounded to float32
    assert theirs.tokenizer.encode("the thing") == mine.tokenizer.encode("the thing")


REFUSED = {
    "Mistral, window of 31": "no words for its windows",
    "Qwen2, window of 40 from layer 2 on": "no words for its windows",
    "Qwen3, biases": "have a bias, which llama.cpp's architecture 'qwen3' does not add",
    "Gemma 3, window of 24, linear RoPE scaling": "no words for its scale of its scores",
}


@pytest.mark.parametrize("model", [t for t in TINY if t.name not in WRITTEN], ids=lambda t: t.name)
def test_what_llamacpp_would_not_heed_is_refused(model: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as error:
        export_gguf(open_checkpoint(folder_of(model, tmp_path / "hf")), tmp_path / "out.gguf")
    assert REFUSED[model.name] in str(error.value)
    assert not (tmp_path / "out.gguf").exists()


def test_divisors_are_kept(tiny: Path) -> None:
    config: Config = open_checkpoint(tiny).config
    rope = replace(config.ropes[0], divisors=tuple(float(i) for i in range(1, 9)))
    assert rope_factors(replace(config, ropes=(rope,) * 2)).tolist() == list(range(1, 9))
    assert rope_factors(config) is None


# ------------------------------------------------------------ places


def test_an_existing_file_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        export_gguf(open_checkpoint(tiny), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == b"mine"


def test_nothing_is_left_of_what_failed(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-999999999").write_bytes(b"of a process that is gone")

    def write() -> None:
        with publish_file(tmp_path / "out") as partial:
            partial.write_bytes(b"half")
            raise UsageError(f"{partial} is not right")

    with pytest.raises(UsageError, match="/out is not right"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write() -> None:
        with publish_file(tmp_path / "out") as partial:
            partial.write_bytes(b"new")
            (tmp_path / "out").write_bytes(b"theirs")

    with pytest.raises(UsageError, match="came into being"):
        write()
    assert (tmp_path / "out").read_bytes() == b"theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["file/out.gguf", "a\0b", "x" * 300])
def test_places_that_cannot_be_written(name: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError):
        export_gguf(open_checkpoint(tiny), tmp_path / name)


def test_llamacpp_scores_the_same(smollm2_gguf: Path, stored: Stored, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make peers installs it)")
    folder = stored(two_layers(smollm2_gguf), "f32 @ f32")
    export_gguf(open_checkpoint(folder), tmp_path / "out.gguf")
    llm = LLM(folder)
    ids = llm.tokenizer.encode("The capital of France is Paris, and 1234 people aren't there.")
    peer = llama_cpp.Llama(str(tmp_path / "out.gguf"), n_ctx=64, logits_all=True, verbose=False)
    assert peer.tokenize(b"The capital of France is Paris, and 1234 people aren't there.") == ids
    peer.eval(ids)
    ours, theirs = (torch.tensor(np.asarray(x)).log_softmax(1) for x in (llm.logits(ids), peer.scores[: len(ids)]))
    assert (ours.exp() * (ours - theirs)).sum(1).mean() < 1e-4
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
