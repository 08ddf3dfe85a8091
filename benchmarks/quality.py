"""Divergence from the base by bytes: our recipes beside llama.cpp's types, and each method beside its own baseline.

    python benchmarks/quality.py [smollm2-135m|gemma3-270m] [--work DIR] [--windows N] [--only ours|llama.cpp|methods]

The base is what benchmarks/reference.py makes of MODEL, as a folder and as an F16 GGUF file of the same weights; both
sides are scored against our own float32 run of it on the same windows: BoolQ's passages, no BOS, windows of 512 tokens,
second half. Bytes are those of all tensors. llama.cpp quantizes with an importance matrix of the text that our recipes
calibrate on. Its F16 row is the noise between the two engines.

Every row is kept in DIR and not measured twice, so the work may be stopped and done in parts; --inputs runs our rows
with other inputs as well. --write puts the table into docs/measurements.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from _llamacpp import Logits, importance, quantize
from _tables import replace
from gossamer import LLM, ops
from gossamer.checkpoints.gguf import GGUFFile
from gossamer.compress.compare import Comparison, Options, Row, compare
from gossamer.compress.kept import contents_hash
from gossamer.evaluate import text
from gossamer.evaluate.divergence import OurPredictions, measure
from gossamer.evaluate.windows import cut
from gossamer.models.checkpoint import open_checkpoint

WINDOW = 512
KEEP = [("embed", "int8/g32"), ("head", "int8/g32")]  # where one method is set against another
KINDS = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "IQ3_XXS", "IQ2_S")
DOCUMENT = Path(__file__).parents[1] / "docs" / "measurements.md"

# Tensor bytes at most, and the mean KL to reach there.
BUDGETS = {"smollm2-135m": ((103.6e6, 0.010), (89.1e6, 0.030), (83.0e6, 0.045), (70.2e6, 0.12), (56.2e6, 0.40))}
SHARE = 0.85  # for other models: of the bytes of each of llama.cpp's files, at which its KL is to be reached

# What is set against each other with equal tables: the method, its baseline, and the ratio of KL to reach at most.
METHODS = (
    ("gptq:int4/g128", "rtn:int4/g128", 0.7),
    ("gptq:int3/g128", "rtn:int3/g128", 0.7),
    ("rtn-clip:int4/g128", "rtn:int4/g128", 1.0),
    ("rtn-clip:int3/g128", "rtn:int3/g128", 1.0),
    ("spqr", "gptq:int3/g128", 1.0),
    ("squeezellm", "rtn:int3/g128", 1.0),
    ("quik", "rtn:int4/row @ int4/token", 1.0),
    ("qserve", "rtn:int4/g128 @ int8/token", 1.0),
    ("mixllm", "rtn:int4/g128", 1.0),
)


@dataclass(frozen=True)
class Theirs:
    """One of llama.cpp's files."""

    name: str
    bytes: int
    kl_mean: float
    kl_mean_stderr: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", metavar="MODEL")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), metavar="DIR")
    parser.add_argument("--windows", type=int, metavar="N", help="only the first N windows (default: the whole text)")
    parser.add_argument("--only", choices=("ours", "llama.cpp", "methods"))
    parser.add_argument("--recipes", default="", metavar="A;B", help="our rows, beside those of the methods")
    parser.add_argument("--inputs", metavar="EXPR", help="also with these inputs")
    parser.add_argument("--kinds", default=",".join(KINDS), help="llama.cpp's types (default: %(default)s)")
    parser.add_argument("--imatrix-tokens", type=int, default=65536, metavar="N")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has llama_cpp ('make peers')")
    parser.add_argument("--threads", type=int, default=ops.threads())
    parser.add_argument("--quick", action="store_true", help="two windows, two types, one method: does it run at all?")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.name}")
    args = parser.parse_args()
    ops.set_threads(args.threads)
    if args.quick:
        args.windows, args.kinds, args.recipes, args.imatrix_tokens = 2, "F16,Q4_0", "rtn:int4/g32", 1024
    folder, file = reference(args)
    bench = Bench(args, folder, file)
    lines = [f"Base: `{args.model}` rescaled off its grid, float16; {bench.text.description}."]
    ours = bench.ours(args.recipes.split(";")) if args.recipes and args.only in (None, "ours") else None
    theirs = bench.theirs(args.kinds.split(",")) if args.only in (None, "llama.cpp") else []
    lines += rows_table(ours, theirs) + budget_table(args.model, ours, theirs)
    if args.only in (None, "methods"):
        lines += methods_table(bench, METHODS[2:3] if args.quick else METHODS)
    table = "\n".join(lines)
    print(table)
    if args.write:
        replace(DOCUMENT, f"quality {args.model}", table)


def reference(args: argparse.Namespace) -> tuple[Path, Path]:
    """The base as a folder and as a GGUF file, made when they are not there."""
    args.work.mkdir(parents=True, exist_ok=True)
    folder, file = args.work / args.model, args.work / f"{args.model}.gguf"
    if not (folder.is_dir() and file.is_file()):
        script = Path(__file__).with_name("reference.py")
        subprocess.run([sys.executable, script, args.model, folder, "--gguf", file, "--quick"], check=True)
    return folder, file


class Bench:
    """Rows on one base."""

    def __init__(self, args: argparse.Namespace, folder: Path, file: Path) -> None:
        self.args, self.folder, self.file = args, folder, file
        self.text = text("boolq")
        tokens = WINDOW * args.windows if args.windows else 10 * len(self.text.text)  # more than it has
        self.options = Options(tokens=tokens, window=WINDOW, bos=False, repetitions=0)

    def ours(self, entries: list[str], keep: list[tuple[str, str]] | None = None) -> Comparison:
        """One recipe after the other: a stop loses at most one."""
        rows: list[Row] = []
        for inputs in dict.fromkeys((None, self.args.inputs)):
            options = Options(**(vars(self.options) | {"inputs": inputs, "keep_folders": True}))
            for entry in dict.fromkeys(e.strip() for e in entries):
                print(f"{entry}{'' if inputs is None else f' with {inputs} inputs'} ...", file=sys.stderr, flush=True)
                found = compare(
                    self.folder, [entry], self.text, keep=keep or [], options=options, cache=self.args.work / "rows"
                )
                name = entry if inputs is None else f"{entry}, inputs {inputs}"
                rows.append(Row(**(vars(found.rows[1]) | {"name": name})))
        return Comparison(**(vars(found) | {"rows": [found.rows[0], *rows]}))

    def theirs(self, kinds: list[str]) -> list[Theirs]:
        checkpoint = open_checkpoint(self.folder)
        matrix = self.args.work / f"{self.args.model}-{self.args.imatrix_tokens}.npz"
        if not matrix.is_file():
            print("importance matrix ...", file=sys.stderr, flush=True)
            importance(checkpoint, matrix.with_suffix(".partial.npz"), self.args.imatrix_tokens)
            os.replace(matrix.with_suffix(".partial.npz"), matrix)
        base: LLM | None = None
        rows = []
        source = contents_hash(self.file)
        for kind in kinds:
            said = json.dumps([source, hash_of(matrix), kind, vars(self.options), self.text.sha256], sort_keys=True)
            kept = self.args.work / "rows" / f"llamacpp-{hashlib.sha256(said.encode()).hexdigest()}.json"
            if not kept.is_file():
                print(f"llama.cpp {kind} ...", file=sys.stderr, flush=True)
                base = base or LLM(checkpoint, context=WINDOW)
                kept.parent.mkdir(parents=True, exist_ok=True)
                figures = self._their_row(kind, matrix, base)
                kept.with_suffix(".partial").write_text(json.dumps(figures))
                os.replace(kept.with_suffix(".partial"), kept)
            rows.append(Theirs(**json.loads(kept.read_text())))
        return rows

    def _their_row(self, kind: str, matrix: Path, base: LLM) -> dict[str, Any]:
        path = self.file if kind == "F16" else self.args.work / f"{self.args.model}-{kind}.gguf"
        if not path.is_file():
            quantize(self.file, path, kind, matrix, self.args.peer_python)
        with GGUFFile(path) as file:
            nbytes = file.data_bytes
        windows = cut(base.tokenizer, self.text.text, self.options.tokens, WINDOW, bos=False)
        peer = Logits(path, self.args.peer_python, self.args.threads, WINDOW)
        try:
            kl = measure(peer, OurPredictions(base), windows, WINDOW // 2).kl
        finally:
            peer.close()
        if kind != "F16":
            path.unlink()
        means = np.array([k.mean() for k in kl])
        stderr = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
        return {"name": kind, "bytes": nbytes, "kl_mean": float(means.mean()), "kl_mean_stderr": stderr}


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- tables


def figure(row: Row | Theirs) -> str:
    error = "" if row.kl_mean_stderr is None else f" ± {row.kl_mean_stderr:.4f}"
    return f"{row.kl_mean:.4f}{error}"


def rows_table(ours: Comparison | None, theirs: list[Theirs]) -> list[str]:
    rows: list[tuple[str, Row | Theirs]] = [("llama.cpp", t) for t in theirs]
    lines = []
    if ours is not None:
        rows += [("gossamer", r) for r in ours.rows[1:]]
        lines = [f"{ours.protocol} The base differs from itself in another precision by {ours.noise_floor:.6f}."]
    if rows:
        lines += ["", "| | | MB | KL (nats per token) |", "| --- | --- | ---: | ---: |"]
        for side, r in sorted(rows, key=lambda row: -row[1].bytes):
            lines.append(f"| {side} | `{r.name}` | {r.bytes / 1e6:.1f} | {figure(r)} |")
    return lines


def budget_table(model: str, ours: Comparison | None, theirs: list[Theirs]) -> list[str]:
    """The best of both at or below each size, and whether what was to be reached is."""
    if ours is None:
        return []
    limits = BUDGETS.get(model) or [(SHARE * t.bytes, t.kl_mean) for t in theirs if t.name != "F16"]
    lines = ["", "| at most (MB) | llama.cpp | ours | KL to reach | |", "| ---: | --- | --- | ---: | --- |"]
    for limit, wanted in limits:
        best = [
            min((r for r in rows if r.bytes <= limit), key=lambda r: r.kl_mean, default=None)
            for rows in (theirs, ours.rows[1:])
        ]
        cells = ["none" if b is None else f"`{b.name}` {b.bytes / 1e6:.1f} MB, {figure(b)}" for b in best]
        held = best[1] is not None and best[1].kl_mean <= wanted
        lines.append(f"| {limit / 1e6:.1f} | {' | '.join(cells)} | {wanted:.4f} | {'held' if held else 'not held'} |")
    return lines


def methods_table(bench: Bench, pairs: tuple[tuple[str, str, float], ...]) -> list[str]:
    lines = ["", "| method | MB | KL | baseline | MB | KL | ratio | to reach | |"]
    lines.append("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- |")
    for method, baseline, wanted in pairs:
        found = bench.ours([method, baseline], keep=KEEP[: len(KEEP) - tied(bench.folder)]).rows[1:]
        by_name = {r.name: r for r in found}
        for suffix in ("", f", inputs {bench.args.inputs}"):
            a, b = by_name.get(method + suffix), by_name.get(baseline + suffix)
            if a is None or b is None:
                continue
            ratio = a.kl_mean / b.kl_mean
            cells = [cell for r in (a, b) for cell in (f"`{r.name}`", f"{r.bytes / 1e6:.1f}", figure(r))]
            held = "held" if ratio <= wanted else "not held"
            lines.append(f"| {' | '.join(cells)} | {ratio:.3f} | {wanted:.2f} | {held} |")
    return lines


def tied(folder: Path) -> int:
    return int(open_checkpoint(folder).topology.tied)


if __name__ == "__main__":
    main()
