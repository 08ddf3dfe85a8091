"""Memory and start of the packed Llama-3-8B shape: peak at most 1.08 times packed bytes and KV; first token in 2 s.

    python benchmarks/memory.py [--quick]

Makes a GGUF file of random weights with SmolLM2's tokenizer, packs it into a folder of ours, and starts processes
that load the folder, answer one token, which is timed from the start of the imports, and then fill a context of 512;
the first process only warms the file cache. Takes 11 GB of disk. The quick form runs the 1B shape, whose weights are
too few beside Python itself for the memory claim.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import claim, options
from gossamer.checkpoints.gguf import GGUFFile
from gossamer.checkpoints.names import resolve
from gossamer.compress.job import compress
from gossamer.compress.recipe import of_format
from gossamer.evaluate.peer_gguf import write_random_gguf
from gossamer.evaluate.shapes import SHAPES
from gossamer.evaluate.turns import rate
from gossamer.models.checkpoint import open_checkpoint

LOAD = """
import json, sys, time
started = time.perf_counter()
from gossamer import LLM
from gossamer.engine.kv import kv_bytes
from gossamer.evaluate.machine import peak_rss_mb
llm = LLM(sys.argv[1], context=512)
llm.generate([11, 12, 13], max_tokens=1)
seconds = time.perf_counter() - started
llm.generate(list(range(11, 511)), max_tokens=11)  # fills the context, so that all of its keys and values are there
kept = llm.loaded.data_bytes + kv_bytes(llm.config, llm.context, llm.kv_format)
print(json.dumps({"seconds": seconds, "peak": peak_rss_mb() * 1e6, "kept": kept, "bits": llm.loaded.bits_per_weight}))
"""


def vocabulary(size: int):
    """Describes SmolLM2's tokenizer, filled up with tokens that no text has."""
    with GGUFFile(resolve("smollm2-135m")) as file:
        known = {k.removeprefix("tokenizer.ggml."): v for k, v in file.metadata.items() if k.startswith("tokenizer.")}
    more = size - len(known["tokens"])

    def describe(writer: Any) -> None:
        writer.add_tokenizer_model(known["model"])
        writer.add_tokenizer_pre(known["pre"])
        writer.add_token_list([*known["tokens"], *(f"<unused {i}>" for i in range(more))])
        writer.add_token_types([*map(int, known["token_type"]), *[3] * more])
        writer.add_token_merges(known["merges"])
        writer.add_bos_token_id(int(known["bos_token_id"]))
        writer.add_eos_token_id(int(known["eos_token_id"]))

    return describe


def main() -> None:
    args = options(__doc__, repetitions=5, format="int4/g32 @ int8/g32")
    name = "llama-3.2-1b" if args.quick else "llama-3-8b"
    config = SHAPES[name]
    with tempfile.TemporaryDirectory(prefix="gossamer-") as place:
        source, folder = Path(place) / "source.gguf", Path(place) / "packed"
        write_random_gguf(config, source, vocabulary(config.vocab))
        checkpoint = open_checkpoint(source)
        keep = [("embed", "int8/g32"), ("head", "int8/g32")][: 1 if config.tied else 2]
        compress(checkpoint, folder, of_format(args.format), keep=keep)
        source.unlink()
        runs = []
        for _ in range(1 + args.repetitions):
            command = [sys.executable, "-c", LOAD, str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
            runs.append(json.loads(done.stdout))
    warm = runs[1:]
    print(f"{name}: {warm[0]['kept'] / 1e9:.2f} GB of weights and KV, {warm[0]['bits']:.3f} bits/weight")
    print(f"first start (cold file or not): {runs[0]['seconds']:.2f} s")
    claim("peak memory over packed bytes and KV", rate([r["peak"] / r["kept"] for r in warm]), 1.08, at_most=True)
    claim("seconds from start to first token", rate([r["seconds"] for r in warm]), 2.0, at_most=True)


if __name__ == "__main__":
    main()
