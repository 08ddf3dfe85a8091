"""Models of real shapes with random weights: what a model costs to run can be measured without having it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gossamer.engine.llm import chooser
from gossamer.errors import ResourceError, UsageError
from gossamer.formats import ArraySource, Format, Packed, SiteFormat, allocate, encode, parse
from gossamer.formats.dispatch import make_runner
from gossamer.formats.node import PANEL
from gossamer.limits import available_memory
from gossamer.models.config import Config, Rope
from gossamer.models.load import Loaded, Progress
from gossamer.models.topology import Site, describe
from gossamer.models.transformer import Transformer

__all__ = ["SHAPES", "random_matrix", "shape_config", "shape_model"]

F32 = npt.NDArray[np.float32]

_SAMPLE = 1 << 18  # weights that are encoded; a matrix repeats them


def _config(
    family: str, sizes: tuple[int, ...], ropes: tuple[Rope, ...], context: int, eps: float = 1e-5, **more: object
) -> Config:
    """``sizes`` are vocabulary, hidden, layers, heads, key-value heads, head, feed-forward; one RoPE may serve all."""
    vocab, hidden, layers, heads, kv_heads, head_dim, ffn = sizes
    entries = {"windows": (0,) * layers, "tied": True} | more
    return Config(
        family=family,
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        context=context,
        norm_eps=eps,
        ropes=ropes * (layers // len(ropes)),
        **entries,  # type: ignore[arg-type]
    )


def _llama3(factor: float) -> Rope:
    return Rope(5e5, "llama3", factor, 1.0, 4.0, 8192)


_GEMMA_GLOBAL = [(i + 1) % 6 == 0 for i in range(26)]

SHAPES: dict[str, Config] = {
    "smollm2-135m": _config("llama", (49152, 576, 30, 9, 3, 64, 1536), (Rope(1e5),), 8192),
    "llama-3.2-1b": _config("llama", (128256, 2048, 16, 32, 8, 64, 8192), (_llama3(32),), 131072),
    "llama-3.2-3b": _config("llama", (128256, 3072, 28, 24, 8, 128, 8192), (_llama3(32),), 131072),
    "llama-3-8b": _config("llama", (128256, 4096, 32, 32, 8, 128, 14336), (Rope(5e5),), 8192, tied=False),
    "qwen2.5-0.5b": _config(
        "qwen2", (151936, 896, 24, 14, 2, 64, 4864), (Rope(1e6),), 32768, 1e-6, biased=frozenset("qkv")
    ),
    "qwen3-0.6b": _config("qwen3", (151936, 1024, 28, 16, 8, 128, 3072), (Rope(1e6),), 40960, 1e-6, qk_norm=True),
    "gemma-3-1b": _config(
        "gemma3",
        (262144, 1152, 26, 4, 1, 256, 6912),
        tuple(Rope(1e6 if g else 1e4) for g in _GEMMA_GLOBAL),
        32768,
        1e-6,
        windows=tuple(0 if g else 512 for g in _GEMMA_GLOBAL),
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        embed_scale=math.sqrt(1152),
    ),
    "mistral-7b": _config(
        "mistral", (32000, 4096, 32, 32, 8, 128, 14336), (Rope(1e4),), 32768, windows=(4096,) * 32, tied=False
    ),
}


def shape_config(name: str) -> Config:
    """The shape of that name. Raises UsageError for one that is not known."""
    if name not in SHAPES:
        raise UsageError(f"the shape '{name}' is not known; choose {', '.join(SHAPES)}.")
    return SHAPES[name]


def shape_model(
    name: str | Config,
    format: str = "int4/g32",
    progress: Progress | None = None,
    keep: Sequence[tuple[str, str]] = (),
) -> Loaded:
    """A model of the shape ``name`` (one of SHAPES, or any Config) with random weights stored as ``format``.

    ``keep`` holds (pattern, expression) pairs that override it for matching site names or roles. Every matrix has its
    own memory and is filled with the encoding of a quarter of a million random weights, repeated: speed does not
    depend on the values, and no float matrix of the whole size is ever built.

    Raises UsageError for an unknown name or a pattern that matches no site, FormatError for an expression that does
    not parse, and ResourceError before taking memory that the machine does not have.
    """
    config = name if isinstance(name, Config) else shape_config(name)
    topology = describe(config)
    choose = chooser(parse(format), [(pattern, parse(text)) for pattern, text in keep], topology)
    formats = {site.name: choose(site) or parse(format) for site in topology.sites}
    _check_memory(str(name) if isinstance(name, str) else "this shape", format, formats, topology.sites)
    makers: dict[str, _RandomMatrices] = {}
    random = np.random.default_rng(0)
    packed, runners = {}, {}
    for done, site in enumerate(topology.sites):
        fmt = formats[site.name]
        maker = makers.setdefault(str(fmt.weight), _RandomMatrices(fmt.weight))
        packed[site.name] = maker.make(site.rows, site.cols)
        bias = random.standard_normal(site.rows, np.float32) if site.bias else None
        runners[site.name] = make_runner(packed[site.name], fmt, bias)
        if progress:
            progress(done + 1, len(topology.sites))
    vectors = {v.name: np.ones(v.size, np.float32) for v in topology.vectors}
    unfused = {site: r.refused for site, r in runners.items() if r.refused is not None}
    return Loaded(Transformer(config, runners, vectors), topology, formats, packed, unfused)


def random_matrix(fmt: Format, rows: int, cols: int) -> Packed:
    """A matrix of random weights stored as ``fmt``: the encoding of a few, repeated. Raises FormatError."""
    fmt.check(rows, cols)
    return _RandomMatrices(fmt).make(rows, cols)


class _RandomMatrices:
    """Packed random matrices. A block of whole panels is encoded once for each width, and its bytes are repeated."""

    def __init__(self, fmt: Format) -> None:
        self.format = fmt
        self.random = np.random.default_rng(0)
        self.blocks: dict[int, tuple[F32, Packed]] = {}

    def _block(self, cols: int) -> tuple[F32, Packed]:
        if cols not in self.blocks:
            rows = PANEL * max(1, _SAMPLE // (PANEL * cols))
            values = self.random.standard_normal((rows, cols), np.float32) / np.float32(math.sqrt(cols))
            self.blocks[cols] = values, encode(self.format, ArraySource(values))
        return self.blocks[cols]

    def make(self, rows: int, cols: int) -> Packed:
        """A matrix with memory of its own."""
        fmt, (values, block) = self.format, self._block(cols)
        panel = {key: field.used for key, field in fmt.fields(PANEL, cols).items()}
        used = {key: field.used for key, field in fmt.fields(rows, cols).items()}
        if used != {key: size * -(-rows // PANEL) for key, size in panel.items()}:
            return encode(fmt, _Repeated(values, rows))  # not laid out panel by panel
        arrays = allocate(fmt, rows, cols)
        panels, left = divmod(rows, PANEL)
        end = encode(fmt, ArraySource(values[:left])) if left else None
        for key, size in panel.items():
            step = len(values) // PANEL * size
            for start in range(0, panels * size, step):
                count = min(step, panels * size - start)
                arrays[key][start : start + count] = block.arrays[key][:count]
            if end is not None:
                arrays[key][panels * size : (panels + 1) * size] = end.arrays[key][:size]
        return Packed(fmt, (rows, cols), arrays)


class _Repeated:
    """A few rows over and over, as a matrix of ``rows`` rows that is never in memory as a whole."""

    def __init__(self, values: F32, rows: int) -> None:
        self.values, self.shape = values, (rows, int(values.shape[1]))

    def read(self, r0: int, r1: int) -> F32:
        return self.values[np.arange(r0, r1) % len(self.values)]


def _check_memory(name: str, text: str, formats: Mapping[str, SiteFormat], sites: tuple[Site, ...]) -> None:
    need = 0
    for site in sites:
        weight = formats[site.name].weight
        weight.check(site.rows, site.cols)
        need += sum(f.nbytes for f in weight.fields(site.rows, site.cols).values())
    free = available_memory()
    if free is not None and need > free:
        raise ResourceError(
            f"{name} stored as {text} needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free; "
            "choose a smaller shape or format."
        )
