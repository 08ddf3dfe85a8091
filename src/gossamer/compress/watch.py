"""What a compression tells while it works. Only the command line draws; this is what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gossamer.models.load import Progress

if TYPE_CHECKING:
    from gossamer.compress.preflight import Prediction

__all__ = ["SILENT", "Watch"]


class Watch:
    """Keeps silent; override what shall be heard."""

    def predicted(self, prediction: Prediction) -> None:
        """The sizes, the time and the memory that the run will take, before it takes them."""

    def say(self, text: str) -> None:
        """A step that is worth a line."""

    @contextmanager
    def phase(self, what: str) -> Iterator[Progress]:
        """A part of the work; gives the callback that is told the steps done and in all."""
        yield lambda done, total: None


SILENT = Watch()
