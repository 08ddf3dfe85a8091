"""The same format everywhere, or one for each role or name; shares of rows and columns become counts.

An expression in a recipe may say ``cols(6.25%: ...)`` or ``rows(10%: ...)``: how many columns or rows that is depends
on the site, so it is settled here, to whole panels (rows) or blocks (columns) of 16.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from gossamer.errors import FormatError, UsageError
from gossamer.formats import SiteFormat, parse
from gossamer.models.topology import Site

__all__ = ["ROLES", "by_role", "settle", "uniform"]

# Every role that topology knows, so that a recipe for untied models can name the head of a tied one.
ROLES = ("embed", "q", "k", "v", "o", "gate", "up", "down", "head")
BLOCK = 16  # rows of a panel, columns of a block: fewer would be padded to as many

_WORD = re.compile(r"[A-Za-z0-9_.]+")
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%\s*:")


def uniform(sites: Iterable[Site], fmt: str | SiteFormat) -> dict[str, SiteFormat]:
    """Every site in one format. Raises FormatError for an expression or a shape that cannot be."""
    return {site.name: settle(fmt, site) for site in sites}


def by_role(sites: Iterable[Site], rules: Mapping[str, str | SiteFormat]) -> dict[str, SiteFormat]:
    """The format of each site: the last rule whose role it has, or whose pattern its name matches.

    A rule's key is a role or a pattern of names such as ``*.0.mlp.*``; "*" matches every site.

    Raises UsageError for a key that is neither a role nor matches a name, and for a site without a rule; FormatError
    for an expression or a shape that cannot be.
    """
    sites = list(sites)
    for key in rules:
        if key not in ROLES and not any(fnmatchcase(site.name, key) for site in sites):
            known = ", ".join(dict.fromkeys(site.role for site in sites))
            raise UsageError(
                f"'{key}' is no role of this model and matches no site; its roles are {known}, and a pattern of names "
                "is for example '*.mlp.down_proj'."
            )
    found: dict[str, SiteFormat] = {}
    for site in sites:
        for key, fmt in rules.items():
            if site.role == key or fnmatchcase(site.name, key):
                found[site.name] = settle(fmt, site)
    missing = [site for site in sites if site.name not in found]
    if missing:
        raise UsageError(
            f"no format is given for {missing[0].name} (role {missing[0].role}) and {len(missing) - 1} other sites; "
            "add a rule for the role, or one for '*' before the others."
        )
    return found


def settle(fmt: str | SiteFormat, site: Site) -> SiteFormat:
    """The format of a site, shares of its rows and columns as counts; checked against its shape.

    Raises FormatError for an expression that does not parse and for a shape that it cannot hold.
    """
    if isinstance(fmt, str):
        fmt = parse(_counted(fmt, site))
    try:
        fmt.weight.check(site.rows, site.cols)
    except FormatError as error:
        raise FormatError(f"{site.name} ({site.rows} x {site.cols}) cannot be stored as {fmt}: {error}") from None
    return fmt


def _counted(text: str, site: Site) -> str:
    """``P%:`` just inside ``cols(`` or ``rows(`` as a count; those of masks stay."""
    out: list[str] = []
    around: list[str] = []  # the words before the parentheses that are open
    at = 0
    while at < len(text):
        share = _SHARE.match(text, at)
        if share and around and around[-1] in ("cols", "rows"):
            size = site.cols if around[-1] == "cols" else site.rows
            out.append(f"{_count(float(share[1]), size, around[-1], site)}:")
            at = share.end()
            continue
        word = _WORD.match(text, at)
        if word:
            out.append(word[0])
            at = word.end()
            continue
        if text[at] == "(":
            around.append(out[-1].strip() if out else "")
        elif text[at] == ")" and around:
            around.pop()
        if not text[at].isspace():
            out.append(text[at])
        at += 1
    return "".join(out)


def _count(percent: float, size: int, what: str, site: Site) -> int:
    """The share as a multiple of 16, at least 16, less than all."""
    if not 0 < percent < 100:
        raise FormatError(f"{what}({percent:g}%: ...) cannot be; a share is more than 0 and less than 100 percent.")
    count = max(BLOCK, round(percent / 100 * size / BLOCK) * BLOCK)
    if count >= size:
        raise FormatError(
            f"{what}({percent:g}%: ...) takes at least {BLOCK} {what} and leaves none of the {size} of {site.name}; "
            "give this site a format of its own."
        )
    return count
