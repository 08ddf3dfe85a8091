"""Channels in another order, folded into what makes and what reads them.

Which channels stand together decides which of them share a scale. The hidden channels of an MLP may take any order,
the channels of a value head one inside the head, the residual stream one for the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from gossamer.compress.edits import Edited
from gossamer.compress.maps import Order
from gossamer.compress.statistics import Statistics
from gossamer.compress.transforms.base import Transform, chosen_feeds
from gossamer.compress.transforms.ranges import by_producer
from gossamer.errors import UsageError
from gossamer.models.topology import Attention

__all__ = ["OrderChannels", "OrderStream", "sort_channels"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class OrderChannels(Transform):
    """Channel ``order[i]`` of the up or value site ``where`` comes to stand at i, in all that makes or reads it.

    ``order`` int64 [rows of the site]; for values it stays inside each head.
    """

    where: str
    order: I64

    name: ClassVar[str] = "order channels"

    def edit(self, edited: Edited) -> None:
        topology = edited.topology
        mlp = next((m for m in topology.mlps if m.up == self.where), None)
        attention = topology.values_of(self.where)
        if mlp is not None:
            m = Order(self.order)
            for name in (mlp.gate, mlp.up):
                edited.map_output(name, m)
            edited.map_input(mlp.down, m)
        elif attention is not None:
            edited.map_output(attention.v, Order(self.order, attention.head_dim))
            edited.map_input(attention.o, Order(_for_queries(attention, self.order), attention.head_dim))
        else:
            raise UsageError(f"the channels of '{self.where}' cannot be reordered alone; give an up or a value site.")

    def describe(self) -> str:
        return f"order: channels of {self.where}"


def _for_queries(attention: Attention, order: I64) -> I64:
    """The order of the output site's columns that an order of the values' channels asks for."""
    inside = np.asarray(order, np.int64) % attention.head_dim
    heads = np.repeat(inside.reshape(attention.kv_heads, -1), attention.group, axis=0)
    return (heads + np.arange(attention.heads)[:, None] * attention.head_dim).reshape(-1)


@dataclass(frozen=True, eq=False)
class OrderStream(Transform):
    """Channel ``order[i]`` of the residual stream comes to stand at i, in the whole model; a tied table stays tied."""

    order: I64
    where: str = "the residual stream"

    name: ClassVar[str] = "order stream"

    def edit(self, edited: Edited) -> None:
        topology, m = edited.topology, Order(self.order)
        edited.map_table(m)
        for name in topology.stream.writers[1:]:
            edited.map_output(name, m)
        for norm, consumers in topology.stream.readers:
            edited.map_gain(norm, m)
            for consumer in consumers:
                if topology.site(consumer).role not in ("embed", "head"):  # those two are the table
                    edited.map_input(consumer, m)
        for _, norm in topology.stream.posts:
            edited.map_gain(norm, m)

    def describe(self) -> str:
        return "order: channels of the residual stream"


def sort_channels(
    edited: Edited, statistics: Mapping[str, Statistics], *, places: Sequence[str] = ("values", "hidden")
) -> list[OrderChannels]:
    """The channels with the largest inputs first, so that they share scales (Lin et al. 2024, QServe, section 4.3).

    By the calibrated max|x|, of equal ones the first; values are sorted inside each head.
    """
    topology = edited.topology
    found = []
    for producer, consumers in chosen_feeds(topology, statistics, places):
        size = by_producer(topology, producer, statistics[consumers[0].shares].absmax)
        attention = topology.values_of(producer)
        heads = size.reshape(-1, attention.head_dim if attention else len(size))
        inside = np.argsort(-heads, axis=1, kind="stable")
        order = inside + np.arange(len(heads))[:, None] * heads.shape[1]
        found.append(OrderChannels(producer, order.reshape(-1)))
    return found
