"""Parity with the ``transformers`` library: the same weights and tokens through both, logits compared.

The oracle runs in float32 on the CPU with eager attention. It continues the prompt greedily for 64 steps; its
logits along that path are compared with ours for the same tokens, so a near-tie does not end the comparison.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import gguf
import numpy as np
import tiny_models
import torch
import transformers

from gossamer import LLM
from gossamer.compress.job import compress
from gossamer.compress.recipe import of_format
from gossamer.models.checkpoint import open_checkpoint

STEPS = 64
TOLERANCE = 2e-3  # largest difference of two logits
MARGIN = 4e-3  # twice that: a lead which no two allowed differences can turn round
CHUNKS = (1, 2, 31, 33, 5, 64, 7)  # of an uneven prompt, over and over

_ROOT = Path(__file__).parents[2]

# Ours uses every core; two teams that wait for each other actively would only slow both down.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Row:
    """One comparison.

    ``compared`` positions (the last of the prompt, and the greedy steps) of ``tokens``; ``largest`` is the greatest
    |logit difference|, ``spread`` the standard deviation of the oracle's logits, ``clear`` the share of the 64 greedy
    steps at which the oracle's best token leads by more than 4e-3, ``agree`` the share of those with the same token
    from us, and ``chunked`` whether a prompt in uneven chunks gave bitwise the same.
    """

    architecture: str
    checkpoint: str
    tokens: int
    compared: int
    largest: float
    spread: float
    clear: float
    agree: float
    chunked: bool


@dataclass(frozen=True)
class Path64:
    """The oracle's greedy continuation: all tokens but the last, and float32 logits of the last ``len(logits)``."""

    tokens: list[int]
    logits: np.ndarray


def oracle_path(model: Any, prompt: Sequence[int], keep: int) -> Path64:
    """Greedy decoding of 64 tokens, with the logits of the last ``keep`` tokens of the prompt and of each step."""
    tokens, rows = list(prompt), []
    with torch.no_grad():
        out = model(torch.tensor([tokens]), use_cache=True, logits_to_keep=keep)
        rows.append(out.logits[0].numpy())
        for _ in range(STEPS - 1):
            tokens.append(int(rows[-1][-1].argmax()))
            out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0].numpy())
    return Path64(tokens, np.concatenate(rows))


def compare(llm: LLM, path: Path64, architecture: str, checkpoint: str) -> Row:
    """Runs the oracle's tokens through ``llm`` in one go and in uneven chunks."""
    compared = len(path.logits)
    hidden = _hidden(llm, path.tokens, [len(path.tokens)])
    uneven = _hidden(llm, path.tokens, _sizes(len(path.tokens)))
    largest, agreed, clear = 0.0, 0, 0
    chunked = np.array_equal(hidden, uneven)
    for start in range(0, compared, 64):  # a table of 262144 tokens has large logits
        theirs = path.logits[start : start + 64]
        part = slice(len(hidden) - compared + start, len(hidden) - compared + start + len(theirs))
        ours = llm.transformer.logits(hidden[part])
        if start == 0:  # the head, too, gives the same for one token as for many
            chunked &= np.array_equal(llm.transformer.logits(uneven[part][:1]), ours[:1])
        largest = max(largest, float(np.abs(ours - theirs).max()))
        for i in range(max(0, compared - STEPS - start), len(theirs)):
            second, best = np.partition(theirs[i], -2)[-2:]
            if best - second > MARGIN:
                clear += 1
                agreed += int(ours[i].argmax() == theirs[i].argmax())
    spread = float(path.logits.std())
    agree = agreed / clear if clear else 1.0
    return Row(architecture, checkpoint, len(hidden), compared, largest, spread, clear / STEPS, agree, chunked)


def _hidden(llm: LLM, tokens: list[int], sizes: Sequence[int]) -> np.ndarray:
    """The hidden states of the tokens, run in pieces of these sizes."""
    sequence, parts, done = llm.new_sequence(len(tokens)), [], 0
    for size in sizes:
        parts += list(llm.hidden(tokens[done : done + size], sequence))
        done += size
    return np.concatenate(parts)


def _sizes(total: int) -> list[int]:
    sizes: list[int] = []
    while (left := total - sum(sizes)) > 0:
        sizes.append(min(left, CHUNKS[len(sizes) % len(CHUNKS)]))
    return sizes


def load(path: Path) -> LLM:
    """A checkpoint in plain float32: weights, inputs, keys and values."""
    return LLM(path, format="f32 @ f32", kv="f32")


def from_gguf(path: Path) -> Any:
    """The oracle, from a GGUF file by its own reader."""
    return _quietly(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    )


def from_folder(path: Path) -> Any:
    """The oracle, from a folder; weights of another type become float32."""
    return _quietly(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    )


def without_gguf(model: Any) -> Any:
    """The same weights as a plain model, which can be saved: transformers refuses to save one read from GGUF."""
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(config))
    plain.load_state_dict(model.state_dict(), assign=True)
    return plain


def _quietly(make: Callable[[], Any]) -> Any:
    transformers.utils.logging.disable_progress_bar()
    reader = lru_cache(maxsize=1)(gguf.GGUFReader)  # transformers parses a file twice, which takes most of the time
    with warnings.catch_warnings(), mock.patch.object(gguf, "GGUFReader", reader):
        warnings.simplefilter("ignore")  # of the libraries underneath, about themselves
        return make()


def english(llm: LLM, tokens: int) -> list[int]:
    """The first tokens of the licence, which is a long and stable text."""
    text = " ".join((_ROOT / "LICENSE").read_text(encoding="utf-8").split())
    return llm.tokenizer.encode(text[: 12 * tokens])[:tokens]


# ---------------------------------------------------------------- the comparisons


def smollm2_rows(path: Path) -> Iterator[Row]:
    """The packaged SmolLM2, and folders that transformers wrote from it."""
    name = "Llama (SmolLM2-135M)"
    oracle, ours = from_gguf(path), load(path)
    prompt = english(ours, 150)
    found = oracle_path(oracle, prompt, len(prompt))
    yield compare(ours, found, name, "GGUF, Q4_1 and Q8_0")
    vocabulary = ours.tokenizer.to_json()
    del ours
    with TemporaryDirectory() as temporary:
        folder, plain = Path(temporary) / "f32", without_gguf(oracle)
        plain.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(vocabulary, encoding="utf-8")
        yield compare(load(folder), found, name, "folder, F32")
        halves = Path(temporary) / "bf16"
        plain.to(torch.bfloat16).save_pretrained(halves, max_shard_size="100MB")
        (halves / "tokenizer.json").write_text(vocabulary, encoding="utf-8")
        found = oracle_path(from_folder(halves), prompt[:80], 80)
        yield compare(load(halves), found, name, "folder, BF16 in shards")


def gemma3_rows(path: Path) -> Iterator[Row]:
    """The packaged Gemma 3, with a prompt longer than its window of 512 tokens."""
    ours = load(path)
    found = oracle_path(from_gguf(path), english(ours, 540), 64)
    yield compare(ours, found, "Gemma 3 (270M)", "GGUF, Q5_0, Q8_0, Q4_K and Q6_K")


def tiny_rows(tiny: tiny_models.Tiny) -> Iterator[Row]:
    """A random model as a folder, as a folder that Gossamer wrote from it, and as a GGUF file."""
    model = tiny.model()
    prompt = np.random.default_rng(1).integers(0, tiny_models.VOCAB, 160).tolist()
    found = oracle_path(model, prompt, len(prompt))
    with TemporaryDirectory() as temporary:
        folder = tiny_models.write_folder(model, Path(temporary) / "theirs")
        yield compare(load(folder), found, tiny.name, "folder, F32")
        checkpoint = open_checkpoint(folder)
        compress(checkpoint, Path(temporary) / "ours", of_format("f32 @ f32"))
        yield compare(load(Path(temporary) / "ours"), found, tiny.name, "compressed folder, f32")
        if tiny.gguf:
            file = tiny_models.write_gguf(model, tiny.gguf, Path(temporary) / "model.gguf")
            yield compare(load(file), found, tiny.name, "GGUF, F32")


def expected() -> list[tuple[str, str]]:
    """(architecture, checkpoint) of every row, in the order of the table."""
    pairs = [
        ("Llama (SmolLM2-135M)", "GGUF, Q4_1 and Q8_0"),
        ("Llama (SmolLM2-135M)", "folder, F32"),
        ("Llama (SmolLM2-135M)", "folder, BF16 in shards"),
        ("Gemma 3 (270M)", "GGUF, Q5_0, Q8_0, Q4_K and Q6_K"),
    ]
    for tiny in tiny_models.TINY:
        kinds = ["folder, F32", "compressed folder, f32", *(["GGUF, F32"] if tiny.gguf else [])]
        pairs += [(tiny.name, kind) for kind in kinds]
    return pairs


# ---------------------------------------------------------------- the table

_COLUMNS = ("architecture", "checkpoint", "tokens", "compared", "largest difference", "logits' deviation")
_COLUMNS += ("clear steps", "same token")
_HEAD = f"| {' | '.join(_COLUMNS)} |\n| --- | --- |{' ---: |' * (len(_COLUMNS) - 2)}"


def table(rows: Sequence[Row]) -> str:
    """The rows as they stand in docs/parity.md."""
    lines = [
        f"| {r.architecture} | {r.checkpoint} | {r.tokens} | {r.compared} | {r.largest:.1e} | {r.spread:.2f} "
        f"| {r.clear:.0%} | {r.agree:.0%} |"
        for r in rows
    ]
    return "\n".join([_HEAD, *lines])


@lru_cache(maxsize=1)
def documented() -> dict[tuple[str, str], list[str]]:
    """The cells of docs/parity.md after the first two, by (architecture, checkpoint)."""
    text = (_ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    body = re.search(r"<!-- begin parity -->(.*)<!-- end parity -->", text, re.DOTALL)
    assert body, "docs/parity.md lacks its markers"
    lines = [line for line in body[1].splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(cells[0], cells[1]): cells[2:] for cells in rows}
