"""Reading of options that several verbs share."""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.errors import UsageError
from gossamer.formats import SiteFormat, parse

__all__ = ["keep_rules"]


def keep_rules(texts: Sequence[str]) -> list[tuple[str, SiteFormat]]:
    """``PATTERN=EXPR`` options as (pattern, format). Raises UsageError or FormatError naming the option."""
    rules = []
    for text in texts:
        pattern, equals, expression = text.partition("=")
        if not equals or not pattern.strip():
            raise UsageError(f"--keep '{text}' does not read as PATTERN=EXPR, for example --keep 'embed=int8/g32'.")
        rules.append((pattern.strip(), parse(expression)))
    return rules
