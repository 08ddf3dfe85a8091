"""Running sums against float64 sums of everything at once, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gossamer.compress.statistics import Collector, Statistics, load_statistics, save_statistics
from gossamer.errors import CheckpointError, ResourceError, UsageError

TOKENS, COLS = 1700, 1100  # more than a step, more than a block of the Hessian's rows


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    """Correlated columns of very different sizes, some with a mean."""
    random = np.random.default_rng(0)
    x = random.standard_normal((TOKENS, COLS)) + 0.4 * random.standard_normal((TOKENS, 1))
    return ((x + random.integers(0, 2, COLS)) * np.exp(2 * random.standard_normal(COLS))).astype(np.float32)


def collected(parts: list[np.ndarray], hessian: bool = True, samples: int = 100) -> Statistics:
    collector = Collector(parts[0].shape[1], hessian=hessian, samples=samples, expected_tokens=sum(map(len, parts)))
    for part in parts:
        collector.add(part)
    return collector.result()


def test_sums_are_those_of_float64(x: np.ndarray) -> None:
    s, exact = collected([x]), x.astype(np.float64)
    hessian = exact.T @ exact / TOKENS
    sizes = np.sqrt(np.outer(hessian.diagonal(), hessian.diagonal()))
    assert s.tokens == TOKENS
    assert s.hessian is not None
    assert s.hessian.dtype == np.float32
    assert np.abs((s.hessian - hessian) / sizes).max() <= 1e-6
    assert np.array_equal(s.hessian, s.hessian.T)
    assert np.array_equal(s.hessian.diagonal(), s.square)
    assert np.abs(s.square / hessian.diagonal() - 1).max() <= 1e-6
    assert np.abs(s.mean_abs / np.abs(exact).mean(axis=0) - 1).max() <= 1e-6
    assert np.abs((s.mean - exact.mean(axis=0)) / s.mean_abs).max() <= 1e-6
    assert np.array_equal(s.absmax, np.abs(x).max(axis=0))
    assert np.linalg.eigvalsh(s.hessian.astype(np.float64)).min() >= -1e-6 * s.hessian.max()


@pytest.mark.parametrize("sizes", [[1] * 1700, [511, 513, 676], [3, 1024, 673]])
def test_pieces_change_nothing(x: np.ndarray, sizes: list[int]) -> None:
    whole = collected([x[:, :70]])
    pieces = collected(np.split(x[:, :70], np.cumsum(sizes)[:-1]))
    for name in ("hessian", "absmax", "mean_abs", "mean", "square", "samples"):
        assert np.array_equal(getattr(whole, name), getattr(pieces, name)), name


def test_samples_lie_at_even_distances(x: np.ndarray) -> None:
    s = collected([x[:300], x[300:]], hessian=False, samples=100)
    assert s.hessian is None
    assert np.array_equal(s.samples, x[::17])
    assert np.array_equal(collected([x[:7]], samples=512).samples, x[:7])
    assert collected([x[:7]], samples=0).samples.shape == (0, COLS)


def test_no_tokens_and_no_numbers_are_refused(x: np.ndarray) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        Collector(8, hessian=True, samples=4, expected_tokens=4).result()
    for bad in (np.nan, np.inf, 1e30):
        broken = x[:600, :8].copy()
        broken[500, 3] = bad
        with pytest.raises(UsageError, match="column 3"), np.errstate(all="ignore"):
            collected([broken])


def test_a_hessian_that_memory_cannot_hold_is_refused() -> None:
    with pytest.raises(ResourceError, match="second moments of an input of 9000000 columns"):
        Collector(9_000_000, hessian=True, samples=1, expected_tokens=1)


# ---------------------------------------------------------------- the file

ABOUT = {"model": "abc", "tokenizer": "def", "text": "123", "tokens": 512}


@pytest.fixture
def file(x: np.ndarray, tmp_path: Path) -> Path:
    path = tmp_path / "layer.safetensors"
    parts = {"a.input": collected([x[:, :5]]), "b.input": collected([x[:, :9]], hessian=False, samples=0)}
    save_statistics(path, parts, ABOUT)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    return path


def test_what_was_saved_is_loaded(x: np.ndarray, file: Path) -> None:
    found = load_statistics(file, ABOUT)
    assert list(found) == ["a.input", "b.input"]
    assert found["b.input"].hessian is None
    fresh = collected([x[:, :5]])
    for name in ("hessian", "absmax", "mean_abs", "mean", "square", "samples"):
        assert np.array_equal(getattr(found["a.input"], name), getattr(fresh, name)), name
    assert found["a.input"].tokens == TOKENS


@pytest.mark.parametrize(
    ("key", "words"),
    [("model", "another model"), ("tokenizer", "another tokenizer"), ("text", "another text"), ("tokens", "'tokens'")],
)
def test_statistics_of_something_else_are_refused(file: Path, key: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_statistics(file, {**ABOUT, key: "other"})
    with pytest.raises(UsageError, match=words):
        load_statistics(file, {k: v for k, v in ABOUT.items() if k != key})


def rewritten(file: Path, change: Callable[[dict[str, object]], None]) -> None:
    """The same data under a changed header."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def _rename(header: dict[str, object], old: str, new: str) -> None:
    header[new] = header.pop(old)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["__metadata__"].update(format="gossamer statistics 2"),
        lambda h: h["__metadata__"].update(about="[]"),
        lambda h: h["__metadata__"].update(tokens="{"),
        lambda h: h["__metadata__"].pop("tokens"),
        lambda h: h["__metadata__"].update(tokens='{"a.input": 0, "b.input": 1700}'),
        lambda h: h["__metadata__"].update(tokens='{"a.input": 1700}'),
        lambda h: h["__metadata__"].update(tokens='{"a.input": 5, "b.input": 1700}'),
        lambda h: _rename(h, "b.input.mean", "b.input.other"),
        lambda h: _rename(h, "a.input.hessian", "a.input.extra"),
        lambda h: h["a.input.square"].update(shape=[5, 1]),
        lambda h: h["a.input.hessian"].update(shape=[25]),
        lambda h: h["a.input.samples"].update(shape=[500]),
        lambda h: h["a.input.mean"].update(dtype="I32"),
    ],
)
def test_damaged_headers_are_refused(file: Path, change: Callable[[dict[str, object]], None]) -> None:
    rewritten(file, change)
    with pytest.raises(CheckpointError, match="cannot be used as statistics"):
        load_statistics(file)


def test_other_files_and_bad_values_are_refused(file: Path, tmp_path: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-4:] = np.array([np.nan], "<f4").tobytes()
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="NaN"):
        load_statistics(file)
    file.write_bytes(raw[:-4])
    with pytest.raises(CheckpointError):
        load_statistics(file)
    with pytest.raises(CheckpointError):
        load_statistics(tmp_path / "none")


def test_a_place_that_cannot_be_written_is_named(x: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "no" / "statistics"
    with pytest.raises(ResourceError, match=f"{path} cannot be written"):
        save_statistics(path, {"a": collected([x[:, :3]])}, ABOUT)
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    with pytest.raises(ResourceError, match=f"{folder} cannot be written"):
        save_statistics(folder, {"a": collected([x[:, :3]])}, ABOUT)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
