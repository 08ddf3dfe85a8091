"""Models of real shapes with random weights: what a model costs to run can be measured without having it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from gossamer.engine.llm import chooser
from gossamer.errors import ResourceError, UsageError
from gossamer.evaluate.random_weights import RandomMatrices
from gossamer.formats import SiteFormat, parse
from gossamer.formats.dispatch import make_runner
from gossamer.limits import available_memory
from gossamer.models.config import Config, Rope
from gossamer.models.load import Loaded, Progress, unfused
from gossamer.models.memory import Region
from gossamer.models.topology import Site, describe
from gossamer.models.transformer import Transformer

__all__ = ["SHAPES", "shape_config", "shape_model"]


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
    own memory and is filled as ``random_matrix`` does it: speed does not depend on the values, and no float matrix of
    the whole size is ever built.

    Raises UsageError for an unknown name or a pattern that matches no site, FormatError for an expression that does
    not parse, and ResourceError before taking memory that the machine does not have.
    """
    config = name if isinstance(name, Config) else shape_config(name)
    topology = describe(config)
    choose = chooser(parse(format), [(pattern, parse(text)) for pattern, text in keep], topology)
    formats = {site.name: choose(site) or parse(format) for site in topology.sites}
    _check_memory(str(name) if isinstance(name, str) else "this shape", format, formats, topology.sites)
    matrices, region = RandomMatrices(), Region.of(formats, topology.sites)
    random = np.random.default_rng(0)
    packed, runners = {}, {}
    for done, site in enumerate(topology.sites):
        fmt = formats[site.name]
        packed[site.name] = region.move(matrices.make(fmt.weight, site.rows, site.cols))
        bias = random.standard_normal(site.rows, np.float32) if site.bias else None
        runners[site.name] = make_runner(packed[site.name], fmt, bias)
        if progress:
            progress(done + 1, len(topology.sites))
    vectors = {v.name: np.ones(v.size, np.float32) for v in topology.vectors}
    transformer = Transformer(config, runners, vectors)
    return Loaded(transformer, topology, formats, packed, unfused(topology.sites, runners))


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
