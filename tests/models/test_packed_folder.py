"""Folders of ours whose formats have parts, damaged in every way: one sentence each, and never a wrong read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.checkpoints.safetensors import SafetensorsFile
from gossamer.checkpoints.safetensors_writer import SafetensorsWriter
from gossamer.compress.job import compress
from gossamer.compress.recipe import of_format
from gossamer.errors import CheckpointError, GossamerError
from gossamer.models.checkpoint import open_checkpoint
from gossamer.models.load import Loaded, load, plan

tiny_models = pytest.importorskip("tiny_models", reason="the oracle needs torch and gguf (make env installs them)")

Arrays = dict[str, np.ndarray]
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
FORMATS = {
    UP: "cols(16: bf16, int4/row + mask(1%: f16))",
    DOWN: "uint4/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))",
    Q: "permute(rows(9: int8/g16, int4/g16))",
    K: "scale(int4/g32 + rank4(bf16))",
}


def fully(path: Path) -> Loaded:
    checkpoint = open_checkpoint(path)
    return load(checkpoint, plan(checkpoint).formats)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.Tiny("parts", "Qwen2", {"num_hidden_layers": 1}).model()
    source = tiny_models.write_folder(model, tmp_path_factory.mktemp("theirs") / "tiny")
    out = tmp_path_factory.mktemp("ours") / "packed"
    checkpoint = open_checkpoint(source)
    compress(checkpoint, out, of_format("int4/g32"), keep=list(FORMATS.items()))
    fully(out)
    return out


KINDS = {"u1": "U8", "u2": "U16", "u4": "U32", "i1": "I8", "i4": "I32", "f2": "F16", "f4": "F32"}


def arrays_of(folder: Path) -> Arrays:
    file = SafetensorsFile(folder / "model.safetensors")
    return {name: file.raw(name) for name in file.tensors}


def changed(folder: Path, out: Path, change: Callable[[Arrays], Any]) -> Path:
    """A copy with changed tensors, the last one first."""
    shutil.copytree(folder, out)
    (out / "model.safetensors").unlink()
    infos = SafetensorsFile(folder / "model.safetensors").tensors
    tensors = arrays_of(folder)
    change(tensors)

    def kind(name: str) -> str:
        info, dtype = infos.get(name), tensors[name].dtype
        return "BF16" if info and info.dtype == "BF16" and dtype == np.uint16 else KINDS[dtype.str[1:]]

    names = list(tensors)[::-1]
    specs = [(name, kind(name), tensors[name].shape) for name in names]
    with SafetensorsWriter(out / "model.safetensors", specs) as writer:
        for name in names:
            writer.write(name, tensors[name])
    return out


def refused(path: Path, *words: str) -> None:
    with pytest.raises(GossamerError) as caught:
        fully(path)
    message = str(caught.value)
    assert isinstance(caught.value, CheckpointError)
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 700
    for word in words:
        assert word in message


def put(name: str, at: int, value: int) -> Callable[[Arrays], None]:
    def change(tensors: Arrays) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][at] = value

    return change


def test_a_copy_is_sound(ours: Path, tmp_path: Path) -> None:
    """Arrays in another order and on other addresses are read all the same."""
    same = fully(changed(ours, tmp_path / "same", lambda tensors: None))
    first = fully(ours)
    for name, packed in first.packed.items():
        assert same.packed[name].decode().tobytes() == packed.decode().tobytes()


@pytest.mark.parametrize(
    ("name", "at", "value", "word"),
    [
        (f"{UP}.index", 3, 72, "index"),  # one column too far
        (f"{UP}.index", 0, 2**32 - 1, "index"),
        (f"{Q}.index", 5, 72, "index"),
        (f"{Q}.index", 0, 2**31, "index"),
        (f"{Q}.0.index", 0, 72, "index"),
        (f"{Q}.0.index", 8, 2**32 - 1, "index"),
        (f"{UP}.1.1.starts", 0, 1, "starts"),
        (f"{UP}.1.1.starts", 1, 0xFFFFFFF, "starts"),
        (f"{UP}.1.1.starts", 7, 0xFFFFFFF, "long"),  # the last: more slots than there are
        (f"{UP}.1.1.index", 0, 60, "index"),  # of 56 columns
        (f"{K}.factors", 0, 0, "factors"),
    ],
)
def test_contents_that_cannot_be(name: str, at: int, value: int, word: str, ours: Path, tmp_path: Path) -> None:
    site = next(site for site in FORMATS if name.startswith(site))
    refused(changed(ours, tmp_path / "m", put(name, at, value)), site, word)


def test_an_index_twice(ours: Path, tmp_path: Path) -> None:
    for i, name in enumerate([f"{UP}.index", f"{Q}.index", f"{Q}.0.index"]):
        path = changed(ours, tmp_path / str(i), lambda t, name=name: put(name, 1, int(t[name][0]))(t))
        refused(path, "index")


def nested(tensors: Arrays, site: str) -> list[str]:
    return [name for name in tensors if name.startswith(f"{site}.") and name != f"{site}.bias"]


def test_every_array_missing_longer_shorter_and_of_another_type(ours: Path, tmp_path: Path) -> None:
    names = [name for site in FORMATS for name in nested(arrays_of(ours), site)]
    assert {n.removeprefix(f"{DOWN}.") for n in names if n.startswith(DOWN)} == {
        *("q4", "scales.q4", "scales.q2", "scales.scales", "mins.q4", "mins.q2", "mins.scales")
    }
    other = {"u1": "i1", "u2": "f2", "u4": "i4", "f2": "u2", "f4": "u4"}

    def shorter(a: np.ndarray) -> np.ndarray:
        return a[: -64 // a.itemsize]

    def longer(a: np.ndarray) -> np.ndarray:
        return np.concatenate([a, a[: 64 // a.itemsize]])

    def retyped(a: np.ndarray) -> np.ndarray:
        return a.view(other[a.dtype.str[1:]])

    changes = [lambda a: a[:-1], lambda a: a[None], lambda a: a[:0], shorter, longer, retyped]
    for i, name in enumerate(names):
        refused(changed(ours, tmp_path / f"{i}-", lambda t, name=name: t.pop(name)), f"'{name}'")
        for j, change in enumerate(changes):

            def apply(tensors: Arrays, name: str = name, change: Any = change) -> None:
                tensors[name] = change(tensors[name])

            path = changed(ours, tmp_path / f"{i}-{j}", apply)
            refused(path, next(site for site in FORMATS if name.startswith(site)))
            shutil.rmtree(path)


def test_an_array_too_many(ours: Path, tmp_path: Path) -> None:
    for i, name in enumerate([f"{UP}.2.q4", f"{UP}.0.q4", f"{DOWN}.scales.mins", f"{Q}.0.2.values"]):
        path = changed(ours, tmp_path / str(i), lambda t, name=name: t.update({name: np.zeros(64, np.uint8)}))
        with pytest.raises(GossamerError, match="does not use"):
            fully(path)


@pytest.mark.parametrize(
    "text",
    [
        *("", "cols", "cols(", "cols(16)", "cols(72: bf16, int4/row)", "cols(16: bf16, int4/row", "rows(0: bf16, f16)"),
        *(
            "cols(16: bf16, int4/row + mask(9%: f16))",
            "cols(" * 4000,
            "int4/g16*(" * 2000,
            "scale(" * 50 + "f16" + ")" * 50,
        ),
        *("rank99999999999999999999(bf16)", "hadamard(7, none, int4/row)", "cols(16: bf16, int4/row + mask(1%: bf16))"),
        *("int4/g32*(int8/row)", "cols(33: bf16, int4/row + mask(1%: f16))", "planes(int4/g32)", "kmeans4/row"),
        *("permute(cols(16: bf16, int4/row + mask(1%: f16)))", "cols(16: f16, int4/row + mask(1%: f16))"),
        *("cols(16: bf16, int4/row + mask(0.1%: f32))", "unknown(int4/row)", "int4/g32 @ @ bf16", "int4/g32\n"),
    ],
)
def test_expressions_that_do_not_fit(text: str, ours: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(ours, path)
    ledger = json.loads((path / "gossamer.json").read_text())
    ledger["formats"][UP] = text
    (path / "gossamer.json").write_text(json.dumps(ledger))
    refused(path, UP)


def test_a_file_cut_anywhere(ours: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(ours, path)
    data = (path / "model.safetensors").read_bytes()
    for size in (0, 7, 8, 100, 2000, len(data) // 2, len(data) - 1):
        (path / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            fully(path)


def test_codes_and_scales_may_hold_anything(ours: Path, tmp_path: Path) -> None:
    """Random bytes in every array that is no index: wrong weights perhaps, but no crash."""
    random = np.random.default_rng(0)

    def scramble(tensors: Arrays) -> None:
        for site in FORMATS:
            for name in nested(tensors, site):
                if not name.endswith(("index", "starts", "factors")):
                    noise = random.integers(0, 256, tensors[name].nbytes, np.uint8)
                    tensors[name] = noise.view(tensors[name].dtype)

    loaded = fully(changed(ours, tmp_path / "m", scramble))
    assert set(loaded.packed) >= set(FORMATS)
