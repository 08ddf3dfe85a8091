"""How a weight is stored: a small algebra of formats. See docs/formats.md."""

from gossamer.formats.coded import Coded
from gossamer.formats.composite import Branch, Composite, SiteFormat, encode_with, leaves, resolve, weight_of
from gossamer.formats.dense import Dense
from gossamer.formats.expression import parse, parse_input, parse_weight
from gossamer.formats.group import Group
from gossamer.formats.inputs import InputFormat, Quantized
from gossamer.formats.kmeans import KMeans
from gossamer.formats.lowrank import Rank
from gossamer.formats.node import ArraySource, Format, Packed, RowSource, allocate, bits_per_weight, encode, project
from gossamer.formats.planes import Planes
from gossamer.formats.sparse import Mask
from gossamer.formats.splits import Cols, Rows
from gossamer.formats.sums import Sum
from gossamer.formats.transforms import Hadamard, Permute, Scale

__all__ = [
    "ArraySource",
    "Branch",
    "Coded",
    "Cols",
    "Composite",
    "Dense",
    "Format",
    "Group",
    "Hadamard",
    "InputFormat",
    "KMeans",
    "Mask",
    "Packed",
    "Permute",
    "Planes",
    "Quantized",
    "Rank",
    "RowSource",
    "Rows",
    "Scale",
    "SiteFormat",
    "Sum",
    "allocate",
    "bits_per_weight",
    "encode",
    "encode_with",
    "leaves",
    "parse",
    "parse_input",
    "parse_weight",
    "project",
    "resolve",
    "weight_of",
]
