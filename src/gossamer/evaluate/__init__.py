"""What compression cost: quality on a text, and speed beside the memory's own.

    from gossamer.evaluate import evaluate, text
    print(evaluate(LLM("smollm2-135m", format="int4/g32"), text("stdlib"), against=LLM("smollm2-135m")))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.evaluate.score import Result, evaluate
    from gossamer.evaluate.shapes import SHAPES, shape_model
    from gossamer.evaluate.speed import Speed, bench
    from gossamer.evaluate.texts import NAMES, Text, austen, text

__all__ = ["NAMES", "SHAPES", "Result", "Speed", "Text", "austen", "bench", "evaluate", "shape_model", "text"]

_FILES = {
    "score": ("Result", "evaluate"),
    "shapes": ("SHAPES", "shape_model"),
    "speed": ("Speed", "bench"),
    "texts": ("NAMES", "Text", "austen", "text"),
}
_HOME = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Loaded on first use: a text needs no compiled module.
    if name in _HOME:
        return getattr(import_module(f"gossamer.evaluate.{_HOME[name]}"), name)
    raise AttributeError(f"module 'gossamer.evaluate' has no attribute '{name}'")
