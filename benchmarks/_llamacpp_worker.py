"""A llama.cpp process that times one repetition per request, so that two engines can take turns.

Started by the benchmarks with a Python that has ``llama_cpp`` (its bindings built from source with native flags).
Reads JSON lines {"prefill": n, "decode": n} and answers {"prefill_tps": x, "decode_tps": x}. Each repetition runs a
prompt of ``prefill`` tokens in one batch, then ``decode`` single tokens after a 16-token prompt, logits of the last
token only; the same token ids every time, no sampling.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp as lc
import numpy as np


def open_model(path: str, threads: int, context: int):
    lc.llama_backend_init()
    quiet = lc.llama_log_callback(lambda level, text, data: None)
    lc.llama_log_set(quiet, None)
    open_model.keep = quiet  # the library holds the pointer
    model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
    params = lc.llama_context_default_params()
    params.n_ctx = context
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = threads
    return model, lc.llama_init_from_model(model, params)


def feed(context, tokens: list[int], start: int) -> None:
    batch = lc.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i] = token
        batch.pos[i] = start + i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = i == len(tokens) - 1
    if lc.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")
    lc.llama_batch_free(batch)


def repetition(context, vocab: int, prefill: int, decode: int) -> dict[str, float]:
    tokens = np.random.default_rng(0).integers(10, vocab - 10, max(prefill, decode + 16)).tolist()
    memory = lc.llama_get_memory(context)
    lc.llama_memory_clear(memory, True)
    started = time.perf_counter()
    feed(context, tokens[:prefill], 0)
    lc.llama_get_logits_ith(context, -1)[0]
    prefill_s = time.perf_counter() - started
    lc.llama_memory_clear(memory, True)
    feed(context, tokens[:16], 0)
    started = time.perf_counter()
    for i in range(decode):
        feed(context, [tokens[16 + i]], 16 + i)
        lc.llama_get_logits_ith(context, -1)[0]
    return {"prefill_tps": prefill / prefill_s, "decode_tps": decode / (time.perf_counter() - started)}


def quantize(source: str, target: str, ftype: str) -> None:
    params = lc.llama_model_quantize_default_params()
    params.ftype = getattr(lc, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    params.allow_requantize = True
    params.nthread = 2
    if lc.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit("llama_model_quantize failed")


def main() -> None:
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:5])
        return
    path, threads = sys.argv[1], int(sys.argv[2])
    model, context = open_model(path, threads, 1024)
    vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
    print(json.dumps({"version": lc.__version__, "info": lc.llama_print_system_info().decode()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(repetition(context, vocab, request["prefill"], request["decode"])), flush=True)


if __name__ == "__main__":
    main()
