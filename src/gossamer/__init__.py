"""Gossamer: language models as light as they can be.

    from gossamer import LLM
    llm = LLM("smollm2-135m")
    print(llm.chat([{"role": "user", "content": "What is the capital of France?"}]))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gossamer.errors import GossamerError

if TYPE_CHECKING:
    from gossamer.engine.llm import LLM, Sampling

__version__ = "0.1.0"
__all__ = ["LLM", "GossamerError", "Sampling", "__version__"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import gossamer` and `gossamer --help` stay fast.
    if name in ("LLM", "Sampling"):
        from gossamer.engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'gossamer' has no attribute '{name}'")
