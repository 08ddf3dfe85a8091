"""A llama.cpp process that times one piece of work per request, so that two engines can take turns.

Run as a file, by a Python that has ``llama_cpp``; it needs nothing of Gossamer. Between requests it is blocked on its
standard input. ``MODEL THREADS`` reads JSON lines {"work": "prefill", "tokens": n} and {"work": "decode", "batch": b,
"steps": n} and answers {"seconds": s}. ``quantize SOURCE TARGET TYPE`` writes another GGUF file, ``check`` tells
whether the module is there.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

PROMPT = 16  # tokens before the first that is decoded
UBATCH = 512


class Engine:
    """One model, and a context for each kind of work, with room for just the sequences it has."""

    def __init__(self, lc: Any, path: str, threads: int) -> None:
        self.lc, self.threads = lc, threads
        lc.llama_backend_init()
        self.quiet = lc.llama_log_callback(lambda level, text, data: None)  # the library holds the pointer
        lc.llama_log_set(self.quiet, None)
        self.model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self.model))
        self.contexts: dict[tuple[int, int], Any] = {}

    def context(self, sequences: int, tokens: int) -> Any:
        """An empty context for ``sequences`` sequences of ``tokens`` tokens each."""
        lc, key = self.lc, (sequences, tokens)
        if key not in self.contexts:
            context = lc.llama_init_from_model(self.model, self.params(sequences, tokens))
            if not context:
                raise SystemExit(f"llama.cpp cannot hold {sequences} sequences of {tokens} tokens")
            self.contexts[key] = context
        lc.llama_memory_clear(lc.llama_get_memory(self.contexts[key]), True)
        return self.contexts[key]

    def params(self, sequences: int, tokens: int) -> Any:
        params = self.lc.llama_context_default_params()
        params.n_ctx = sequences * (-(-tokens // 256) * 256)
        params.n_batch = params.n_ubatch = UBATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        return params

    def about(self) -> dict[str, Any]:
        lc, params = self.lc, self.params(1, UBATCH)
        names = {getattr(lc, n): n[10:].lower() for n in ("GGML_TYPE_F16", "GGML_TYPE_F32", "GGML_TYPE_Q8_0")}
        flash = {-1: "auto", 0: "off", 1: "on"}
        return {
            "version": lc.__version__,
            "system": lc.llama_print_system_info().decode().strip(" |"),
            "options": {
                "n_threads": params.n_threads,
                "n_threads_batch": params.n_threads_batch,
                "n_batch": params.n_batch,
                "n_ubatch": params.n_ubatch,
                "flash_attn": flash.get(params.flash_attn_type, params.flash_attn_type),
                "type_k": names.get(params.type_k, params.type_k),
                "type_v": names.get(params.type_v, params.type_v),
                "kv_unified": bool(params.kv_unified),
            },
        }

    def run(self, context: Any, batch: Any) -> None:
        if self.lc.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")

    def feed(self, context: Any, tokens: list[int], sequence: int, start: int = 0) -> None:
        """Tokens of a prompt from position ``start`` on, up to the logits of the last."""
        batch = self.lc.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, sequence
            batch.logits[i] = i == len(tokens) - 1
        self.run(context, batch)
        self.lc.llama_get_logits_ith(context, -1)[0]  # waits until it is there
        self.lc.llama_batch_free(batch)

    def tokens(self, count: int) -> list[int]:
        """The same for every call; speed does not depend on which they are."""
        return [(7919 * i + 104729) % (self.vocab - 20) + 10 for i in range(count)]

    def prefill(self, tokens: int) -> float:
        context, prompt = self.context(1, tokens), self.tokens(tokens)
        started = time.perf_counter()
        for start in range(0, tokens, UBATCH):
            self.feed(context, prompt[start : start + UBATCH], 0, start)
        return time.perf_counter() - started

    def decode(self, batch: int, steps: int) -> float:
        context, tokens = self.context(batch, PROMPT + steps), self.tokens(PROMPT + steps + batch)
        for sequence in range(batch):
            self.feed(context, tokens[sequence : sequence + PROMPT], sequence)
        step = self.lc.llama_batch_init(batch, 0, 1)
        step.n_tokens = batch
        started = time.perf_counter()
        for i in range(PROMPT, PROMPT + steps):
            for s in range(batch):
                step.token[s], step.pos[s], step.n_seq_id[s], step.seq_id[s][0] = tokens[i + s], i, 1, s
                step.logits[s] = True
            self.run(context, step)
            for s in range(batch):
                self.lc.llama_get_logits_ith(context, s)[0]
        seconds = time.perf_counter() - started
        self.lc.llama_batch_free(step)
        return seconds


def quantize(lc: Any, source: str, target: str, kind: str) -> None:
    params = lc.llama_model_quantize_default_params()
    params.ftype = getattr(lc, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    if lc.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit("llama_model_quantize failed")


def answer(data: dict[str, Any]) -> None:
    """A line into the pipe."""
    sys.stdout.write(json.dumps(data) + "\n")
    sys.stdout.flush()


def main() -> None:
    try:
        lc = importlib.import_module("llama_cpp")
    except ImportError:
        answer({"missing": "llama_cpp"})
        return
    if sys.argv[1] == "check":
        return
    if sys.argv[1] == "quantize":
        quantize(lc, *sys.argv[2:5])
        return
    engine = Engine(lc, sys.argv[1], int(sys.argv[2]))
    answer(engine.about())
    for line in sys.stdin:
        request = json.loads(line)
        seconds = getattr(engine, request.pop("work"))(**request)
        answer({"seconds": seconds})


if __name__ == "__main__":
    main()
