"""A model of ours for the lm-evaluation-harness, which brings hundreds of tasks (package lm-eval).

from gossamer.evaluate.lm_eval import GossamerLM
lm_eval.simple_evaluate(GossamerLM(LLM("smollm2-135m")), tasks=["arc_easy"], limit=100)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from gossamer.engine.llm import LLM, Sampling
from gossamer.errors import UsageError
from gossamer.evaluate.loglikelihood import Pair, encode_pair, loglikelihoods

__all__ = ["GossamerLM"]

try:
    _LM: Any = import_module("lm_eval.api.model").LM
except ImportError as error:
    raise UsageError(f"this needs the package lm-eval ({error}); run: pip install lm-eval") from None

MAX_TOKENS = 256  # of an answer whose task does not say


class GossamerLM(_LM):  # type: ignore[misc]
    """The three requests of the harness. Contexts that are too long lose their beginning, as the harness has it."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm, self.tokenizer = llm, llm.tokenizer

    @property
    def max_length(self) -> int:
        """Most tokens of context and answer: the LLM's ``context``."""
        return self.llm.context

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which the harness keeps prepared requests."""
        return self.llm.checkpoint.path.name.replace("/", "__")

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): its log-probability in nats, and whether it is what greedy decoding gives.

        Special tokens that are written in a context are read as such: a chat template writes them.
        """
        pairs = [self._fit(encode_pair(self.tokenizer, *r.args, special=True)) for r in requests]
        results = [(s.logprob, s.greedy) for s in loglikelihoods(self.llm, pairs)]
        for request, result in zip(requests, results):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def _fit(self, pair: Pair) -> Pair:
        context, continuation = pair
        if len(continuation) > self.max_length:
            raise UsageError(
                f"a continuation has {len(continuation)} tokens and the context holds {self.max_length}; "
                "make the LLM with a longer context."
            )
        return list(context)[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole text (string,), its first token after BOS or end of text.

        A text longer than the context is scored in windows that together predict each token once; the last has as
        much context as fits.
        """
        windows = [list(self._rolling(r.args[0])) for r in requests]
        scored = iter(loglikelihoods(self.llm, [pair for pairs in windows for pair in pairs]))
        results = [sum(next(scored).logprob for _ in pairs) for pairs in windows]
        for request, result in zip(requests, results):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def _rolling(self, text: str) -> Iterator[Pair]:
        if not text:
            return
        begin, ids = encode_pair(self.tokenizer, "", text)
        for start in range(0, len(ids), self.max_length):
            end = min(start + self.max_length, len(ids))
            before = ids[max(end - self.max_length - 1, 0) : start]
            yield before or begin, ids[start:end]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each (context, options), cut before the first of the strings ``until``.

        Options: ``until`` (text or list), ``max_gen_toks``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``.
        """
        results = []
        for request in requests:
            context, options = request.args
            results.append(self._generate(context, dict(options)))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        most = int(options.get("max_gen_toks", MAX_TOKENS))
        # A question is worth more than the room for a long answer: half of the context is its own.
        ids = self.tokenizer.encode(context)[-max(self.max_length - most, self.max_length // 2) :]
        sampling = Sampling()
        if options.get("do_sample", options.get("temperature", 0) > 0):
            names = ("temperature", "top_k", "top_p")
            sampling = Sampling(**({"temperature": 1.0} | {n: options[n] for n in names if n in options}))
        text = ""
        for piece in self.llm.stream(ids, max_tokens=most, sampling=sampling):
            text += piece
            found = [at for at in (text.find(stop) for stop in until) if at >= 0]
            if found:
                return text[: min(found)]
        return text

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text in the model's own template."""
        from gossamer.checkpoints.chat import render

        tokens, spelled = self.tokenizer, self.tokenizer.token_text
        return render(
            tokens.chat_template,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            bos_token=spelled(tokens.bos_id) if tokens.bos_id is not None else "",
            eos_token=spelled(tokens.eos_ids[0]) if tokens.eos_ids else "",
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the harness writes into its log."""
        return self.tokenizer.chat_template or ""
