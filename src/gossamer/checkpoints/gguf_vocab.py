"""The vocabulary in a GGUF file's metadata, as a `tokenizers` tokenizer.

Two kinds are read, named by `tokenizer.ggml.model`:

    gpt2    byte-level BPE: text is cut by the regular expressions that `tokenizer.ggml.pre` names,
            each byte becomes one printable character, pairs join in the order of the merge list
    llama   SentencePiece BPE: spaces become "▁", pairs join in the order of the scores, and a
            character outside the vocabulary falls back to its bytes, spelled <0x00> to <0xFF>

Where readers of GGUF disagree, llama.cpp is the definition, since it is what the files are made for:

* `pre` is always obeyed. (transformers 5.23 falls back to GPT-2's rule for names it does not list,
  smollm among them, and so joins a space to the digit behind it.)
* Tokens marked "user defined" are found whole in the raw text, the longest first. Gemma stores runs of
  spaces this way; more than 31 spaces therefore split as 31 + rest, as SentencePiece does.
* No Unicode normalisation is applied, for no stored field asks for it.
* With a space prefix, every stretch of text after a special token gets one, as at the start.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import CheckpointError, UnsupportedError

__all__ = ["PRE_TOKENIZERS", "TURN_ENDS", "Vocabulary", "guarded", "read_vocabulary", "with_bos"]

# Token types of the format.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6

# Finding the splits of a SentencePiece piece takes the square of its length; real ones stay under 100.
_MAX_PIECE = 512

# Control tokens that end a turn whatever the metadata says: files often name only one of the two that
# their model uses. "</s>" is absent on purpose, since some vocabularies hold it as a piece of HTML.
TURN_ENDS = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"}
    | {"<end_of_turn>", "<end_of_utterance>", "<EOT>", "<｜end▁of▁sentence｜>"}
)


def _cased(word: str = r"\p{L}+", digits: str = r"\p{N}", *, symbol: str = r"[^\s\p{L}\p{N}]") -> str:
    """The rule of the GPT-4 generation: contractions in any case, a word with the sign before it."""
    return (
        r"(?i:'(?:[sdmt]|ll|re|ve))|[^\r\n\p{L}\p{N}]?"
        + word
        + "|"
        + digits
        + "| ?"
        + symbol
        + r"+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _camel(digits: str, contraction: str = "") -> str:
    """The rule of Tekken and GPT-4o: as above, and a word also ends where lower case meets upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    sign = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{sign}{upper}*{lower}+{contraction}|{sign}{upper}+{lower}*{contraction}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = r"'(?:[sdmt]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _cased(digits=r"\p{N}{1,3}")
_DEEPSEEK3 = (
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Pre:
    """splits: applied in turn; what a pattern matches, and what lies between matches, are pieces.
    whole_words: a piece that is itself a token is taken without merging. add_bos: if the file is silent."""

    splits: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_FAMILIES: tuple[tuple[str, _Pre], ...] = (
    ("default", _Pre((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}"))),
    ("gpt-2 phi-2 mpt olmo gigachat a.x-4.0 mellum trillion granite-docling", _Pre((_GPT2,))),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", _Pre((r"\p{N}", _GPT2))),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2", _Pre((_LLAMA3,), True, True)),
    ("dbrx smaug-bpe chatglm-bpe", _Pre((_LLAMA3,))),
    ("glm4", _Pre((_LLAMA3,), True)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open grok-2", _Pre((_cased(),))),
    ("qwen35", _Pre((_cased(r"[\p{L}\p{M}]+", symbol=r"[^\s\p{L}\p{M}\p{N}]"),))),
    ("tekken", _Pre((_camel(r"\p{N}"),), True, True)),
    ("gpt-4o llama4 kanana2", _Pre((_camel(r"\p{N}{1,3}", r"(?i:'(?:[sdmt]|ll|re|ve))?"),))),
    ("deepseek-v3 hunyuan-dense joyai-llm", _Pre((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3))),
    ("deepseek-coder", _Pre(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"))),
    ("falcon", _Pre((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9]{3}"))),
)
PRE_TOKENIZERS = {name: pre for names, pre in _FAMILIES for name in names.split()}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A `tokenizers.Tokenizer` and what it does not say about itself."""

    inner: Any
    size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    chat_template: str | None


def read_vocabulary(metadata: Mapping[str, Any], where: str) -> Vocabulary:
    """Build the tokenizer that the metadata of the file `where` describes.

    CheckpointError: a key is missing, of the wrong type or contradicts another. UnsupportedError: a
    kind of vocabulary or of pre-tokenizer that is not known.
    """
    keys = _Keys(metadata, where)
    kind = keys.text("model")
    if kind is None:
        raise CheckpointError(
            f"{where}: the metadata has no 'tokenizer.ggml.model', so it holds no vocabulary; use a complete model file"
        )
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(f"{where}: vocabularies of kind '{kind}' are not read; known kinds: gpt2, llama")
    tokens = _tokens(keys)
    types = keys.numbers("token_type", len(tokens), "iu")
    if types is None:
        types = np.full(len(tokens), _NORMAL)
    ids = {text: i for i, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(i for i, text in enumerate(tokens) if ids[text] != i)
        raise CheckpointError(
            f"{where}: the tokens {twice} and {ids[tokens[twice]]} are both {_show(tokens[twice])}; "
            "the vocabulary is damaged, fetch the file again"
        )
    bos, eos, unknown, *others = (
        keys.token_id(name + "_token_id", len(tokens)) for name in ("bos", "eos", "unknown", "eot", "eom")
    )
    if kind == "llama":  # what SentencePiece means when it says nothing; byte BPE has no such convention
        marked = [i if i < len(types) and types[i] in (_CONTROL, _UNKNOWN) else None for i in range(3)]
        bos, eos, unknown = (i if i is not None else j for i, j in zip((bos, eos, unknown), (*marked[1:], marked[0])))
    ends = [eos, *others]
    ends += sorted(ids[text] for text in TURN_ENDS if text in ids and types[ids[text]] in (_CONTROL, _USER))
    eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))

    if kind == "gpt2":
        pre = _pre_tokenizer(keys)
        inner, silent_add_bos = _byte_bpe(keys, ids, pre), pre.add_bos
    else:
        inner, silent_add_bos = _sentencepiece(keys, tokens, ids, types, unknown), True
    stated = keys.flag("add_bos_token")
    if stated and bos is None:
        raise CheckpointError(
            f"{where}: 'add_bos_token' is set but 'bos_token_id' is missing; "
            "the metadata is damaged, fetch the file again"
        )
    special = np.isin(types, (_CONTROL, _UNKNOWN))
    special[[i for i in (bos, *eos_ids) if i is not None]] = True
    _add_tokens(inner, tokens, special, types == _USER, where)
    add_bos = (silent_add_bos if stated is None else stated) and bos is not None
    if add_bos:
        assert bos is not None
        with_bos(inner, tokens[bos], bos, where)
    template = keys.text("tokenizer.chat_template", prefix="")
    return Vocabulary(inner, len(tokens), bos, eos_ids, add_bos, template)


def _tokens(keys: _Keys) -> list[str]:
    tokens = keys.strings("tokens")
    if not tokens:
        raise CheckpointError(
            f"{keys.where}: 'tokenizer.ggml.tokens' is missing or empty; use a file that holds its vocabulary"
        )
    # Some converters leave a hole in the vocabulary: it keeps its place under a name of its own.
    return [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]


def _pre_tokenizer(keys: _Keys) -> _Pre:
    name = keys.text("pre") or "default"
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedError(f"{keys.where}: the pre-tokenizer '{name}' is not known; known: {known}")
    return PRE_TOKENIZERS[name]


def _byte_bpe(keys: _Keys, ids: dict[str, int], pre: _Pre) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    lines = keys.strings("merges")
    if lines is None:
        raise CheckpointError(
            f"{keys.where}: 'tokenizer.ggml.merges' is missing; a byte BPE vocabulary needs its merge list"
        )
    # The left part may itself begin with a space, so the separator is looked for from the second character.
    merges = [(line[:cut], line[cut + 1 :]) if (cut := line.find(" ", 1)) > 0 else (line, "") for line in lines]
    for i, (left, right) in enumerate(merges):
        for part in (left, right, left + right):
            if part not in ids:
                raise CheckpointError(
                    f"{keys.where}: merge {i}, {_show(lines[i])}, needs {_show(part)}, which is not in the vocabulary; "
                    "the metadata is damaged, fetch the file again"
                )

    def build() -> Any:
        inner = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre.whole_words))
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.splits]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        inner.decoder = decoders.ByteLevel()
        return inner

    return guarded(build, keys.where)


def _sentencepiece(
    keys: _Keys, tokens: list[str], ids: dict[str, int], types: NDArray[Any], unknown: int | None
) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = keys.numbers("scores", len(tokens), "fiu")
    if scores is None:
        raise CheckpointError(
            f"{keys.where}: 'tokenizer.ggml.scores' is missing; a SentencePiece vocabulary needs its scores"
        )
    if np.isnan(scores).any():
        raise CheckpointError(f"{keys.where}: 'tokenizer.ggml.scores' holds NaN; the metadata is damaged")
    for i in np.flatnonzero(types == _BYTE):
        if not re.fullmatch("<0x[0-9A-F]{2}>", tokens[i]):
            raise CheckpointError(
                f"{keys.where}: token {i} is marked as a byte but spelled {_show(tokens[i])}, not like <0x0A>"
            )
    # Control, byte and unknown pieces never arise from text, and user-defined ones are cut out before merging.
    ordinary = [text for text, skip in zip(tokens, np.isin(types, (_UNKNOWN, _CONTROL, _USER, _BYTE))) if not skip]
    longest = max(ordinary, key=len, default="")
    if len(longest) > _MAX_PIECE:
        raise CheckpointError(
            f"{keys.where}: the token {_show(longest)} has {len(longest)} characters, more than {_MAX_PIECE}; "
            "the metadata is damaged, fetch the file again"
        )
    merges = _merges_from_scores(ordinary, ids, scores)
    fallback = all(f"<0x{byte:02X}>" in ids for byte in range(256))
    prefix = keys.flag("add_space_prefix")

    def build() -> Any:
        inner = Tokenizer(
            models.BPE(
                vocab=ids,
                merges=merges,
                unk_token=None if unknown is None else tokens[unknown],
                fuse_unk=True,
                byte_fallback=fallback,
            )
        )
        spaces: list[Any] = [normalizers.Replace(" ", "▁")]
        text: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if prefix is None or prefix:
            spaces.insert(0, normalizers.Prepend("▁"))
            text.append(decoders.Strip(" ", left=1, right=0))
        inner.normalizer = normalizers.Sequence(spaces)
        inner.decoder = decoders.Sequence(text)
        return inner

    return guarded(build, keys.where)


def _merges_from_scores(pieces: list[str], ids: dict[str, int], scores: NDArray[Any]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best third first.

    SentencePiece keeps no merge list: of all neighbours whose concatenation is a piece it joins the pair
    whose concatenation scores best. Splits of one piece share its score; SentencePiece would take the leftmost
    in the text, a merge list needs an order between them and has the longest left part first, as in transformers.
    """
    known = set(pieces)
    lefts: list[str] = []
    rights: list[str] = []
    wholes: list[int] = []
    for piece in pieces:
        whole = ids[piece]
        for cut in range(1, len(piece)):
            left = piece[:cut]
            if left in known:
                right = piece[cut:]
                if right in known:
                    lefts.append(left)
                    rights.append(right)
                    wholes.append(whole)
    by_id = np.array(wholes, np.int64)
    sizes = [np.fromiter(map(len, part), np.int64, len(part)) for part in (rights, lefts)]
    # Stable, last key first: equal scores and sizes keep the order of the vocabulary.
    order = np.lexsort((-sizes[0], -sizes[1], -scores[by_id].astype(np.float64)))
    return [(lefts[i], rights[i]) for i in order]


def _add_tokens(inner: Any, tokens: list[str], special: NDArray[np.bool_], user: NDArray[np.bool_], where: str) -> None:
    """Mark the tokens that are matched whole in raw text; special ones are dropped from decoded text."""
    from tokenizers import AddedToken

    def build() -> None:
        marked = [AddedToken(tokens[i], normalized=False, special=True) for i in np.flatnonzero(special)]
        inner.add_special_tokens(marked)
        plain = [AddedToken(tokens[i], normalized=False, special=False) for i in np.flatnonzero(user & ~special)]
        inner.add_tokens(plain)

    guarded(build, where)


def with_bos(inner: Any, bos: str, bos_id: int, where: str) -> None:
    """Let a saved tokenizer.json put the beginning-of-text token first, for whoever loads it."""
    from tokenizers import processors

    def build() -> None:
        inner.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, bos_id)]
        )

    guarded(build, where)


_T = TypeVar("_T")


def guarded(build: Callable[[], _T], where: str) -> _T:
    """Run `build`; whatever the tokenizers library throws at damaged data becomes a CheckpointError."""
    try:
        return build()
    except BaseException as err:
        # The library's own panics derive from BaseException and can only be told by name.
        if not isinstance(err, Exception) and type(err).__name__ != "PanicException":
            raise
        reason = " ".join(str(err).split())[:200]
        raise CheckpointError(
            f"{where}: the tokenizer cannot be built ({reason}); the file is damaged, fetch it again"
        ) from None


def _show(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:40] + "...")


class _Keys:
    """Typed access to `tokenizer.ggml.*`; a value of the wrong type is a CheckpointError."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata = metadata
        self.where = where

    def _get(self, name: str, prefix: str = "tokenizer.ggml.") -> Any:
        return self._metadata.get(prefix + name)

    def _wrong(self, name: str, value: object, wanted: str) -> CheckpointError:
        key = name if name.startswith("tokenizer.") else "tokenizer.ggml." + name
        return CheckpointError(
            f"{self.where}: '{key}' is a {type(value).__name__}, not {wanted}; "
            "the metadata is damaged, fetch the file again"
        )

    def text(self, name: str, prefix: str = "tokenizer.ggml.") -> str | None:
        value = self._get(name, prefix)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "text")
        return value

    def flag(self, name: str) -> bool | None:
        value = self._get(name)
        if value is not None and not isinstance(value, (bool, np.bool_)):
            raise self._wrong(name, value, "true or false")
        return None if value is None else bool(value)

    def strings(self, name: str) -> Sequence[str] | None:
        value = self._get(name)
        if value is None:
            return None
        if isinstance(value, np.ndarray) and not value.size:
            return []  # an empty array has no text to tell its type by
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, "a list of texts")
        return value

    def numbers(self, name: str, count: int, kinds: str) -> NDArray[Any] | None:
        """A vector with one number a token; kinds: the numpy kinds allowed, of "i", "u", "f"."""
        value = self._get(name)
        if value is None:
            return None
        try:
            array = np.asarray(value)
        except ValueError:  # lists of unequal length
            array = np.empty(0, object)
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise self._wrong(name, value, "a list of whole numbers" if kinds == "iu" else "a list of numbers")
        if len(array) != count:
            raise CheckpointError(
                f"{self.where}: 'tokenizer.ggml.{name}' has {len(array)} entries for {count} tokens; "
                "the metadata is damaged, fetch the file again"
            )
        return array

    def token_id(self, name: str, count: int) -> int | None:
        value = self._get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise self._wrong(name, value, "a token id")
        if not 0 <= value < count:
            raise CheckpointError(
                f"{self.where}: 'tokenizer.ggml.{name}' is {value} but the vocabulary has {count} tokens; "
                "the metadata is damaged, fetch the file again"
            )
        return int(value)
