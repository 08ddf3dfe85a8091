"""A tokenizer as the ``tokenizer.*`` keys of a GGUF file: the inverse of gguf_vocab.py.

Two kinds can be said: byte-level BPE ("gpt2") whose rule for cutting text is one that `tokenizer.ggml.pre` has a name
for, and SentencePiece BPE ("llama"), whose merge list becomes one score a piece. Nothing is taken on trust: the keys
are read back, and must cut a sample of text as the tokenizer itself does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.checkpoints.gguf_vocab import PRE_TOKENIZERS, read_vocabulary
from gossamer.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from gossamer.checkpoints.tokenizer import Tokenizer

__all__ = ["tokenizer_keys"]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# How published tokenizers spell parts of the rules that gguf_vocab.py spells shorter.
_SPELLINGS = (
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:'(?:[sdmt]|ll|re|ve))"),
    ("(?i:[sdmt]|ll|ve|re)", "(?i:[sdmt]|ll|re|ve)"),
    ("'(?i:[sdmt]|ll|re|ve)", "(?i:'(?:[sdmt]|ll|re|ve))"),
    ("'s|'t|'re|'ve|'m|'ll|'d| ?", "'(?:[sdmt]|ll|re|ve)| ?"),
)
_GPT2 = r"'(?:[sdmt]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own

# Words, contractions, numbers, punctuation, spaces, line ends, other scripts, symbols.
_SAMPLE = (
    "The quick brown fox jumps over the lazy dog. It's what they're saying, isn't it? I'LL SEE.\n\n"
    "In 2024, 1234567 people paid $3.99 each (about 12%).  Two spaces,   three;\ttabs\n  and\n\n\nlines.   \n"
    "def f(x): return x**2 + self._value  # CamelCase snake_case HTTPServer\n"
    "Größe café naïve Ελληνικά Привет мир 你好，世界 こんにちは 안녕하세요 مرحبا 🙂👍 — “quotes” …\n"
)


def tokenizer_keys(tokenizer: Tokenizer, rows: int, where: str) -> dict[str, Any]:
    """The keys of a tokenizer for a model whose embedding has ``rows`` rows.

    Lists of texts come as lists, lists of numbers as numpy arrays, the rest as str, int and bool. Rows beyond the
    vocabulary become unused tokens. UnsupportedError: a kind of tokenizer that GGUF has no words for.
    """
    inner = json.loads(tokenizer.to_json())
    model = inner.get("model", {})
    if model.get("type") != "BPE":
        raise UnsupportedError(
            f"{where}: the tokenizer is of the kind {model.get('type')!r}, and GGUF files are written for BPE only."
        )
    tokens, types = _tokens(tokenizer, model, rows, where)
    bytewise = "ByteLevel" in _steps(inner.get("pre_tokenizer"))
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2" if bytewise else "llama",
        "tokenizer.ggml.pre": _pre(inner, where) if bytewise else "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    if not merges:
        raise UnsupportedError(f"{where}: the tokenizer has no merges, and GGUF holds no empty list of them.")
    if bytewise:
        keys["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    else:
        keys["tokenizer.ggml.scores"] = _scores(merges, tokens, types, where)
        keys["tokenizer.ggml.add_space_prefix"] = _has_prefix(inner)
    ends = tokenizer.eos_ids
    named = {"bos": tokenizer.bos_id, "eos": ends[0] if ends else None, "eot": ends[1] if len(ends) > 1 else None}
    unknown = np.flatnonzero(types == _UNKNOWN)
    named["unknown"] = int(unknown[0]) if len(unknown) else None
    keys |= {f"tokenizer.ggml.{name}_token_id": i for name, i in named.items() if i is not None}
    keys["tokenizer.ggml.add_bos_token"] = tokenizer.add_bos
    keys["tokenizer.ggml.add_eos_token"] = False
    if tokenizer.chat_template:
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    _check(tokenizer, keys, where)
    return keys


def _tokens(tokenizer: Tokenizer, model: Any, rows: int, where: str) -> tuple[list[str], Any]:
    """The text and the type of every row of the embedding."""
    by_id = {i: text for text, i in tokenizer.inner.get_vocab(with_added_tokens=True).items()}
    if by_id and max(by_id) >= rows:
        raise CheckpointError(
            f"{where}: the tokenizer has a token {max(by_id)}, and the embedding only {rows} rows; "
            "take both from one model."
        )
    taken = set(by_id.values())
    types = np.full(rows, _NORMAL, np.int32)
    tokens = []
    for i in range(rows):
        text = by_id.get(i)
        if text is None:
            text, types[i] = f"[PAD{i}]", _UNUSED
            if text in taken:
                raise UnsupportedError(f"{where}: the name {text!r}, which fills a hole in the vocabulary, is taken.")
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[i] = _BYTE
        tokens.append(text)
    for i, token in tokenizer.inner.get_added_tokens_decoder().items():
        types[i] = _CONTROL if token.special else _USER
    unknown = model.get("unk_token")
    if unknown is not None and unknown in taken and model.get("byte_fallback"):
        types[tokens.index(unknown)] = _UNKNOWN
    return tokens, types


def _steps(part: Any) -> dict[str, Any]:
    """The steps of a normalizer, pre-tokenizer or decoder, by type."""
    if not isinstance(part, dict):
        return {}
    steps = part.get("pretokenizers") or part.get("normalizers") or part.get("decoders") or [part]
    return {step.get("type", ""): step for step in steps if isinstance(step, dict)}


def _pre(inner: Any, where: str) -> str:
    """The name of the rule by which a byte-level tokenizer cuts text."""
    splits = [_spelled(pattern) for pattern in _patterns(inner["pre_tokenizer"], where)]
    if set(_steps(inner.get("normalizer"))) - {"NFC"}:  # which llama.cpp leaves to the caller
        raise UnsupportedError(f"{where}: the tokenizer rewrites its text before cutting it, which GGUF cannot say.")
    whole = bool(inner["model"].get("ignore_merges"))
    for name, pre in PRE_TOKENIZERS.items():
        if [_spelled(p) for p in pre.splits] == splits and pre.whole_words == whole:
            return name
    raise UnsupportedError(
        f"{where}: the tokenizer cuts text by a rule that `tokenizer.ggml.pre` has no name for here; "
        "use a model of a known family."
    )


def _patterns(pre: Any, where: str) -> list[str]:
    """What a byte-level pre-tokenizer cuts by, in turn, as regular expressions."""
    found: list[str] = []
    for step in pre.get("pretokenizers") or [pre]:
        kind = step.get("type")
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step.get("pattern", {})
            found.append(pattern.get("Regex") or _escaped(pattern.get("String", "")))
        elif kind == "Digits" and step.get("individual_digits"):
            found.append(r"\p{N}")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                found.append(_GPT2)
        else:
            raise UnsupportedError(f"{where}: the tokenizer cuts text by the step {kind!r}, which GGUF cannot say.")
    return found


def _escaped(text: str) -> str:
    return "".join("\\" + c if c in r"\.^$*+?()[]{}|" else c for c in text)


def _spelled(pattern: str) -> str:
    for long, short in _SPELLINGS:
        pattern = pattern.replace(long, short)
    return pattern


def _has_prefix(inner: Any) -> bool:
    """Whether a space is put before a text."""
    normalizer, pre = _steps(inner.get("normalizer")), _steps(inner.get("pre_tokenizer"))
    return "Prepend" in normalizer or pre.get("Metaspace", {}).get("prepend_scheme") in ("first", "always")


def _scores(merges: Sequence[tuple[str, ...]], tokens: list[str], types: Any, where: str) -> Any:
    """One float32 a token, such that joining the best-scored neighbours first is joining in the order of the merges.

    SentencePiece has a score for each piece, a merge list a rank for each way to join it: the ranks of a piece must lie
    together, and then its place among the others is its score.
    """
    ids = {text: i for i, text in enumerate(tokens)}
    scores = np.full(len(tokens), -(len(merges) + 1), np.float32)
    rank, before = 0, ""
    done: set[str] = set()
    for pair in merges:
        piece = "".join(pair)
        if piece != before:
            if piece in done:
                if types[ids[piece]] == _NORMAL:
                    raise UnsupportedError(
                        f"{where}: the tokenizer joins pieces in an order that no scores give, so GGUF cannot say it."
                    )
                continue
            done.add(piece)
            before = piece
            rank += 1
        if piece in ids:
            scores[ids[piece]] = -rank
    return scores


def _check(tokenizer: Tokenizer, keys: dict[str, Any], where: str) -> None:
    """Reads the keys back and compares how text is cut."""
    from tokenizers import Tokenizer as Inner

    back = read_vocabulary(keys, where).inner
    mine = Inner.from_str(tokenizer.to_json())
    for line in [*_SAMPLE.splitlines(keepends=True), _SAMPLE]:
        if back.encode(line, add_special_tokens=False).ids != mine.encode(line, add_special_tokens=False).ids:
            raise UnsupportedError(
                f"{where}: the tokenizer cuts {line[:30]!r} in a way that its GGUF keys do not; it cannot be written."
            )
