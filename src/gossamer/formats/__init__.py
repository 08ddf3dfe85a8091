"""How a weight is stored: a small algebra of formats. See docs/formats.md."""

from gossamer.formats.coded import Coded
from gossamer.formats.dense import Dense
from gossamer.formats.expression import INPUTS, SiteFormat, parse, parse_weight
from gossamer.formats.node import ArraySource, Format, Packed, RowSource, allocate, bits_per_weight, encode, project

__all__ = [
    "INPUTS",
    "ArraySource",
    "Coded",
    "Dense",
    "Format",
    "Packed",
    "RowSource",
    "SiteFormat",
    "allocate",
    "bits_per_weight",
    "encode",
    "parse",
    "parse_weight",
    "project",
]
