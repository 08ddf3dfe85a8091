"""Tokenizers from GGUF metadata and from folders, against transformers and against their own definitions."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.checkpoints.gguf import GGUFFile
from gossamer.checkpoints.gguf_vocab import PRE_TOKENIZERS
from gossamer.checkpoints.tokenizer import Tokenizer
from gossamer.errors import CheckpointError, UnsupportedError, UsageError

os.environ["HF_HUB_OFFLINE"] = "1"
WHERE = "model.gguf"
FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

TEXTS = [
    "",
    "The capital of France is Paris.",
    " leading and trailing ",
    "It's we'll I'M don't SHE'LL o'clock",
    "def f(x):\n    return [x**2 for x in range(10)]  # squares\n\n\tdone\n",
    '{"a": [1, 2.5e-3], "b": null}; x != y && z->w',
    "1234567 3.14159 1,000,000 2024-02-29",
    "naïve café Ångström \u0301e e\u0301",
    "中文字符和日本語テキスト 한국어 العربية עברית हिन्दी",
    "🙂 👩‍👩‍👧‍👦 🇫🇷 ﷺ ꙮ 𝔘𝔫𝔦",
    "   ",
    "\n\n\n\r\n \t \n",
    "a" * 300,
    "word " * 100,
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "<start_of_turn>user\nHello<end_of_turn>\n<h1>x</h1></s>",
    "<0x0A> is not a byte",
    "\x00\x01\x7f\u2028\u3000x\ufeff",
    "half a char: \ufffd\ufffd",
]
SPACED = ["a  1", "x = 1   2\n    3\n\t4", "  7", " " * 20]  # spaces before digits and at the end


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    with GGUFFile(smollm2_gguf) as file:
        return Tokenizer.from_gguf(file.metadata, smollm2_gguf.name)


@pytest.fixture(scope="module")
def smollm2_oracle(smollm2_gguf: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.fixture(scope="module")
def gemma3(gemma3_gguf: Path) -> Tokenizer:
    with GGUFFile(gemma3_gguf) as file:
        return Tokenizer.from_gguf(file.metadata, gemma3_gguf.name)


@pytest.fixture(scope="module")
def gemma3_oracle(gemma3_gguf: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gemma3_gguf.parent, gguf_file=gemma3_gguf.name)


def assert_agrees(tokenizer: Tokenizer, oracle: Any, texts: list[str]) -> None:
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text), text
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special=skip) == oracle.decode(ids, skip_special_tokens=skip), text


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> str:
    stream = tokenizer.stream(skip_special=skip)
    return "".join(stream.push(i) for i in ids) + stream.flush()


# The two real models.


def test_smollm2_agrees_with_transformers(smollm2: Tokenizer, smollm2_oracle: Any) -> None:
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_id, smollm2.add_bos, smollm2.add_eos) == (1, False, False)
    assert smollm2.eos_ids == (2, 0)  # <|im_end|>, then <|endoftext|>
    assert_agrees(smollm2, smollm2_oracle, TEXTS)


def test_smollm2_splits_digits_as_its_own_pre_tokenizer_does(smollm2: Tokenizer, smollm2_oracle: Any) -> None:
    # transformers drops the pre-tokenizer "smollm" of the file: put back what SmolLM's tokenizer.json says.
    from tokenizers import Tokenizer as Inner
    from tokenizers import pre_tokenizers

    reference = Inner.from_str(smollm2_oracle.backend_tokenizer.to_str())
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in TEXTS + SPACED:
        assert smollm2.encode(text) == reference.encode(text, add_special_tokens=False).ids, text
    assert any(smollm2.encode(text) != smollm2_oracle.encode(text) for text in SPACED)


@pytest.mark.slow  # transformers takes 16 seconds to derive the merges
def test_gemma3_agrees_with_transformers(gemma3: Tokenizer, gemma3_oracle: Any) -> None:
    assert gemma3.vocab_size == 262144
    assert (gemma3.bos_id, gemma3.eos_ids, gemma3.add_bos) == (2, (1, 106), True)  # <eos>, <end_of_turn>
    assert_agrees(gemma3, gemma3_oracle, [*TEXTS, *SPACED, " " * 31])


def test_gemma3_long_runs_of_spaces(gemma3: Tokenizer) -> None:
    # User-defined pieces are found in the text first, the longest (31 spaces) first.
    ids = gemma3.encode(" " * 40 + "x", bos=False)
    assert [gemma3.token_text(i) for i in ids] == [" " * 31, " " * 9, "x"]


# SmolLM2's vocabulary lacks six control characters and the first bytes of planes 4 to 11.
NOT_IN_SMOLLM2 = "\x04\x06\x13\x14\x16\x1d"


@FUZZ
@given(text=st.text(st.characters(codec="utf-8", exclude_characters=NOT_IN_SMOLLM2, max_codepoint=0x3FFFF)))
def test_round_trip(smollm2: Tokenizer, text: str) -> None:
    ids = smollm2.encode(text, special=False)
    assert smollm2.decode(ids, skip_special=False) == text
    assert streamed(smollm2, ids) == text


@FUZZ
@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_round_trip_sentencepiece(gemma3: Tokenizer, text: str) -> None:
    ids = gemma3.encode(text, special=False)
    assert ids[0] == gemma3.bos_id
    assert gemma3.decode(ids) == text
    assert streamed(gemma3, ids) == text


def test_bytes_outside_the_vocabulary_disappear(smollm2: Tokenizer, smollm2_oracle: Any) -> None:
    # As everywhere: there is no token to stand for them.
    for char in NOT_IN_SMOLLM2:
        ids = smollm2.encode(f"a{char}b")
        assert ids == smollm2_oracle.encode(f"a{char}b") == smollm2.encode("a") + smollm2.encode("b")


@FUZZ
@given(ids=st.lists(st.integers(0, 49160) | st.integers(0, 300), max_size=60), skip=st.booleans())
def test_streaming_equals_decode(smollm2: Tokenizer, ids: list[int], skip: bool) -> None:
    assert streamed(smollm2, ids, skip) == smollm2.decode(ids, skip_special=skip)


@FUZZ
@given(ids=st.lists(st.integers(0, 262150) | st.integers(0, 520), max_size=60), skip=st.booleans())
def test_streaming_equals_decode_sentencepiece(gemma3: Tokenizer, ids: list[int], skip: bool) -> None:
    assert streamed(gemma3, ids, skip) == gemma3.decode(ids, skip_special=skip)


def test_streaming_is_prompt(smollm2: Tokenizer) -> None:
    stream = smollm2.stream()
    words = smollm2.encode("The capital of France")
    assert [stream.push(i) for i in words] == ["The", " capital", " of", " France"]
    assert [stream.push(i) for i in smollm2.encode(" 🦙 ok")] == [" ", "", "🦙", " ok"]
    assert stream.flush() == ""


def test_streaming_half_characters(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("🦙")[:-1]
    stream = smollm2.stream()
    assert [stream.push(i) for i in ids] == ["", ""]
    assert stream.flush() == "\ufffd" == smollm2.decode(ids)
    assert stream.push(smollm2.encode("a")[0]) == "a"
    # A model gone wrong can write such bytes for ever: neither held back for ever nor slower and slower.
    stray = smollm2.encode("🦙")[-1:] * 400
    stream = smollm2.stream()
    early = "".join(map(stream.push, stray))
    assert len(early) == 399
    assert len(stream._window) <= 16
    assert early + stream.flush() == smollm2.decode(stray)


# Special tokens.


def test_special_tokens_in_text(smollm2: Tokenizer) -> None:
    text = "<|im_start|>user\nhi<|im_end|>"
    parsed, plain = smollm2.encode(text), smollm2.encode(text, special=False)
    assert parsed[0] == 1
    assert parsed[-1] == 2
    assert not {1, 2} & set(plain)
    assert smollm2.decode(plain) == smollm2.decode(parsed, skip_special=False) == text
    assert smollm2.decode(parsed) == "user\nhi"
    assert smollm2.encode(text) == parsed  # the choice leaves no trace
    assert smollm2.token_text(1) == "<|im_start|>"


def test_bos_never_twice(gemma3: Tokenizer, smollm2: Tokenizer) -> None:
    assert gemma3.encode("hi") == gemma3.encode("<bos>hi") == [2, *gemma3.encode("hi", bos=False)]
    assert gemma3.encode("<bos>hi", bos=False)[0] == 2
    assert smollm2.encode("hi", bos=True) == [1, *smollm2.encode("hi")]
    assert gemma3.encode("") == [2]


def test_token_text(smollm2: Tokenizer) -> None:
    for text in (" the", "\n", "def"):
        assert [smollm2.token_text(i) for i in smollm2.encode(text)] == [text]
    for bad in (-1, 49152, 1 << 40):
        with pytest.raises(UsageError, match="49152 tokens"):
            smollm2.token_text(bad)


def test_not_unicode(smollm2: Tokenizer) -> None:
    with pytest.raises(UsageError, match="character 1"):
        smollm2.encode("a\ud800")
    with pytest.raises(UsageError, match="-5"):
        smollm2.decode([3, -5])


# Pre-tokenizers.

ALPHABET = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
ALPHABET += [chr(256 + i) for i in range(256 - len(ALPHABET))]


def byte_bpe(**changes: Any) -> dict[str, Any]:
    """A small sound file: the 256 bytes, two merges, two control tokens."""
    tokens = [*ALPHABET, "Ġt", "he", "<s>", "<|im_end|>"]
    base = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array([1] * 258 + [3, 3], np.int32),
        "merges": ["Ġ t", "h e"],
        "bos_token_id": 258,
        "eos_token_id": 258,
    }
    return prefixed({**base, **changes})


def prefixed(keys: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{k}": v for k, v in keys.items() if v is not None}


SPLITS = [
    ("gpt-2", "I'm HE'S 12345  x!\n\ny", ["I", "'m", " HE", "'", "S", " 12345", " ", " x", "!", "\n", "\n", "y"]),
    ("smollm", "a 12  3b", ["a", " ", "1", "2", "  ", "3", "b"]),
    ("default", "a+b 12345$.", ["a", "+", "b", " ", "123", "45", "$."]),
    ("llama-bpe", "I'M 12345  x!\n\ny", ["I", "'M", " ", "123", "45", " ", " x", "!\n\n", "y"]),
    ("qwen2", "I'M 123 (x)\r\n z", ["I", "'M", " ", "1", "2", "3", " (", "x", ")\r\n", " z"]),
    ("qwen35", "ki\u0301t ?\u0301", ["ki\u0301t", " ?", "\u0301"]),
    ("tekken", "helloWorld 12/\n", ["hello", "World", " ", "1", "2", "/\n"]),
    ("gpt-4o", "helloWorld's 1234/\n", ["hello", "World's", " ", "123", "4", "/\n"]),
    ("deepseek-v3", "x 1234.foo 漢字ab", ["x", " ", "123", "4", ".foo", " ", "漢字", "ab"]),
    ("deepseek-coder", "if x:\n 12漢字", ["if", " x", ":", "\n", " ", "1", "2", "漢字"]),
    ("falcon", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
]


@pytest.mark.parametrize(("pre", "text", "pieces"), SPLITS, ids=[s[0] for s in SPLITS])
def test_pre_tokenizers(pre: str, text: str, pieces: list[str]) -> None:
    tokenizer = Tokenizer.from_gguf(byte_bpe(pre=pre), WHERE)
    spans = [span for _, span in tokenizer.inner.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[a:b] for a, b in spans] == pieces


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
@settings(deadline=None, max_examples=15)
@given(text=st.text() | st.text(string.ascii_letters + " '\n\t123.,"))
def test_every_pre_tokenizer_keeps_the_text(pre: str, text: str) -> None:
    tokenizer = Tokenizer.from_gguf(byte_bpe(pre=pre), WHERE)
    assert tokenizer.decode(tokenizer.encode(text, special=False, bos=False)) == text


def test_unknown_pre_tokenizer() -> None:
    with pytest.raises(UnsupportedError, match=r"model.gguf: the pre-tokenizer 'wlwl'.*llama-bpe.*smollm"):
        Tokenizer.from_gguf(byte_bpe(pre="wlwl"), WHERE)


def test_whole_words_before_merges() -> None:
    # Llama 3 takes "the" whole although no merge makes it; GPT-2 cannot.
    tokens = [*byte_bpe()["tokenizer.ggml.tokens"], "the"]
    changes = {"tokens": tokens, "token_type": [1] * 258 + [3, 3, 1]}
    assert Tokenizer.from_gguf(byte_bpe(pre="llama-bpe", **changes), WHERE).encode("the") == [258, 260]
    assert len(Tokenizer.from_gguf(byte_bpe(**changes), WHERE).encode("the")) == 2


def test_turn_ends_are_found_by_name() -> None:
    assert Tokenizer.from_gguf(byte_bpe(), WHERE).eos_ids == (258, 259)
    ordinary = byte_bpe(token_type=[1] * 258 + [3, 1])
    assert Tokenizer.from_gguf(ordinary, WHERE).eos_ids == (258,)
    assert Tokenizer.from_gguf(byte_bpe(eos_token_id=256, eot_token_id=257), WHERE).eos_ids == (256, 257, 259)


# SentencePiece.

WORDS = ["▁the", "▁t", "he", "▁then", "th", "▁a", "an", "nd", "▁and", "in", "the", "▁▁", "en", "ing", "▁in"]


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """Llama 2 in small: <unk> <s> </s>, 256 bytes, letters, and words in the order of their scores."""
    letters = sorted(set("".join(WORDS)))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *WORDS, *letters]
    base = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.array([0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)], np.float32),
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259), np.int32),
    }
    return prefixed({**base, **changes})


def best_pairs(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's own rule, written out: join the best-scoring neighbours, leftmost first."""
    parts = list(text)
    while True:
        joined = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not joined:
            return parts
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@FUZZ
@given(text=st.text("thendaig ", min_size=1, max_size=30), prefix=st.booleans())
def test_merges_follow_the_scores(text: str, prefix: bool) -> None:
    metadata = sentencepiece(add_space_prefix=prefix)
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens[259:], metadata["tokenizer.ggml.scores"][259:].tolist()))
    tokenizer = Tokenizer.from_gguf(metadata, WHERE)
    expected = best_pairs("▁" * prefix + text.replace(" ", "▁"), scores)
    assert [tokens[i] for i in tokenizer.encode(text, bos=False)] == expected


@FUZZ
@given(text=st.text(st.sampled_from("thean é€🙂\n\u0301") | st.characters(exclude_characters="▁", codec="utf-8")))
def test_byte_fallback_and_space_prefix(text: str) -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece(), WHERE)
    ids = tokenizer.encode(text, special=False)
    assert ids[0] == tokenizer.bos_id == 1
    assert 0 not in ids  # never <unk>
    assert tokenizer.decode(ids) == text == streamed(tokenizer, ids)


@FUZZ
@given(ids=st.lists(st.integers(0, 300) | st.integers(3, 258), max_size=40), skip=st.booleans())
def test_streaming_byte_runs(ids: list[int], skip: bool) -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece(), WHERE)
    assert streamed(tokenizer, ids, skip) == tokenizer.decode(ids, skip_special=skip)


def test_sentencepiece_defaults() -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece(), WHERE)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (2,), True)
    # Each stretch of text after a special token gets a space, as llama.cpp does.
    after = tokenizer.encode("the</s>the")
    assert [tokenizer.token_text(i) for i in after] == ["<s>", " the", "</s>", " the"]
    assert tokenizer.token_text(3 + 0x41) == "A"


def test_user_defined_tokens() -> None:
    types = np.array([2, 3, 3] + [6] * 256 + [4] + [1] * (len(sentencepiece()["tokenizer.ggml.tokens"]) - 260))
    tokenizer = Tokenizer.from_gguf(sentencepiece(token_type=types), WHERE)
    assert 259 in tokenizer.encode("x▁thex", special=False)  # found whole in raw text, whatever is parsed
    assert [t.content for t in tokenizer.inner.get_added_tokens_decoder().values() if not t.special] == ["▁the"]
    assert 1 not in tokenizer.encode("<s>", special=False, bos=False)


# Damaged metadata.

SHORT = np.ones(5, np.int32)
DAMAGED: list[tuple[Callable[..., dict[str, Any]], dict[str, Any], str]] = [
    (byte_bpe, {"model": None}, "tokenizer.ggml.model"),
    (byte_bpe, {"model": 3}, "'tokenizer.ggml.model' is a int, not text"),
    (byte_bpe, {"pre": ["gpt-2"]}, "tokenizer.ggml.pre"),
    (byte_bpe, {"tokens": None}, "missing or empty"),
    (byte_bpe, {"tokens": []}, "missing or empty"),
    (byte_bpe, {"tokens": np.empty(0)}, "missing or empty"),
    (byte_bpe, {"tokens": "abc"}, "a list of texts"),
    (byte_bpe, {"tokens": [*ALPHABET, 1, "he", "<s>", "x"]}, "a list of texts"),
    (byte_bpe, {"tokens": [*ALPHABET, "Ġt", "he", "<s>", "he"]}, "the tokens 257 and 259 are both 'he'"),
    (byte_bpe, {"tokens": [*ALPHABET, "Ġt", "he", "<s>", "\ud800"]}, "cannot be built"),
    (byte_bpe, {"token_type": SHORT}, "5 entries for 260 tokens"),
    (byte_bpe, {"token_type": np.ones(260, np.float32)}, "whole numbers"),
    (byte_bpe, {"token_type": [[1], [1, 2]]}, "whole numbers"),
    (byte_bpe, {"token_type": 7}, "whole numbers"),
    (byte_bpe, {"merges": None}, "'tokenizer.ggml.merges' is missing"),
    (byte_bpe, {"merges": SHORT}, "a list of texts"),
    (byte_bpe, {"merges": ["Ġ t", "h qq"]}, "merge 1, 'h qq', needs 'qq'"),
    (byte_bpe, {"merges": ["Ġ t", "h t"]}, "merge 1, 'h t', needs 'ht'"),
    (byte_bpe, {"merges": ["Ġt"]}, "merge 0"),
    (byte_bpe, {"merges": [""]}, "merge 0"),
    (byte_bpe, {"bos_token_id": 260}, "'tokenizer.ggml.bos_token_id' is 260 but the vocabulary has 260"),
    (byte_bpe, {"eos_token_id": -1}, "is -1"),
    (byte_bpe, {"eot_token_id": "2"}, "a token id"),
    (byte_bpe, {"unknown_token_id": True}, "a token id"),
    (byte_bpe, {"add_bos_token": 1}, "true or false"),
    (byte_bpe, {"add_bos_token": True, "bos_token_id": None}, "'bos_token_id' is missing"),
    (sentencepiece, {"scores": None}, "'tokenizer.ggml.scores' is missing"),
    (sentencepiece, {"scores": SHORT}, "5 entries"),
    (sentencepiece, {"scores": [float("nan")] * len(sentencepiece()["tokenizer.ggml.tokens"])}, "NaN"),
    (sentencepiece, {"token_type": [6] * len(sentencepiece()["tokenizer.ggml.tokens"])}, "marked as a byte"),
    (sentencepiece, {"tokens": ["a" * 1000], "scores": [0.0], "token_type": [1]}, "1000 characters"),
]


@pytest.mark.parametrize(("make", "changes", "reason"), DAMAGED)
def test_damaged_metadata(make: Callable[..., dict[str, Any]], changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_gguf(make(**changes), WHERE)
    message = str(caught.value)
    assert message.startswith("model.gguf: ")
    assert reason in message
    assert "\n" not in message


def test_template_of_wrong_type() -> None:
    with pytest.raises(CheckpointError, match=r"'tokenizer.chat_template' is a list"):
        Tokenizer.from_gguf({**byte_bpe(), "tokenizer.chat_template": ["x"]}, WHERE)


@pytest.mark.parametrize("kind", ["t5", "bert", "rwkv"])
def test_unknown_kind(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'{kind}' are not read; known kinds: gpt2, llama"):
        Tokenizer.from_gguf(byte_bpe(model=kind), WHERE)


def test_unmarked_and_empty_tokens() -> None:
    tokens = [*ALPHABET, "Ġt", "he", "<s>", ""]
    tokenizer = Tokenizer.from_gguf(byte_bpe(tokens=tokens, token_type=None), WHERE)
    assert tokenizer.vocab_size == 260
    assert tokenizer.encode("<s>") == [258]  # what begins or ends a text is special even if not marked
    assert tokenizer.token_text(259) == "[EMPTY_259]"


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=8,
)


@FUZZ
@given(data=st.data(), make=st.sampled_from([byte_bpe, sentencepiece]), value=junk)
def test_any_junk_in_one_key(data: st.DataObject, make: Callable[..., dict[str, Any]], value: Any) -> None:
    metadata = make()
    metadata[data.draw(st.sampled_from(sorted(metadata)))] = value
    try:
        ids = Tokenizer.from_gguf(metadata, WHERE).encode("the cat")
    except CheckpointError as err:
        ids, message = [], str(err)
    else:
        message = WHERE
    assert message.startswith(WHERE)
    assert all(i < 400 for i in ids)


# Folders.


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer.config()), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(tokenizer.eos_ids)}))
    return folder


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_saved_folder_is_the_same_tokenizer(name: str, smollm2: Tokenizer, gemma3: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = {"smollm2": smollm2, "gemma3": gemma3}[name]
    again = Tokenizer.from_folder(save(tokenizer, tmp_path))
    for field in ("vocab_size", "bos_id", "eos_ids", "add_bos", "chat_template"):
        assert getattr(again, field) == getattr(tokenizer, field), field
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS + SPACED:
        ids = tokenizer.encode(text)
        assert ids == again.encode(text) == theirs.encode(text), text
        assert tokenizer.decode(ids) == again.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert theirs.chat_template == tokenizer.chat_template


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(Tokenizer.from_gguf(byte_bpe(), WHERE), tmp_path)


def test_folder_without_configs(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (None, (259,), False)
    with pytest.raises(UsageError, match="bos=False"):
        tokenizer.encode("x", bos=True)


def test_folder_bos_from_the_post_processor(tmp_path: Path) -> None:
    folder = save(Tokenizer.from_gguf(byte_bpe(add_bos_token=True), WHERE), tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["add_bos_token"]
    config["bos_token"] = {"content": "<s>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.add_bos
    assert tokenizer.encode("t")[0] == tokenizer.bos_id == 258


def test_folder_templates(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.from_folder(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J", encoding="utf-8")
    assert Tokenizer.from_folder(folder).chat_template == "J"


def test_folder_with_truncation_and_padding(folder: Path) -> None:
    from tokenizers import Tokenizer as Inner

    inner = Inner.from_file(str(folder / "tokenizer.json"))
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    inner.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.from_folder(folder).encode("abcd")) == 4


@pytest.mark.parametrize("cut", [0, 1, 200, 3000, -1])
def test_damaged_tokenizer_json(folder: Path, cut: int) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*fetch"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", b"{}", "cannot be built"),
        ("tokenizer.json", b"\xff\xfe", "cannot be read as text"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "not valid JSON"),
        ("tokenizer_config.json", b"[]", "holds a list"),
        ("tokenizer_config.json", b'{"bos_token": "<nope>"}', "'bos_token' is '<nope>'"),
        ("tokenizer_config.json", b'{"eos_token": 3}', "'eos_token' is 3"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "'chat_template' is a int"),
        ("generation_config.json", b'{"eos_token_id": [2, 9999]}', "names 9999"),
        ("generation_config.json", b'{"eos_token_id": [-1]}', "names -1"),
        ("generation_config.json", b'{"eos_token_id": "2"}', "names '2'"),
        ("generation_config.json", b'{"eos_token_id": 1e400}', "names inf"),
    ],
)
def test_damaged_folder(folder: Path, name: str, content: bytes, reason: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(folder)
    assert reason in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no tokenizer\.json; point"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"only tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)


def test_decoder_of_another_kind_of_model(folder: Path) -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders

    inner = Inner.from_file(str(folder / "tokenizer.json"))
    inner.decoder = decoders.WordPiece()
    inner.save(str(folder / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match=r"'WordPiece'.*known: ByteFallback"):
        Tokenizer.from_folder(folder)
