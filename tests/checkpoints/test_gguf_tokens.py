"""Tokenizers as the keys of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Inner

from gossamer.checkpoints.gguf import GGUFFile
from gossamer.checkpoints.gguf_tokens import tokenizer_keys
from gossamer.checkpoints.tokenizer import Tokenizer
from gossamer.errors import CheckpointError, UnsupportedError

# As the published tokenizer.json files spell them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("1", "2"), ("'", "s"), ("Ġ", "i")]


def bytewise(folder: Path, *splits: Any, whole: bool = False, special: bool = True) -> Tokenizer:
    pieces = ALPHABET + ["".join(pair) for pair in MERGES]
    inner = Inner(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=MERGES, ignore_merges=whole))
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    if special:
        inner.add_special_tokens([AddedToken("<|end|>", special=True)])
        inner.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return saved(inner, folder, eos_token="<|end|>" if special else None)


def saved(inner: Inner, folder: Path, **config: Any) -> Tokenizer:
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.from_folder(folder)


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


@pytest.mark.parametrize(
    ("splits", "whole", "name"),
    [
        ([split(LLAMA3)], True, "llama-bpe"),
        ([split(LLAMA3)], False, "dbrx"),
        ([split(QWEN2)], False, "qwen2"),
        ([split(GPT2)], False, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), split(GPT2)], False, "smollm"),
    ],
)
def test_rules_of_known_families_have_a_name(splits: list[Any], whole: bool, name: str, tmp_path: Path) -> None:
    keys = tokenizer_keys(bytewise(tmp_path, *splits, whole=whole), 270, "model")
    assert keys["tokenizer.ggml.pre"] == name
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in MERGES]
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[263:] == ["<|end|>", "<tool>", *(f"[PAD{i}]" for i in range(265, 270))]
    assert types.tolist() == [1] * 263 + [3, 4] + [5] * 5
    assert keys["tokenizer.ggml.eos_token_id"] == 263


def test_gpt2s_own_step(tmp_path: Path) -> None:
    inner = Inner(models.BPE(vocab={p: i for i, p in enumerate([*ALPHABET, "th"])}, merges=[("t", "h")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    assert tokenizer_keys(saved(inner, tmp_path), 257, "model")["tokenizer.ggml.pre"] == "gpt-2"


def test_another_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no name for here"):
        tokenizer_keys(bytewise(tmp_path, split(r"\p{L}+|\s+")), 270, "model")


def test_another_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="step 'Punctuation'"):
        tokenizer_keys(bytewise(tmp_path, pre_tokenizers.Punctuation()), 270, "model")


def test_a_text_that_is_rewritten_is_refused(tmp_path: Path) -> None:
    tokenizer = bytewise(tmp_path, split(GPT2))
    tokenizer.inner.normalizer = normalizers.Lowercase()
    with pytest.raises(UnsupportedError, match="rewrites its text"):
        tokenizer_keys(tokenizer, 270, "model")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    inner = Inner(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(UnsupportedError, match="kind 'WordLevel'"):
        tokenizer_keys(saved(inner, tmp_path), 2, "model")


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    inner = Inner(models.BPE(vocab={p: i for i, p in enumerate(ALPHABET)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(UnsupportedError, match="no merges"):
        tokenizer_keys(saved(inner, tmp_path), 256, "model")


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only 200 rows"):
        tokenizer_keys(bytewise(tmp_path, split(GPT2)), 200, "model")


def pieces() -> tuple[list[str], list[float], list[int]]:
    """A SentencePiece vocabulary: unknown, control, bytes, letters, pieces by falling score."""
    words = ["▁t", "he", "▁the", "in", "▁i", "▁in", "er", "▁▁"]
    letters = [chr(c) for c in range(33, 127)] + ["▁", "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [-100.0 - i for i in range(len(letters))]
    return tokens, scores, [2, 3, 3] + [6] * 256 + [1] * (len(words) - 1) + [4] + [1] * len(letters)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_scores_keep_the_order_of_the_merges(prefix: bool, tmp_path: Path) -> None:
    tokens, scores, types = pieces()
    source = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    first = Tokenizer.from_gguf(source, "file")
    (tmp_path / "tokenizer.json").write_text(first.to_json(), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(first.config()), encoding="utf-8")
    keys = tokenizer_keys(Tokenizer.from_folder(tmp_path), len(tokens), "folder")
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.tokens"] == tokens
    assert keys["tokenizer.ggml.token_type"].tolist() == types
    assert keys["tokenizer.ggml.add_space_prefix"] == prefix
    assert keys["tokenizer.ggml.bos_token_id"] == 1
    assert keys["tokenizer.ggml.unknown_token_id"] == 0
    joined = np.arange(259, 266)  # the pieces that arise by joining
    assert (np.diff(keys["tokenizer.ggml.scores"][joined]) < 0).all()
    again = Tokenizer.from_gguf(keys, "keys")
    for text in ("the inner thing", "  in the\nend", "über"):
        assert again.encode(text) == first.encode(text)


def test_an_order_that_no_scores_give_is_refused(tmp_path: Path) -> None:
    vocabulary = {p: i for i, p in enumerate(["a", "b", "ab", "ba", "aba", "▁"])}
    merges = [("a", "b"), ("ab", "a"), ("b", "a"), ("a", "ba")]  # the two ways to aba are not neighbours
    inner = Inner(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=False))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Replace("▁", " ")
    with pytest.raises(UnsupportedError, match="order that no scores give"):
        tokenizer_keys(saved(inner, tmp_path), 6, "model")


def test_smollm2s_own_keys_come_back(smollm2_gguf: Path, tmp_path: Path) -> None:
    with GGUFFile(smollm2_gguf) as file:
        first = Tokenizer.from_gguf(file.metadata, "file")
        (tmp_path / "tokenizer.json").write_text(first.to_json(), encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(first.config()), encoding="utf-8")
        keys = tokenizer_keys(Tokenizer.from_folder(tmp_path), 49152, "folder")
        for name in ("model", "pre", "tokens", "merges", "bos_token_id", "eos_token_id", "add_bos_token"):
            assert keys[f"tokenizer.ggml.{name}"] == file.metadata[f"tokenizer.ggml.{name}"], name
        assert np.array_equal(keys["tokenizer.ggml.token_type"], file.metadata["tokenizer.ggml.token_type"])
        assert keys["tokenizer.chat_template"] == file.metadata["tokenizer.chat_template"]
