"""``gossamer inspect MODEL``."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from gossamer.checkpoints.names import resolve
from gossamer.cli import ui
from gossamer.engine.llm import matching
from gossamer.formats import Composite
from gossamer.models.checkpoint import Checkpoint, open_checkpoint
from gossamer.models.explain import Explained, explain

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(resolve(args.model))
    if args.site is not None:
        _sites(checkpoint, args.site, args.json)
        return
    sites = explain(checkpoint, list(checkpoint.topology.sites))
    unfused = {e.site.name: e.unfused for e in sites if e.unfused is not None}
    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    tensors = list(checkpoint.tensors())
    bits = 8 * checkpoint.data_bytes / checkpoint.topology.parameters
    kinds = Counter[tuple[str, str]]()
    sizes = Counter[tuple[str, str]]()
    for t in tensors:
        kinds[t.type, t.runs_as] += 1
        sizes[t.type, t.runs_as] += t.nbytes
    if args.json:
        ui.print_json(
            {
                "path": str(checkpoint.path),
                "kind": checkpoint.kind,
                "family": config.family,
                "parameters": checkpoint.topology.parameters,
                "data_bytes": checkpoint.data_bytes,
                "total_bytes": checkpoint.total_bytes,
                "bits_per_weight": bits,
                "layers": config.layers,
                "hidden": config.hidden,
                "heads": config.heads,
                "kv_heads": config.kv_heads,
                "head_dim": config.head_dim,
                "ffn": config.ffn,
                "vocab": config.vocab,
                "context": config.context,
                "windows": sorted(set(config.windows)),
                "tied": config.tied,
                "chat_template": tokenizer.chat_template,
                "bos_id": tokenizer.bos_id,
                "eos_ids": list(tokenizer.eos_ids),
                "provenance": checkpoint.provenance(),
                "unfused_sites": unfused,
                "tensors": [
                    {"name": t.name, "type": t.type, "shape": list(t.shape), "bytes": t.nbytes, "runs_as": t.runs_as}
                    for t in tensors
                ],
            }
        )
        return
    ui.say(f"{checkpoint.path}")
    ui.say(
        f"  {checkpoint.kind}, family {config.family}, {checkpoint.topology.parameters:,} parameters, "
        f"{checkpoint.data_bytes:,} bytes of tensors ({bits:.3f} bits/weight), {checkpoint.total_bytes:,} bytes in all"
    )
    windows = sorted({w for w in config.windows if w})
    ui.say(
        f"  {config.layers} layers, width {config.hidden}, FFN {config.ffn}, {config.heads} heads / {config.kv_heads} "
        f"key-value heads of {config.head_dim}, context {config.context}"
        + (f", window {windows[0]} on {sum(map(bool, config.windows))} layers" if windows else "")
        + (", tied head" if config.tied else "")
    )
    ends = ", ".join(f"{i} {tokenizer.token_text(i)!r}" for i in tokenizer.eos_ids) or "none"
    ui.say(f"  {tokenizer.vocab_size:,} tokens, ends a turn: {ends}, adds BOS: {'yes' if tokenizer.add_bos else 'no'}")
    template = tokenizer.chat_template
    ui.say(f"  chat template: {'none (use --raw)' if template is None else f'{len(template)} characters'}")
    for key, value in _flat(checkpoint.provenance()):
        ui.say(f"  {key}: {value}")
    ui.say()
    rows = [[kind, runs, str(n), f"{sizes[kind, runs]:,}"] for (kind, runs), n in kinds.items()]
    ui.table(["stored as", "runs as", "tensors", "bytes"], rows, left=2)
    ui.say()
    paths = Counter(e.path for e in sites)
    ui.say("  sites by what multiplies them: " + ", ".join(f"{path} {n}" for path, n in paths.most_common()))
    for name, why in unfused.items():
        ui.say(f"  unfused: {name}: {why}")
    if args.tensors:
        ui.say()
        ui.table(
            ["tensor", "stored as", "runs as", "shape", "bytes"],
            [[t.name, t.type, t.runs_as, "x".join(map(str, t.shape)), f"{t.nbytes:,}"] for t in tensors],
            left=3,
        )


def _sites(checkpoint: Checkpoint, pattern: str, as_json: bool) -> None:
    sites = explain(checkpoint, matching(pattern, checkpoint.topology))
    if as_json:
        ui.print_json({"path": str(checkpoint.path), "sites": [_site(e) for e in sites]})
        return
    rows = []
    for e in sites:
        total = sum(leaf.macs for leaf in e.leaves)
        head = [e.site.name, f"{e.site.rows}x{e.site.cols}", f"{e.bits_per_weight:.3f}"]
        for leaf in e.leaves:
            share = "" if len(e.leaves) == 1 else f"{100 * leaf.macs / total:.1f} %"
            rows.append([*head, leaf.format, leaf.input, leaf.path, share, leaf.why or ""])
            head = ["", "", ""]
    ui.table(["site", "shape", "bits", "matrix", "input", "path", "work", "why not faster"], rows, left=8)
    for e in sites:
        if isinstance(e.format.weight, Composite):
            ui.say(f"  {e.site.name} = {e.format}")
        if e.unfused is not None:
            ui.say(f"  unfused: {e.site.name}: {e.unfused}")


def _site(e: Explained) -> dict[str, Any]:
    return {
        "name": e.site.name,
        "role": e.site.role,
        "rows": e.site.rows,
        "cols": e.site.cols,
        "format": str(e.format),
        "bits_per_weight": e.bits_per_weight,
        "unfused": e.unfused,
        "matrices": [
            {"format": x.format, "input": x.input, "path": x.path, "why": x.why, "multiply_adds": x.macs}
            for x in e.leaves
        ],
    }


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested entries as ``outer.inner``."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
