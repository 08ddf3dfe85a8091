"""Format expressions as text.

    site    := weight [ "@" input ]                      no "@" means "@ bf16", and inside a branch what is around it
    weight  := term { "+" term }
    term    := "f32" | "f16" | "bf16" | coded | "kmeans" B "/" ( "row" | "tensor" )
             | "planes(" coded ")" | "mask(" P "%:" site ")" | "rank" R "(" site ")"
             | "cols(" N ":" site "," ... site ")" | "rows(" N ":" site "," ... site ")"
             | "hadamard(" ( BLOCK | "full" ) "," ( SEED | "none" ) "," site ")"
             | "permute(" site ")" | "scale(" site ")"
    coded   := number "/" group [ "*" scale ] [ "-z(" ( number | "0" ) ")" | "-m(" scale ")" ]
    group   := "g" N | "row" | "tensor" | R "x" C
    scale   := "f32" | "f16" | "bf16" | "e8m0" | "e4m3" | "(" coded ")"
    input   := "f32" | "bf16" | number "/" ( "token" | "g" N | "static(" F ")" ) [ "-o(" F ")" ]

Spaces do not matter. Printing gives the shortest form, and parsing what was printed gives the same value.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from typing import NoReturn, TypeVar

from gossamer.errors import FormatError
from gossamer.formats.coded import Coded
from gossamer.formats.composite import MAX_DEPTH, Branch, SiteFormat, weight_of
from gossamer.formats.dense import Dense
from gossamer.formats.group import MAX_GROUP, Group
from gossamer.formats.inputs import PLAIN, TOPS, InputFormat
from gossamer.formats.kmeans import KMeans
from gossamer.formats.lowrank import Rank
from gossamer.formats.node import Format
from gossamer.formats.numbers import FLOATS, NUMBERS, SCALES
from gossamer.formats.planes import Planes
from gossamer.formats.sparse import Mask
from gossamer.formats.splits import Cols, Rows
from gossamer.formats.sums import Sum
from gossamer.formats.transforms import Hadamard, Permute, Scale

__all__ = ["SiteFormat", "parse", "parse_input", "parse_weight"]

T = TypeVar("T")

MAX_LENGTH = 2000  # characters
KMEANS = ("kmeans2", "kmeans3", "kmeans4")
COMBINATORS = ("planes", "mask", "rank", "cols", "rows", "hadamard", "permute", "scale")
EXAMPLES = {
    "planes": "planes(int4/g64)",
    "mask": "mask(1%: f16)",
    "rank": "rank32(bf16)",
    "cols": "cols(256: bf16, int4/row)",
    "rows": "rows(256: int8/g128, int4/g128)",
    "hadamard": "hadamard(128, none, int4/row)",
    "permute": "permute(int4/g128)",
    "scale": "scale(int4/g128)",
}
SUMMARY = "f32, f16, bf16, int2 to int8, uint2 to uint8, ternary, bipolar1 to bipolar8, e2m1 and others, nf4, kmeans4"

# A number such as 0.5 or 1e-05 is one token, a word is what stands between the signs.
_TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?(?![\w.])|[@+*/,:%()-]|[^@+*/,:%()-]+")
_INTEGER = re.compile(r"[0-9]{1,10}")
_REAL = re.compile(r"[0-9]{1,40}(?:\.[0-9]{1,60})?(?:e[+-]?[0-9]{1,3})?")


def quote(text: str) -> str:
    """Text that a person typed, fit for a one-line message: short, on one line, without control characters."""
    flat = " ".join(text[:400].split())[:61]
    safe = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in flat)
    return f"'{safe}'" if len(safe) <= 60 else f"'{safe[:57]}...'"


def suggest(word: str, known: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(word[:60].lower(), known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "."


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise FormatError(
                f"format {quote(text)} has {len(text)} characters; an expression has at most {MAX_LENGTH}."
            )
        self.text = text
        places = [i for i, c in enumerate(text) if not c.isspace()]
        source = "".join(text[i] for i in places)
        self.tokens = [(m[0], places[m.start()] + 1) for m in _TOKEN.finditer(source)]
        self.at = 0

    # ------------------------------------------------------------ tokens

    def peek(self, ahead: int = 0) -> str:
        """A token that lies ahead; '' at the end."""
        i = self.at + ahead
        return self.tokens[i][0] if i < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def seen(self, back: int = 1) -> str:
        """The tokens just taken, as they were written."""
        return "".join(t for t, _ in self.tokens[max(0, self.at - back) : self.at])

    def fail(self, message: str, ahead: int = 0) -> NoReturn:
        i = self.at + ahead
        place = f"at character {self.tokens[i][1]}" if i < len(self.tokens) else "at the end"
        raise FormatError(f"in format {quote(self.text)}, {place}: {message}")

    def found(self) -> str:
        return quote(self.peek()) if self.peek() else "nothing more"

    def expect(self, token: str, after: str, example: str) -> None:
        if self.peek() != token:
            self.fail(f"{after} must be followed by '{token}', as in {example}, but there is {self.found()}.")
        self.take()

    def build(self, make: Callable[[], T], start: int) -> T:
        """A value whose own checks name what is wrong with it; ``start`` is its first token."""
        try:
            return make()
        except FormatError as error:
            self.fail(str(error), start - self.at)

    # ------------------------------------------------------------ sites and sums

    def whole(self) -> SiteFormat:
        if not self.tokens:
            raise FormatError("a format expression is empty; write for example 'int4/g32' or 'bf16'.")
        if self.peek() == "@":
            self.fail("there is no weight format before the '@'; write for example 'int4/g32 @ bf16'.")
        start = self.at
        branch = self.branch(0)
        self.end()
        return branch if isinstance(branch, SiteFormat) else self.build(lambda: SiteFormat(weight_of(branch)), start)

    def end(self) -> None:
        if not self.peek():
            return
        if self.peek() == "@":
            self.fail("there is a second '@'; a site has one input format.")
        if self.peek() == ")":
            self.fail("this ')' closes nothing; remove it.")
        self.fail(f"{quote(''.join(t for t, _ in self.tokens[self.at :]))} is left over; parts are added with '+'.")

    def branch(self, depth: int) -> Branch:
        start = self.at
        weight = self.weight(depth)
        if self.peek() != "@":
            return weight
        self.take()
        input_format = self.input()
        return self.build(lambda: SiteFormat(weight, input_format), start)

    def weight(self, depth: int) -> Format:
        start = self.at
        terms = [self.term(depth)]
        while self.peek() == "+":
            self.take()
            terms.append(self.term(depth))
        return terms[0] if len(terms) == 1 else self.build(lambda: Sum(tuple(terms)), start)

    def term(self, depth: int) -> Format:
        word = self.peek()
        name = word.rstrip("0123456789") if word.startswith("rank") else word
        if self.peek(1) == "(" and name in COMBINATORS:
            if depth >= MAX_DEPTH:
                self.fail(f"{quote(word)} is nested more than {MAX_DEPTH} deep; write it flatter.")
            return self.combinator(name, depth + 1)
        if name in COMBINATORS:
            self.fail(f"{quote(word)} needs its parts in parentheses, as in {EXAMPLES[name]}.")
        if word in FLOATS:
            self.take()
            if self.peek() == "/":
                part = quote("".join(t for t, _ in self.tokens[self.at : self.at + 2]))
                self.fail(f"{word} is stored as it is and takes no {part}; write '{word}'.")
            return Dense(word)
        if word in KMEANS:
            return self.kmeans()
        return self.coded(nested=False)

    # ------------------------------------------------------------ combinators

    def combinator(self, name: str, depth: int) -> Format:
        start, word = self.at, self.take()
        self.take()  # the parenthesis that ``term`` has seen
        made: Format
        if name == "planes":
            coded = self.coded(nested=False)
            made = self.build(lambda: Planes(coded), start)
        elif name == "mask":
            percent = self.real("the percentage of a mask", EXAMPLES[name])
            self.expect("%", "the percentage of a mask", EXAMPLES[name])
            self.expect(":", "the percentage of a mask", EXAMPLES[name])
            inner = self.branch(depth)
            made = self.build(lambda: Mask(percent, inner), start)
        elif name == "rank":
            if not _INTEGER.fullmatch(word[4:]):
                self.fail("'rank' needs its rank, a whole number, as in rank32(bf16).", start - self.at)
            inner = self.branch(depth)
            made = self.build(lambda: Rank(int(word[4:]), inner), start)
        elif name == "hadamard":
            made = self.hadamard(start, depth)
        elif name in ("cols", "rows"):
            made = self.split(name, start, depth)
        else:
            inner = self.branch(depth)
            made = self.build(lambda: (Permute if name == "permute" else Scale)(inner), start)
        if self.peek() == "," and name not in ("cols", "rows"):
            self.fail(f"{name}(...) ends here, so ')' must stand for this ',', as in {EXAMPLES[name]}.")
        self.expect(")", f"what {name}(...) holds", EXAMPLES[name])
        return made

    def hadamard(self, start: int, depth: int) -> Format:
        example = EXAMPLES["hadamard"]
        block = None if self.word_is("full") else self.integer("the block of hadamard, if not 'full',", example)
        self.expect(",", "the block of hadamard", example)
        seed = None if self.word_is("none") else self.integer("the seed of hadamard, if not 'none',", example)
        self.expect(",", "the seed of hadamard", example)
        inner = self.branch(depth)
        return self.build(lambda: Hadamard(block, seed, inner), start)

    def split(self, name: str, start: int, depth: int) -> Format:
        counts: list[int] = []
        branches: list[Branch] = []
        while self.peek(1) == ":":
            counts.append(self.integer(f"a count of {name}(...)", EXAMPLES[name]))
            self.take()
            branches.append(self.branch(depth))
            if self.peek() != ",":
                self.fail(
                    f"the last part of {name}(...) takes what is left, so it has no count and follows a ',', as in "
                    f"{EXAMPLES[name]}, but there is {self.found()}."
                )
            self.take()
        if not counts:
            self.fail(f"the first part of {name}(...) needs a count and ':', as in {EXAMPLES[name]}.")
        branches.append(self.branch(depth))
        if self.peek() == ",":
            self.fail(f"a part of {name}(...) before the last one needs a count and ':', as in {EXAMPLES[name]}.")
        return self.build(lambda: (Cols if name == "cols" else Rows)(tuple(counts), tuple(branches)), start)

    def word_is(self, word: str) -> bool:
        if self.peek() != word:
            return False
        self.take()
        return True

    def integer(self, what: str, example: str) -> int:
        if not _INTEGER.fullmatch(self.peek()):
            self.fail(f"{what} must be a whole number, as in {example}, but there is {self.found()}.")
        return int(self.take())

    def real(self, what: str, example: str) -> float:
        token = self.peek()
        value = float(token) if _REAL.fullmatch(token) else math.nan
        if not math.isfinite(value):
            self.fail(f"{what} must be a number, as in {example}, but there is {self.found()}.")
        self.take()
        return value

    # ------------------------------------------------------------ codes and scales

    def coded(self, nested: bool, levels: int = 0) -> Coded:
        """Codes with scales; ``nested``: the format of a scale matrix."""
        start, name = self.at, self.peek()
        if name not in NUMBERS:
            self.unknown_number(nested)
        self.take()
        if self.peek() != "/":
            tail = f", but there is {self.found()}" if self.peek() else ""
            self.fail(f"'{name}' needs a group, such as {name}/g32 or {name}/row{tail}.")
        self.take()
        if not self.peek():
            self.fail(f"'{name}' needs a group, such as {name}/g32 or {name}/row.")
        group = self.group(nested)
        scale = self.scale(levels) if self.word_is("*") else None
        offset = self.offset(name, levels) if self.peek() == "-" else None
        return self.build(lambda: _coded(name, group, scale, offset), start)

    def unknown_number(self, nested: bool) -> NoReturn:
        name = self.peek()
        if nested and name in (*FLOATS, *SCALES):
            self.fail(f"a scale that is a float stands without parentheses: write '*{name}'.")
        known = [*FLOATS, *NUMBERS, *KMEANS, *COMBINATORS]
        if name in ("", *")+@,:*/%-"):
            self.fail(f"a format is missing before {self.found()}; write for example 'int4/g32'.")
        self.fail(f"{quote(name)} is not a number format (known: {SUMMARY}){suggest(name, known)}")

    def group(self, nested: bool) -> Group:
        token, step = self.peek(), 8 if nested else 16
        if token in ("row", "tensor"):
            self.take()
            return Group.row() if token == "row" else Group.tensor()
        if tile := re.fullmatch(r"([0-9]{1,7})x([0-9]{1,7})", token):
            r, c = int(tile[1]), int(tile[2])
            if r % 16 or c % step or not (16 <= r <= MAX_GROUP and step <= c <= MAX_GROUP):
                near = f"{_near(r, 16)}x{_near(c, step)}"
                self.fail(
                    f"{quote(token)} is not a group: RxC has R a multiple of 16 and C one of {step}, up to "
                    f"{MAX_GROUP}; did you mean '{near}'?"
                )
            self.take()
            return Group.tile(r, c)
        match = re.fullmatch(r"[gGq]?([0-9]{1,9})", token)
        size = int(match[1]) if match else 0
        if token[:1] != "g" or size % step or not step <= size <= MAX_GROUP:
            # A mistyped letter leaves the number worth suggesting; a bad number, the next good one.
            hint = f"; did you mean 'g{_near(size, step)}'?" if match else "."
            self.fail(
                f"{quote(token)} is not a group: write 'row', 'tensor', RxC, or gN with N a multiple of {step} up to "
                f"{MAX_GROUP}, such as g32, g64 or g128{hint}"
            )
        self.take()
        return Group.of(size)

    def scale(self, levels: int) -> str | Coded:
        token = self.peek()
        if token == "(":
            if levels >= MAX_DEPTH:
                self.fail(f"scales are nested more than {MAX_DEPTH} deep; write them flatter.")
            self.take()
            inner = self.coded(nested=True, levels=levels + 1)
            self.expect(")", "the format of a scale", "int4/g64*(int8/g256)")
            return inner
        if token not in SCALES:
            hint = " A format with a group stands in parentheses." if token in NUMBERS else ""
            self.fail(
                f"scale {self.found()} is not known (scales: {', '.join(SCALES)}, or a format in parentheses)"
                f"{suggest(token, SCALES)}{hint}"
            )
        return self.take()

    def offset(self, name: str, levels: int) -> tuple[str, str | Coded]:
        """("z", number or "0") or ("m", scale)."""
        kind = self.peek(1)
        if kind not in ("z", "m") or self.peek(2) != "(":
            self.fail(f"{quote('-' + kind)} is no offset; write -z({name}), -z(0) or -m(SCALE) for example -m(f16).")
        start = self.at
        self.at += 3
        if kind == "z":
            stored: str | Coded = self.peek()
            if stored not in (name, "0"):
                self.fail(
                    f"a zero point of {name} is stored as {name}, so write -z({name}), or -z(0) for none, not "
                    f"{quote(f'-z({stored})')}."
                )
            self.take()
        else:
            stored = self.minimum(levels)
        self.expect(")", f"what -{kind}(...) holds", "uint4/g32-m(f16)")
        if not name.startswith("uint"):
            self.fail(
                f"{name} takes no {quote(f'-{kind}({stored})')}; offsets go with uint2 to uint8, such as uint4.",
                start - self.at,
            )
        return kind, stored

    def minimum(self, levels: int) -> str | Coded:
        if self.peek() in SCALES:
            return self.take()
        if self.peek() == "(":
            return self.scale(levels)
        if levels >= MAX_DEPTH:
            self.fail(f"scales are nested more than {MAX_DEPTH} deep; write them flatter.")
        if self.peek() not in NUMBERS or self.peek(1) != "/":
            self.fail(
                f"a minimum is stored as one of {', '.join(SCALES)} or as codes such as uint4/g16, so "
                f"{quote(f'-m({self.peek()})')} cannot be{suggest(self.peek(), SCALES)}"
            )
        return self.coded(nested=True, levels=levels + 1)

    def kmeans(self) -> KMeans:
        name = self.take()
        if self.peek() != "/" or self.peek(1) not in ("row", "tensor"):
            self.fail(f"'{name}' needs a table for each row or one for all: {name}/row or {name}/tensor.")
        self.take()
        return KMeans(int(name[6:]), self.take())

    # ------------------------------------------------------------ inputs

    def input(self) -> InputFormat:
        start, name = self.at, self.peek()
        if not name or name in (")", ",", "+", "@"):
            self.fail("there is no input format after the '@'; write one of f32, bf16, int8/token or its kind.")
        if name in PLAIN:
            self.take()
            return InputFormat(name)
        if name not in TOPS:
            known = [*PLAIN, *(f"{n}/token" for n in TOPS)]
            self.fail(f"input {quote(name)} is not known (inputs: {', '.join(known)}){suggest(name, known)}")
        self.take()
        if self.peek() != "/":
            self.fail(f"input '{name}' needs a group: did you mean '{name}/token'?", start - self.at)
        self.take()
        group: str | int | float
        token = self.peek()
        if token == "token":
            group = self.take()
        elif token == "static" and self.peek(1) == "(":
            self.at += 2
            group = self.real("a static scale", f"{name}/static(0.05)")
            self.expect(")", "a static scale", f"{name}/static(0.05)")
        elif re.fullmatch(r"g[0-9]{1,9}", token):
            group = int(self.take()[1:])
        else:
            self.fail(
                f"{self.found()} is no input group: write {name}/token, {name}/gN such as {name}/g128, or "
                f"{name}/static(0.05){suggest(token, ['token', 'static'])}"
            )
        outlier = None
        if self.peek() == "-":
            if self.peek(1) != "o" or self.peek(2) != "(":
                self.fail(f"{quote('-' + self.peek(1))} is not known here; outliers kept apart are -o(6).")
            self.at += 3
            outlier = self.real("an outlier threshold", f"{name}/token-o(6)")
            self.expect(")", "an outlier threshold", f"{name}/token-o(6)")
        return self.build(lambda: InputFormat(name, group, outlier), start)


def _coded(name: str, group: Group, scale: str | Coded | None, offset: tuple[str, str | Coded] | None) -> Coded:
    kind, stored = offset or ("", "")
    zero = stored == name if kind == "z" else None
    return Coded(NUMBERS[name], group, scale, zero, stored if kind == "m" else None)


def _near(size: int, step: int) -> int:
    return min(MAX_GROUP, max(step, -(-size // step) * step))


def parse(text: str) -> SiteFormat:
    """Reads a site format such as ``int4/g32 @ int8/token``. Raises FormatError naming the wrong token."""
    return _Parser(text).whole()


def parse_weight(text: str) -> Format:
    """Reads a weight expression, without '@' (but inside branches). Raises FormatError naming the wrong token."""
    parser = _Parser(text)
    if not parser.tokens:
        raise FormatError("a format expression is empty; write for example 'int4/g32' or 'bf16'.")
    weight = parser.weight(0)
    parser.end()
    return weight


def parse_input(text: str) -> InputFormat:
    """Reads an input format such as ``int8/token``. Raises FormatError naming the wrong token."""
    parser = _Parser(text)
    found = parser.input()
    parser.end()
    return found
