"""Reading of options that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from gossamer.errors import UsageError
from gossamer.formats import SiteFormat, parse

__all__ = ["keep_rules", "reading"]

DEFAULT_TOKENS = 8192


def keep_rules(texts: Sequence[str]) -> list[tuple[str, SiteFormat]]:
    """``PATTERN=EXPR`` options as (pattern, format). Raises UsageError or FormatError naming the option."""
    rules = []
    for text in texts:
        pattern, equals, expression = text.partition("=")
        if not equals or not pattern.strip():
            raise UsageError(f"--keep '{text}' does not read as PATTERN=EXPR, for example --keep 'embed=int8/g32'.")
        rules.append((pattern.strip(), parse(expression)))
    return rules


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """The options that say how a text is read, as ``evaluate`` takes them. Raises UsageError when two contradict."""
    if args.tokens is not None and args.windows is not None:
        raise UsageError("--tokens and --windows say the same in two ways; give one of them.")
    tokens = DEFAULT_TOKENS if args.tokens is None else args.tokens
    if args.windows is not None:
        tokens = args.windows * args.window
    return {"tokens": tokens, "window": args.window, "score": args.score, "bos": False if args.no_bos else None}
