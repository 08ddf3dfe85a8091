"""Does llama.cpp score an exported GGUF file as Gossamer scores the model it was made from?

    python benchmarks/export_agrees.py [MODEL ...] [--peer-python PATH]

For each model (NAME, or NAME:EXPRESSION for one compressed to it first): export, let llama.cpp read the file, and print
the mean KL divergence and the largest difference of the log-likelihoods over a short text, and whether both sides cut
the text into the same tokens. Beside quantized weights llama.cpp rounds inputs to 8 bits, a KL of 1e-3 to 1e-2; the
rows in f32, where it does not, show that the two run the same model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from gossamer import LLM
from gossamer.checkpoints.names import resolve
from gossamer.compress.job import compress
from gossamer.compress.recipe import of_format
from gossamer.export.gguf import export_gguf
from gossamer.models.checkpoint import open_checkpoint

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that in 1813 he'd be worth 5,000 pounds."
)

DEFAULT = [
    *("smollm2-135m", "smollm2-135m:int4/g64", "smollm2-135m:f32 @ f32"),
    *("gemma3-270m", "gemma3-270m:f32 @ f32"),
]

# Runs in the peer's Python: token ids of the text, and the logits of every position.
WORKER = """
import json, sys
import numpy as np
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, logits_all=True, verbose=False, n_threads=2)
mine = model.tokenize(sys.argv[2].encode(), add_bos=True, special=True)
ids = json.loads(sys.argv[3])
model.eval(ids)
np.save(sys.argv[4], np.array(model.scores[: len(ids)], np.float32))
print(json.dumps(mine))
"""


def softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def compare(folder: Path, name: str, python: str) -> None:
    file, scores = folder.with_suffix(".gguf"), folder.with_suffix(".npy")
    done = export_gguf(open_checkpoint(folder), file)
    llm = LLM(folder)
    ids = llm.tokenizer.encode(TEXT)
    ours = softmax(np.asarray(llm.logits(ids)))
    answer = subprocess.run(
        [python, "-c", WORKER, str(file), TEXT, json.dumps(ids), str(scores)],
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = softmax(np.load(scores))
    kl = (np.exp(ours) * (ours - theirs)).sum(axis=1)
    of_text = np.arange(len(ids) - 1), np.array(ids[1:])
    gap = np.abs(ours[:-1][of_text] - theirs[:-1][of_text]).max()
    same = json.loads(answer.stdout.splitlines()[-1]) == ids
    kinds = sorted(set(done.types.values()))
    print(
        f"{name}: {len(ids)} tokens, {'the same' if same else 'OTHER'} ids; {', '.join(kinds)}; "
        f"mean KL {kl.mean():.2e}, largest {kl.max():.2e}; log-likelihoods differ by at most {gap:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=DEFAULT)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has llama_cpp ('make peers')")
    args = parser.parse_args()
    if subprocess.run([args.peer_python, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        parser.error("this Python has no llama_cpp; 'make peers' installs one, name it with --peer-python")
    with tempfile.TemporaryDirectory() as scratch:
        for i, model in enumerate(args.models):
            name, _, expression = model.partition(":")
            folder = Path(scratch) / f"model{i}"
            checkpoint = open_checkpoint(resolve(name))
            table = checkpoint.topology.site("model.embed_tokens")
            keep = [] if "f32" in expression else [("embed", str(checkpoint.native(table)))]
            compress(checkpoint, folder, of_format(expression or None), keep=keep)
            compare(folder, model, args.peer_python)


if __name__ == "__main__":
    main()
