"""The base of the measurements: one set of weights in two kinds of file."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest

from gossamer.errors import UsageError
from gossamer.models.checkpoint import open_checkpoint

FILE = Path(__file__).parents[2] / "benchmarks" / "reference.py"


@pytest.fixture
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_folder_and_file_hold_the_same_weights(
    reference: ModuleType,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, file = tmp_path / "out", tmp_path / "out.gguf"
    monkeypatch.setattr(sys, "argv", ["reference.py", str(tiny), str(out), "--gguf", str(file), "--seed", "3"])
    reference.main()
    printed = capsys.readouterr().out
    assert "folder and GGUF file: bitwise the same logits" in printed
    source, folder, written = open_checkpoint(tiny), open_checkpoint(out), open_checkpoint(file)
    assert folder.config == written.config == source.config
    for site in folder.topology.sites:
        ours, theirs, before = (c.source(site).read(0, site.rows) for c in (folder, written, source))
        assert np.array_equal(ours, theirs), site.name
        ratio = ours[before != 0] / before[before != 0]
        if site.role == "embed":
            assert np.abs(ratio - 1).max() < 1e-3
        else:
            assert 0.75**2 < ratio.min() < 0.9
            assert 1.1 < ratio.max() < 1.34 / 0.74
    for vector in folder.topology.vectors:
        assert np.array_equal(folder.vector(vector), written.vector(vector))
    # Every key but the type of the file is the source's.
    keys, wanted = gguf.GGUFReader(file).fields, gguf.GGUFReader(tiny).fields
    for key, field in wanted.items():
        if not key.startswith("GGUF.") and key != "general.file_type":
            assert keys[key].contents() == field.contents(), key
    assert folder.tokenizer().encode("the inner tiger") == source.tokenizer().encode("the inner tiger")

    with pytest.raises(UsageError, match="exists already"):
        reference.main()
    monkeypatch.setattr(
        sys, "argv", ["reference.py", str(out), str(tmp_path / "b"), "--gguf", str(tmp_path / "b.gguf")]
    )
    with pytest.raises(UsageError, match="comes as a folder"):
        reference.main()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.gguf"}
