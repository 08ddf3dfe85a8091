"""A text as windows of tokens, and how many bytes of it a token stands for."""

from __future__ import annotations

import re

from gossamer.checkpoints.tokenizer import Tokenizer
from gossamer.errors import UsageError

__all__ = ["ByteLengths", "cut", "encode_start"]

_MARGIN = 64  # tokens at the end of a cut text that are not used: the cut may have changed them


def cut(tokenizer: Tokenizer, text: str, tokens: int, window: int, bos: bool | None = None) -> list[list[int]]:
    """The first ``tokens`` tokens of a text as windows of ``window`` tokens.

    Each begins with BOS where ``bos`` says so (None: where the tokenizer begins a text with it), which counts as one
    of its tokens. A last window that is not full is left out, unless it is the only one. Raises UsageError for a text
    too short to predict a token of, and for ``bos`` without such a token.
    """
    if bos and tokenizer.bos_id is None:
        raise UsageError("this model has no beginning-of-text token to begin a window with; measure without it.")
    wanted = tokenizer.add_bos if bos is None else bos
    head = [tokenizer.bos_id] if wanted and tokenizer.bos_id is not None else []
    size = min(window, tokens) - len(head)  # text tokens of a window
    count = max(1, tokens // window)
    ids = encode_start(tokenizer, text, size * count)
    if len(ids) + len(head) < 2:
        raise UsageError(f"the text has {len(ids)} tokens, too few to score one; give a longer text.")
    return [head + ids[i * size : (i + 1) * size] for i in range(max(1, len(ids) // size))]


def encode_start(tokenizer: Tokenizer, text: str, need: int) -> list[int]:
    """The first ``need`` tokens of the text, or all of a shorter one, without BOS.

    Only a prefix is encoded: it doubles until there are enough tokens and some to spare, for those before a cut
    may differ from those of the whole text.
    """
    characters = 8 * (need + _MARGIN)
    while True:
        ids = tokenizer.encode(text[:characters], special=False, bos=False)
        if characters >= len(text) or len(ids) >= need + _MARGIN:
            return ids[:need]
        characters *= 2


class ByteLengths(dict[int, int]):
    """How many UTF-8 bytes of text a token stands for, found when it is first asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> int:
        text = self.tokenizer.token_text(token)
        length = len(text.encode())
        if "\ufffd" in text:  # a part of a character, or the character U+FFFD itself
            piece = self.tokenizer.inner.id_to_token(token)
            if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece's byte tokens
                length = 1
            elif "\ufffd" not in piece:  # byte-level BPE writes each byte as one character
                length = len(piece)
        self[token] = length
        return length
