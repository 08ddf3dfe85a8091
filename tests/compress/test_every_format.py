"""Folders of every kind of format: written, read, run and written again, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from test_write import check_logits, check_size, write

from gossamer import LLM
from gossamer.checkpoints.safetensors import SafetensorsFile
from gossamer.compress.job import compress
from gossamer.compress.recipe import of_format
from gossamer.formats import Composite, parse
from gossamer.models.checkpoint import open_checkpoint

# Widths are 96 and 160, heights 32 and more.
EXPRESSIONS = [
    # nested scales
    *("uint2/g16*(uint4/g16-z(0))-m(uint4/g16-z(0))", "int3/g16*(int6/g16)", "int6/g16*(int8/g16)"),
    *("uint4/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))", "uint5/g32*(uint6/g8-z(0))-m(uint6/g8-z(0))"),
    *(
        "e2m1/g16*(e4m3/tensor)",
        "uint4/g32*(uint8/row-z(0))",
        "nf4/g64*(int8/g256)",
        "int4/g32*(int6/g16*(e4m3/tensor))",
    ),
    # one number and its scales
    *("e2m1/g32*e8m0", "e4m3/32x32", "kmeans4/row", "kmeans2/tensor", "ternary/row", "bipolar3/g32", "int7/g16"),
    *("int4/g32 @ int8/g32", "uint4/g32 @ uint8/token", "int8/row @ int8/token-o(3.0)", "int4/row @ e4m3/token"),
    # parts
    *("int4/g32 + mask(1%: f16)", "int4/row + mask(2.5%: int8/tensor) @ int8/token", "mask(5%: f32)"),
    *("int4/g32 + rank4(bf16)", "rank8(int8/row)", "uint3/g16*(uint3/g16) + mask(1%: f16)", "planes(int4/g32)"),
    *("cols(16: bf16 @ bf16, int4/row) @ uint4/token", "cols(7: f32, 30: int8/row, int4/g16)"),
    *("rows(20: int8/g32, int4/g32)", "rows(5: bf16, 17: int8/row, uint4/g32)", "planes(uint3/g16) + rank2(f16)"),
    # transforms
    *("hadamard(32, none, int4/row) @ int8/token", "hadamard(8, 7, int4/g32)", "permute(int4/g32)"),
    *(
        "scale(int4/g32)",
        "permute(cols(16: bf16, int4/g32))",
        "hadamard(16, 3, cols(8: bf16, int4/row + mask(0.5%: f16)))",
    ),
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_folder_gives_the_same_logits(text: str, tiny: Path, tmp_path: Path) -> None:
    keep = (("embed", "int8/g32"), ("*.1.mlp.up_proj", "bf16"))
    done = write(tiny, tmp_path / "first", text, keep)
    check_size(done)
    llm = check_logits(tiny, done, text, keep, range(60))
    assert str(llm.loaded.formats["model.layers.0.mlp.up_proj"]) == str(parse(text))
    for name, packed in llm.loaded.packed.items():
        for array in packed.arrays.values():
            assert not array.flags.owndata, name
            assert array.ctypes.data % 64 == 0, name
    # Stored once more, and from the folder itself: the same bytes.
    for source in (tiny, done.path):
        again = write(source, tmp_path / f"again-{source.name}", text, keep)
        assert (again.path / "model.safetensors").read_bytes() == (done.path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("text", ["int4/g32*(int8/row)", "int8/g32 + mask(0.5%: f16)", "rows(50: bf16, int4/g32)"])
def test_the_table_too(text: str, tiny: Path, tmp_path: Path) -> None:
    keep = (("embed", text),)
    done = write(tiny, tmp_path / "out", "int4/g32", keep)
    check_size(done)
    check_logits(tiny, done, "int4/g32", keep, range(60))


def test_what_was_written_is_counted(tiny: Path, tmp_path: Path) -> None:
    """How many entries a mask stores follows from the weights, and the ledger says what there is."""
    done = compress(open_checkpoint(tiny), tmp_path / "out", of_format("int4/g32 + mask(2%: f16)"))
    check_size(done)
    planned = done.predicted
    assert 0.5 * done.data_bytes < planned.data_bytes < 2 * done.data_bytes
    assert planned.data_bytes != done.data_bytes
    loaded = LLM(done.path).loaded
    assert loaded.data_bytes == done.data_bytes
    assert loaded.bits_per_weight == done.bits_per_weight
    names = list(SafetensorsFile(done.path / "model.safetensors").tensors)
    site = "model.layers.0.self_attn.q_proj"
    arrays = [name for name in names if name.startswith(f"{site}.")]
    assert arrays == [f"{site}.{a}" for a in ("0.q4", "0.scales", "1.starts", "1.index", "1.values")]


def test_entries_heaped_in_one_row(tiny: Path, tmp_path: Path) -> None:
    """More slots than the shape alone lets one expect: the file has room for whatever there is."""
    source = tiny_gguf.write(tmp_path / "heaped.gguf", heap=True)
    done = write(source, tmp_path / "out", "int4/g32 + mask(2%: f16)", ())
    check_size(done)
    check_logits(source, done, "int4/g32 + mask(2%: f16)", (), range(60))


def test_names_and_formats_of_the_ledger(tiny: Path, tmp_path: Path) -> None:
    done = write(tiny, tmp_path / "out", "cols(16: bf16 @ bf16, int4/row) @ uint4/token", (("embed", "int8/g32"),))
    ledger = json.loads((done.path / "gossamer.json").read_text())
    assert ledger["formats"]["model.layers.0.mlp.down_proj"] == "cols(16: bf16 @ bf16, int4/row) @ uint4/token"
    checkpoint = open_checkpoint(done.path)
    kinds = {t.name: t.runs_as for t in checkpoint.tensors()}
    assert kinds["model.layers.0.mlp.down_proj.0.values"] == ledger["formats"]["model.layers.0.mlp.down_proj"]
    assert kinds["model.norm.weight"] == "f32"
    site = next(s for s in checkpoint.topology.sites if s.role == "down")
    packed = checkpoint.pack(site)
    assert isinstance(packed.format, Composite)
    assert checkpoint.source(site).read(3, 21).tobytes() == packed.decode()[3:21].tobytes()
    assert np.isfinite(packed.decode()).all()
