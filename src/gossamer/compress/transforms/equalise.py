"""Equal weight ranges on both sides of a channel (Nagel et al. 2019, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gossamer.compress.edits import Edited
from gossamer.compress.transforms.base import Migrate, chosen_feeds
from gossamer.compress.transforms.ranges import by_producer, column_absmax, row_absmax

__all__ = ["equalise"]


def equalise(edited: Edited, *, places: Sequence[str] = ("values", "hidden")) -> list[Migrate]:
    """Value and up rows against the columns that read them: both end with the range sqrt(max|row| max|column|).

    Channels whose row or column is zero keep their scale. Norms have no rows to be equal to and are left out.
    """
    topology = edited.topology
    found = []
    for producer, consumers in chosen_feeds(topology, {s.shares for s in topology.sites}, places):
        if any(v.name == producer for v in topology.vectors):
            continue
        rows = row_absmax(edited, topology.site(producer))
        columns = by_producer(topology, producer, column_absmax(edited, consumers))
        alive = (rows > 0) & (columns > 0)
        factors = np.sqrt(np.where(alive, columns, 1.0) / np.where(alive, rows, 1.0))
        found.append(Migrate(producer, factors, "equalise"))
    return found
