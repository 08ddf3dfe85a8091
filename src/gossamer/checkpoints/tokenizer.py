"""Text to token ids and back: a thin face over `tokenizers.Tokenizer`.

A tokenizer comes from the metadata of a GGUF file or from a Hugging Face folder. What a model needs
beyond the vocabulary is beside it: which token begins a text, which ones end a turn, the chat template.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gossamer.checkpoints.gguf_vocab import TURN_ENDS, guarded, read_vocabulary
from gossamer.errors import CheckpointError, UnsupportedError, UsageError

__all__ = ["Detokenizer", "Tokenizer"]

# Decoders whose text at one token depends on its neighbours only, so that text can be streamed.
_LOCAL_DECODERS = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"})

_MAX_HELD = 16  # tokens kept of a run of bytes that is no text, so that a push costs the same however long it is


class Tokenizer:
    """vocab_size: tokens with a text, added ones included (a model may have more rows in its embedding).
    bos_id: the token that begins a text, None if there is none. eos_ids: all tokens that end a turn, the
    declared one first. add_bos: whether `encode` begins with bos_id unless told otherwise. add_eos is
    always False: an end token ends what the model writes, never a prompt. chat_template: Jinja source
    or None. inner: the wrapped tokenizers.Tokenizer.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    chat_template: str | None
    inner: Any

    def __init__(
        self,
        inner: Any,
        *,
        vocab_size: int,
        bos_id: int | None,
        eos_ids: tuple[int, ...],
        add_bos: bool,
        chat_template: str | None,
    ) -> None:
        self.inner = inner
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.add_bos = add_bos
        self.add_eos = False
        self.chat_template = chat_template
        # Whether special tokens in text are parsed is a state of the library's object, not an argument.
        self._lock = threading.Lock()
        steps = _decoder_steps(inner)
        pieces = [f"<0x{byte:02X}>" for byte in range(256)] if "ByteFallback" in steps else []
        self._byte_ids = frozenset(i for piece in pieces if (i := inner.token_to_id(piece)) is not None)
        self._byte_level = "ByteLevel" in steps
        self._special_ids = frozenset(i for i, t in inner.get_added_tokens_decoder().items() if t.special)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str) -> Tokenizer:
        """The tokenizer in GGUF metadata (`tokenizer.*`); `where` names the file in errors.

        CheckpointError: missing, damaged or contradictory keys; UnsupportedError: an unknown kind.
        """
        found = read_vocabulary(metadata, where)
        return cls(
            found.inner,
            vocab_size=found.size,
            bos_id=found.bos_id,
            eos_ids=found.eos_ids,
            add_bos=found.add_bos,
            chat_template=found.chat_template,
        )

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """The tokenizer in a Hugging Face folder: tokenizer.json, and, where present, tokenizer_config.json,
        generation_config.json (all tokens that end a turn) and chat_template.jinja.

        CheckpointError: tokenizer.json is missing, or a file is damaged or names a token that is not there.
        """
        from tokenizers import Tokenizer as Inner

        path = Path(path)
        source = path / "tokenizer.json"
        text = _read_text(source)
        if text is None:
            hint = " (only tokenizer.model; save it once with transformers to get the .json)"
            raise CheckpointError(
                f"{path}: there is no tokenizer.json{hint if (path / 'tokenizer.model').exists() else ''}; "
                "point to a folder that holds the whole model"
            )
        inner = guarded(lambda: Inner.from_str(text), str(source))
        _check_decoder(inner, source)
        inner.no_truncation()
        inner.no_padding()
        config_path = path / "tokenizer_config.json"
        config, generation = _read_object(config_path), _read_object(path / "generation_config.json")
        bos_id = _named_token(inner, config, "bos_token", config_path)
        eos_id = _named_token(inner, config, "eos_token", config_path)
        stops = _stop_ids(inner, generation, path / "generation_config.json")
        if not stops:  # silent: every control token that is known to end a turn
            added = inner.get_added_tokens_decoder().items()
            stops = [eos_id, *sorted(i for i, token in added if token.special and token.content in TURN_ENDS)]
        eos_ids = tuple(dict.fromkeys(i for i in (*stops, eos_id) if i is not None))
        add_bos = config.get("add_bos_token")
        if not isinstance(add_bos, bool):  # then the post-processor of tokenizer.json decides
            add_bos = inner.encode("", add_special_tokens=True).ids[:1] == [bos_id]
        return cls(
            inner,
            vocab_size=inner.get_vocab_size(with_added_tokens=True),
            bos_id=bos_id,
            eos_ids=eos_ids,
            add_bos=add_bos and bos_id is not None,
            chat_template=_template(path, config),
        )

    def encode(self, text: str, *, special: bool = True, bos: bool | None = None) -> list[int]:
        """Token ids of a text.

        special: read special tokens written in the text, such as <|im_start|>, as such; False reads them as
        plain characters, which is what text from outside a chat template deserves. bos: begin with bos_id
        (None: as the model asks, `add_bos`); a text that already begins with it is left alone. What the vocabulary
        has no token for, such as some control characters, disappears, as in the libraries the models come from.
        UsageError: bos=True without such a token, or text that is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as err:
            raise UsageError(
                f"the text holds half of a surrogate pair at character {err.start}; give valid Unicode text"
            ) from None
        with self._lock:
            self.inner.encode_special_tokens = not special
            ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        if not (self.add_bos if bos is None else bos):
            return ids
        if self.bos_id is None:
            raise UsageError("this model has no beginning-of-text token; encode with bos=False")
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids. Bytes that are not valid UTF-8 come out as U+FFFD; ids beyond the vocabulary
        (padding rows of an embedding) as nothing. UsageError: a negative id."""
        return self._decode([int(i) for i in ids], skip_special)

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        try:
            text: str = self.inner.decode(ids, skip_special_tokens=skip_special)
        except OverflowError:
            raise UsageError(f"{min(ids)} or {max(ids)} is not a token id; ids count from 0") from None
        return text

    def token_text(self, id: int) -> str:
        """What one token adds in the middle of a text, special tokens spelled out; a lone piece of a multi-byte
        character is U+FFFD. UsageError: no such token."""
        if not 0 <= id < 1 << 32 or self.inner.id_to_token(id) is None:
            raise UsageError(f"there is no token {id}; the vocabulary has {self.vocab_size} tokens, from 0")
        anchor = self.encode("a", bos=False)  # at the start of a text some decoders drop a space
        return self._decode([*anchor, id], False)[len(self._decode(anchor, False)) :]

    def stream(self, *, skip_special: bool = True) -> Detokenizer:
        """A detokenizer for ids that come one by one."""
        return Detokenizer(self, skip_special)

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        text: str = self.inner.to_str(pretty=False)
        return text

    def config(self) -> dict[str, Any]:
        """The content of the tokenizer_config.json that goes with `to_json`."""
        eos = self.inner.id_to_token(self.eos_ids[0]) if self.eos_ids else None
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "bos_token": None if self.bos_id is None else self.inner.id_to_token(self.bos_id),
            "eos_token": eos,
            "clean_up_tokenization_spaces": False,
            **({} if self.chat_template is None else {"chat_template": self.chat_template}),
        }


class Detokenizer:
    """Text out of a stream of ids, each piece as soon as nothing that follows can change it.

    The pieces of all `push` calls and of `flush`, joined, equal `decode` of all ids. A character spread
    over several tokens is held until it is whole. So is a run of byte pieces (<0x0A>) until an
    ordinary token ends it, for one bad byte changes how its whole run decodes.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer._special_ids if skip_special else frozenset()
        self._skip_special = skip_special
        # Ids not yet emitted, after the one emitted last: decoders treat the first token of a text
        # differently, and that one keeps the rest from being first.
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that are out

    def push(self, id: int) -> str:
        """Add one id; the text that became final, often empty while a character is incomplete."""
        tokenizer = self._tokenizer
        if id in self._skip or tokenizer.inner.id_to_token(id) is None:
            return ""
        self._window.append(int(id))
        if id in tokenizer._byte_ids:
            return ""
        text = self._decode(self._window)
        # An incomplete character at the end of raw bytes shows as exactly one U+FFFD: hold that one.
        held = 1 if tokenizer._byte_level and text.endswith("\ufffd") else 0
        new = text[self._sent : len(text) - held]
        self._sent += len(new)
        if held and len(self._window) > _MAX_HELD:
            self._cut(_MAX_HELD // 2, held)  # UTF-8 falls into step again within 4 bytes
        elif new and not held:
            self._cut(1, held)
        return new

    def _cut(self, keep: int, held: int) -> None:
        self._window = self._window[-keep:]
        self._sent = len(self._decode(self._window)) - held

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer._decode(ids, self._skip_special)

    def flush(self) -> str:
        """The text still held, incomplete characters as U+FFFD; the stream then starts afresh."""
        text = self._decode(self._window)[self._sent :]
        self._window, self._sent = [], 0
        return text


def _read_text(path: Path) -> str | None:
    """None where there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as err:
        raise CheckpointError(f"{path}: cannot be read as text ({err}); fetch the file again") from None


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    text = _read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: not valid JSON ({err}); fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not an object; fetch the file again")
    return value


def _decoder_steps(inner: Any) -> list[str]:
    if inner.decoder is None:
        return []
    decoder = json.loads(inner.decoder.__getstate__())
    return [step["type"] for step in decoder.get("decoders", [decoder])]


def _check_decoder(inner: Any, source: Path) -> None:
    for step in _decoder_steps(inner):
        if step not in _LOCAL_DECODERS:
            raise UnsupportedError(
                f"{source}: the decoder '{step}' is not one of a language model; "
                f"known: {', '.join(sorted(_LOCAL_DECODERS))}"
            )


def _named_token(inner: Any, config: Mapping[str, Any], key: str, source: Path) -> int | None:
    value = config.get(key)
    if isinstance(value, dict):  # a token with its flags
        value = value.get("content")
    if value is None:
        return None
    found = inner.token_to_id(value) if isinstance(value, str) else None
    if found is None:
        raise CheckpointError(
            f"{source}: '{key}' is {ascii(value)[:60]}, which is not in tokenizer.json; take both files from one model"
        )
    return int(found)


def _stop_ids(inner: Any, generation: Mapping[str, Any], source: Path) -> list[int | None]:
    value = generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 1 << 32 or inner.id_to_token(i) is None:
            raise CheckpointError(
                f"{source}: 'eos_token_id' names {ascii(i)[:60]}, which is not a token of tokenizer.json; "
                "take both files from one model"
            )
    return list(ids)


def _template(path: Path, config: Mapping[str, Any]) -> str | None:
    alone = _read_text(path / "chat_template.jinja")
    value = config.get("chat_template") if alone is None else alone
    if isinstance(value, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'}: 'chat_template' is a {type(value).__name__}, not text; "
            "fetch the file again"
        )
    return value
