"""The base that compression is measured on: a packaged model, taken off the grid that its file lies on.

    python benchmarks/reference.py [MODEL] [OUT_DIR] [--gguf FILE] [--seed N]

A model published in 4 or 5 bits flatters whatever stores it in 4 or 5 bits again. This rescales it exactly: norm gains
against the columns they feed, up rows against down columns, value rows against output columns (one factor for each
channel of a key-value head, repeated for the query heads that read it), log-uniform in [0.75, 1.33] with a fixed seed.
In float32 the logits stay as they were; what is measured here is printed. All matrices are then rounded to float16,
and those same weights are written twice: as a Hugging Face folder in float16 (OUT_DIR) and as an F16 GGUF file (--gguf)
with the keys and the vocabulary of the source, which llama.cpp loads and quantizes. Norms are float32 in both.

The embedding, which is the head too, has nothing to trade factors with: in both files it stays on the Q8_0 grid of the
source, up to the rounding to float16.

MODEL is a name or a path (smollm2-135m unless given). Without OUT_DIR everything is written to a temporary folder,
checked and removed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

from gossamer import LLM
from gossamer.checkpoints.hf_writer import PlainTensor, write_plain
from gossamer.checkpoints.names import resolve
from gossamer.compress.edits import Edited
from gossamer.compress.transforms import apply_all, rescale
from gossamer.errors import GossamerError, UsageError
from gossamer.models.checkpoint import Checkpoint, open_checkpoint
from gossamer.models.family import to_hf
from gossamer.models.gguf_checkpoint import GgufCheckpoint

TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1815 the Congress of Vienna redrew the map of Europe; "
    "def area(r): return 3.14159 * r ** 2  # a circle. Elle a dit qu'il pleuvait, and nobody believed her."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", metavar="MODEL")
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT_DIR")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="also write an F16 GGUF file of the same weights")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="do not compare logits")
    args = parser.parse_args()
    source = open_checkpoint(resolve(args.model))
    edited = Edited(source)
    apply_all(rescale(source.topology, args.seed), edited)
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch) / "reference"
        file = args.gguf or (None if args.out else Path(scratch) / "reference.gguf")
        if file is not None:
            refuse(source, file)
        write_folder(edited, out)
        print(f"{out}: {size(out)}")
        if file is not None:
            write_gguf(source, open_checkpoint(out), file)
            print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
        if not args.quick:
            compare(source, edited, out, file)


def size(folder: Path) -> str:
    return f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f} MB"


def write_folder(checkpoint: Checkpoint, out: Path) -> None:
    """A plain folder: float16 matrices, float32 vectors as its family stores them."""
    topology = checkpoint.topology
    minus = np.float32(checkpoint.config.norm_plus_one)
    tensors = [
        PlainTensor(f"{s.name}.weight", "F16", (s.rows, s.cols), checkpoint.source(s).read) for s in topology.sites
    ]
    vectors = {f"{v.name}.weight": checkpoint.vector(v) - minus for v in topology.vectors}
    for site in topology.sites:
        bias = checkpoint.bias(site)
        if bias is not None:
            vectors[f"{site.name}.bias"] = bias
    for name, values in vectors.items():
        tensors.append(PlainTensor(name, "F32", values.shape, lambda r0, r1, values=values: values[r0:r1]))
    tokenizer = checkpoint.tokenizer()
    generation = dict(checkpoint.generation())
    if tokenizer.eos_ids:
        generation["eos_token_id"] = list(tokenizer.eos_ids)
    documents = {
        "config.json": text(to_hf(checkpoint.config)),
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": text(tokenizer.config()),
        "generation_config.json": text(generation),
    }
    write_plain(out, documents, tensors)


def text(data: object) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def refuse(source: Checkpoint, file: Path) -> None:
    """What cannot become a GGUF file is refused before anything is written."""
    if not isinstance(source, GgufCheckpoint):
        raise UsageError("--gguf copies keys and vocabulary from a GGUF file, and this model comes as a folder.")
    if file.exists():
        raise UsageError(f"{file} exists already; choose another name or remove it first.")


def write_gguf(source: GgufCheckpoint, folder: Checkpoint, file: Path) -> None:
    """The folder's weights under the names and in the order of the source's tensors, matrices in float16."""
    reader = gguf.GGUFReader(source.path)
    writer = gguf.GGUFWriter(file, source.file.metadata["general.architecture"])
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    sites = {source._name(s.name): s for s in folder.topology.sites}
    vectors = {source._name(v.name): folder.vector(v) for v in folder.topology.vectors}
    vectors |= {source._name(s.name, "bias"): folder.bias(s) for s in folder.topology.sites if s.bias}
    for name, tensor in source.file.tensors.items():
        matrix = name in sites
        dtype = np.dtype(np.float16 if matrix else np.float32)
        writer.add_tensor_info(name, tensor.shape, dtype, int(np.prod(tensor.shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in source.file.tensors.items():
        if name in sites:
            site = sites[name]
            w = folder.source(site).read(0, site.rows).astype(np.float16)  # exact: the folder holds float16
            order = source._rows(site).order
            if order is not None:
                w[order] = w.copy()
            writer.write_tensor_data(w)
        elif name in vectors:
            values = vectors[name]
            site = next((s for s in folder.topology.sites if source._name(s.name, "bias") == name), None)
            if site is not None and source._rows(site).order is not None:
                values[source._rows(site).order] = values.copy()
            writer.write_tensor_data(values)
        else:  # frequency factors
            writer.write_tensor_data(source.file.read(name).reshape(tensor.shape))
    writer.close()


def compare(source: Checkpoint, edited: Checkpoint, out: Path, file: Path | None) -> None:
    """Prints how far the logits move, all in float32."""
    tokens = source.tokenizer().encode(TEXT)

    def logits(checkpoint: Checkpoint) -> np.ndarray:
        return LLM(checkpoint, format="f32 @ f32", context=256, kv="f32").logits(tokens)

    before, rounded = logits(source), logits(open_checkpoint(out))
    largest = np.abs(before).max()
    for what, after in (("rescaled, float32", logits(edited)), ("rescaled, float16", rounded)):
        worst = np.abs(after - before).max()
        print(f"{what}: logits differ by {worst:.2g} at most, of {largest:.3g} ({worst / largest:.1g} of it)")
    if file is not None:
        same = np.array_equal(logits(open_checkpoint(file)), rounded)
        print(f"folder and GGUF file: {'bitwise the same logits' if same else 'DIFFERENT LOGITS'}")
        if not same:
            sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except GossamerError as error:
        sys.exit(f"error: {error}")
