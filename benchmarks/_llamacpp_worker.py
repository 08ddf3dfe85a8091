"""What llama.cpp predicts, and its quantizer with an importance matrix, in a process of its own.

Run by a Python that has ``llama_cpp`` and numpy; it needs nothing of Gossamer.

    MODEL THREADS TOKENS                        a line of JSON about itself; then, for each line {"ids": [...], "first":
                                                n}, float32 logits of the positions n - 1 to len(ids) - 2, row by row
    quantize SOURCE TARGET TYPE MATRIX|-        writes TARGET; MATRIX is an .npz of one vector for each tensor
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import llama_cpp.llama_cpp as lc
import numpy as np

ROWS = 64  # logits that are written at once, as the other side reads them


def load(path: str, threads: int, tokens: int) -> tuple[Any, int]:
    """An empty context for one sequence of ``tokens`` tokens, and the size of the vocabulary."""
    model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    params = lc.llama_context_default_params()
    params.n_ctx = -(-tokens // 256) * 256
    params.n_batch = params.n_ubatch = tokens
    params.n_threads = params.n_threads_batch = threads
    context = lc.llama_init_from_model(model, params)
    if not context:
        raise SystemExit(f"llama.cpp cannot hold {tokens} tokens of {path}")
    return context, lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))


def predict(context: Any, vocab: int, ids: list[int], first: int) -> None:
    lc.llama_memory_clear(lc.llama_get_memory(context), True)
    batch = lc.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
        batch.logits[i] = first - 1 <= i < len(ids) - 1
    if lc.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")
    for i in range(first - 1, len(ids) - 1):
        row = np.ctypeslib.as_array(lc.llama_get_logits_ith(context, i), (vocab,))
        sys.stdout.buffer.write(row.astype("<f4").tobytes())
    sys.stdout.buffer.flush()
    lc.llama_batch_free(batch)


def quantize(source: str, target: str, kind: str, matrix: str) -> None:
    params = lc.llama_model_quantize_default_params()
    params.ftype = getattr(lc, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if matrix != "-":
        vectors = {name: np.ascontiguousarray(v, np.float32) for name, v in np.load(matrix).items()}
        entries = (lc.llama_model_imatrix_data * (len(vectors) + 1))()  # the last has no name
        for entry, (name, vector) in zip(entries, vectors.items()):
            entry.name = name.encode()
            entry.data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = len(vector)
        params.imatrix = entries
    if lc.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit(f"llama_model_quantize failed for {kind}")


def main() -> None:
    lc.llama_backend_init()
    quiet = lc.llama_log_callback(lambda level, text, data: None)  # the library holds the pointer
    lc.llama_log_set(quiet, None)
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:6])
        return
    context, vocab = load(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    import llama_cpp

    sys.stdout.write(json.dumps({"version": llama_cpp.__version__, "vocab": vocab}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        predict(context, vocab, **json.loads(line))


if __name__ == "__main__":
    main()
