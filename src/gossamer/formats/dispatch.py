"""Which kernels run a site, and why others do not. A pure function of format, shape and input.

``Runner`` is what a model calls. A format made of formats runs as the sum of its leaves in one call: columns are
gathered and transforms applied while the input is prepared, and each leaf is multiplied where its rows are. Only the
first factor of a low-rank part is a call of its own. What no kernel reads is decoded once and multiplied in float32,
which is correct for every format and named by ``inspect`` and ``bench``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer import ops
from gossamer.formats.composite import Branch, Composite, SiteFormat, resolve
from gossamer.formats.dense import Dense
from gossamer.formats.inputs import InputFormat
from gossamer.formats.layout import under
from gossamer.formats.lowrank import Rank
from gossamer.formats.node import ArraySource, Format, Packed, encode
from gossamer.formats.planes import Planes
from gossamer.formats.sparse import Mask
from gossamer.formats.splits import Cols, Rows
from gossamer.formats.sums import Sum
from gossamer.formats.transforms import Hadamard, Permute, Scale, signs

__all__ = ["Leaf", "Norm", "Runner", "linear", "make_runner"]

SITE_INPUT = (-1, 0)  # what a part reads: this, or which of the site's further inputs and how many columns that has

F32 = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Leaf:
    """A stored matrix inside a site: what it is, how it is multiplied, and why not faster (or None).

    ``path`` is "int8" (integer dot product), "bf16" (bfloat16 dot product), "f32", or "sparse"; ``macs`` counts its
    multiply-adds for a token.
    """

    format: str
    input: str
    path: str
    why: str | None
    macs: int


@dataclass(frozen=True)
class Norm:
    """RMSNorm with ``gain`` float32 [cols]."""

    gain: F32
    eps: float


@dataclass
class Runner:
    """A linear site ready to run.

    ``refused`` says why the site is unfused (decoded to float32, or integer inputs that no kernel takes as such), or
    is None; ``leaves`` tells it for every stored matrix.
    """

    site: ops.Site
    input: InputFormat
    packed: Packed
    leaves: list[Leaf]
    refused: str | None
    first: list[ops.Site] = field(default_factory=list)  # low-rank parts: what runs before, into memory of its own
    only: ops.Weight | None = None  # the whole matrix, where it is stored as one
    _memory: list[F32] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return self.packed.shape[0]

    @cached_property
    def weight(self) -> ops.Weight:
        """What an embedding is looked up in: the matrix as it is stored, or decoded to float32 where it has parts."""
        return _dense(self.packed.decode()) if self.only is None else self.only

    @property
    def whole(self) -> bool:
        """Whether all rows are computed alike, so that a gate can be applied while they are."""
        return bool(self.site.blocks == 1) and not isinstance(self.packed.format, Rows)

    def extras(self, tokens: int) -> list[F32]:
        """Memory for the results of ``first``, float32 [tokens, R] each; the same memory as long as it is enough."""
        if any(len(z) < tokens for z in self._memory) or not self._memory:
            self._memory = [np.empty((tokens, site.rows), np.float32) for site in self.first]
        return [z[:tokens] for z in self._memory]

    def look_up(self, ids: npt.NDArray[np.int64]) -> F32:
        """Rows ``ids`` of the matrix: float32 [n, columns]. A tied table is looked up and multiplied with."""
        out = np.empty((len(ids), self.packed.shape[1]), np.float32)
        ops.decode_rows(self.weight, ids, out)
        return out


def make_runner(packed: Packed, fmt: SiteFormat, bias: F32 | None = None) -> Runner:
    """Puts the kernels together for a packed matrix. ``bias`` is float32 [rows] or None."""
    builder = _Builder(*packed.shape)
    if bias is not None:
        bias = np.ascontiguousarray(bias, np.float32)
    site = ops.Site(*packed.shape, bias)
    builder.rows(site, packed.format, dict(packed.arrays), *packed.shape, fmt.input, [])
    return Runner(site, fmt.input, packed, builder.leaves, builder.refused, builder.first, builder.only())


class _Builder:
    """Walks a format and adds a part to the site for each leaf."""

    def __init__(self, rows: int, cols: int) -> None:
        self.shape = (rows, cols)
        self.leaves: list[Leaf] = []
        self.first: list[ops.Site] = []
        self.refused: str | None = None
        self.weight: ops.Weight | None = None  # of the last leaf that is the whole matrix

    def only(self) -> ops.Weight | None:
        """The weight of the whole matrix, when it is a single leaf with no step before it."""
        return self.weight if len(self.leaves) == 1 else None

    def rows(
        self, site: ops.Site, fmt: Format, arrays: Arrays, rows: int, cols: int, given: InputFormat, steps: list[Any]
    ) -> None:
        """Opens the blocks of rows; rows(...) stands outside of everything but transforms."""
        if isinstance(fmt, Rows):
            for name, branch, index in fmt.indices(arrays, rows):
                site.block(np.ascontiguousarray(index, np.uint32))
                inner, own = resolve(branch, given)
                self.parts(site, inner, under(arrays, f"{name}."), len(index), cols, own, steps)
        elif isinstance(fmt, (Hadamard, Permute, Scale)):
            inner, own = resolve(fmt.inner, given)
            self.rows(site, inner, under(arrays, "0."), rows, cols, own, [*steps, _step(fmt, arrays, cols)])
        else:
            site.block(None)
            self.parts(site, fmt, arrays, rows, cols, given, steps)

    def parts(
        self,
        site: ops.Site,
        fmt: Format,
        arrays: Arrays,
        rows: int,
        cols: int,
        given: InputFormat,
        steps: list[Any],
        source: tuple[int, int] = SITE_INPUT,
    ) -> None:
        """Adds the parts of one block of rows. ``steps`` transform their input (``source``) on its way here."""

        def branch(b: Branch, prefix: str, cols: int, steps: list[Any]) -> None:
            inner, own = resolve(b, given)
            self.parts(site, inner, under(arrays, prefix), rows, cols, own, steps, source)

        if isinstance(fmt, Sum):
            for name, term in fmt.parts:
                branch(term, f"{name}.", cols, steps)
        elif isinstance(fmt, Cols):
            for name, part, index in fmt.indices(arrays, cols):
                gather = ("gather", np.ascontiguousarray(index, np.uint32))
                branch(part, f"{name}.", len(index), [*steps, gather])
        elif isinstance(fmt, (Hadamard, Permute, Scale)):
            branch(fmt.inner, "0.", cols, [*steps, _step(fmt, arrays, cols)])
        elif isinstance(fmt, Rank) and not _holds(fmt.inner, (Rank, Rows)):
            inner, own = resolve(fmt.inner, given)
            first = ops.Site(fmt.rank, self.shape[1], None)
            first.block(None)
            self.parts(first, inner, under(arrays, "1."), fmt.rank, cols, own, steps)
            self.first.append(first)
            between = (len(self.first) - 1, fmt.rank)
            self.parts(site, inner, under(arrays, "0."), rows, fmt.rank, own, [], between)
        elif isinstance(fmt, Mask):
            self.mask(site, fmt, arrays, rows, cols, given, steps, source)
        elif isinstance(fmt, Planes):
            merged = fmt.merge(arrays, rows, cols)
            self.leaf(site, fmt.inner, merged, rows, cols, given, steps, source)
        else:
            self.leaf(site, fmt, arrays, rows, cols, given, steps, source)

    def leaf(
        self,
        site: ops.Site,
        fmt: Format,
        arrays: Arrays,
        rows: int,
        cols: int,
        given: InputFormat,
        steps: list[Any],
        source: tuple[int, int],
    ) -> None:
        kernel = fmt.kernel(arrays, rows, cols)
        if kernel is None:
            self.refused = f"no kernel reads {fmt} here, so it is decoded to float32"
            weight = _dense(fmt.decode_rows(arrays, rows, cols, 0, rows))
        else:
            weight = ops.make_weight(kernel, rows, cols)
        input = _input(given)
        path, why = weight.path(input)
        if path == "f32" and given.quantized and kernel is not None and not isinstance(fmt, Dense):
            self.refused = f"{fmt} @ {given} runs in float32 on rounded inputs: {why}"
        self.leaves.append(Leaf(str(fmt), str(given), path, why, rows * cols))
        if (rows, cols) == self.shape and source == SITE_INPUT and not steps:
            self.weight = weight
        site.part(weight, input, *source, steps)

    def mask(
        self,
        site: ops.Site,
        fmt: Mask,
        arrays: Arrays,
        rows: int,
        cols: int,
        given: InputFormat,
        steps: list[Any],
        source: tuple[int, int],
    ) -> None:
        self.leaves.append(Leaf(str(fmt), str(given), "sparse", None, fmt.count(rows, cols)))
        kind, scale = fmt.stored, float(arrays["scales"][0]) if "scales" in arrays else 1.0
        index, values = (np.ascontiguousarray(arrays[n]).view(np.uint8) for n in ("index", "values"))
        matrix = ops.Mask(rows, cols, np.ascontiguousarray(arrays["starts"], np.uint32), index, kind, values, scale)
        site.part(matrix, _input(given), *source, steps)


def _holds(branch: Branch, kinds: tuple[type, ...]) -> bool:
    inner = resolve(branch, InputFormat("f32"))[0]
    if isinstance(inner, kinds):
        return True
    return isinstance(inner, Composite) and any(_holds(b, kinds) for _, b in inner.parts)


def _step(fmt: Hadamard | Permute | Scale, arrays: Arrays, cols: int) -> tuple[Any, ...]:
    if isinstance(fmt, Hadamard):
        return ("hadamard", fmt.size(cols), None if fmt.seed is None else signs(fmt.seed, cols))
    if isinstance(fmt, Permute):
        return ("gather", np.ascontiguousarray(arrays["index"][:cols], np.uint32))
    return ("multiply", np.ascontiguousarray(arrays["factors"][:cols], np.float32))


def _input(given: InputFormat) -> ops.Input:
    group = given.group if isinstance(given.group, int) else 0
    fixed = given.group if isinstance(given.group, float) else 0.0
    return ops.Input(given.number, group, fixed, given.outlier or 0.0)


def _dense(w: F32) -> ops.Weight:
    plain = encode(Dense("f32"), ArraySource(w))
    kernel = plain.format.kernel(plain.arrays, *plain.shape)
    assert kernel is not None  # plain float32 always has a kernel
    return ops.make_weight(kernel, *plain.shape)


def linear(
    runners: list[Runner], x: F32, outs: list[npt.NDArray[Any]], norm: Norm | None = None, epilogue: str = "store"
) -> None:
    """outs[i] = x W_i^T + b_i for sites that share their input; ``norm`` and ``epilogue`` as in ``ops.linear``."""
    gain, eps = (norm.gain, norm.eps) if norm else (None, 0.0)
    extras: list[list[F32]] = []
    if any(r.first for r in runners):
        extras = [r.extras(len(x)) for r in runners]
        first = [site for r in runners for site in r.first]
        ops.linear(x, first, [z for some in extras for z in some], None, gain, eps)
    ops.linear(x, [r.site for r in runners], outs, extras, gain, eps, epilogue)
