"""Flower's strategies over our average by task.

Flower's wrappers and optimisers do arithmetic on the replies of a round. Ours is in
server/aggregate.py, on plain arrays; here it takes the place of FedAvg's, so that theirs can stand
around or above it. Only their arithmetic is used: whom to ask, how long to wait and what to make of
an answer stays with server/rounds.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from configs import wire
from mtl_model.packing import Packed
from mtl_model.tasks import GROUPS
from server.aggregate import Contribution, average_by_task

Average = Callable[[Sequence[Contribution], Packed], Packed]


class AverageByTask(FedAvg):
    """FedAvg whose average is one of ours.

    A strategy that calls ``super().aggregate_train``, as FedAdam does, stands on it by naming it as
    a second parent; one that holds another strategy, as the clipping wrappers do, is given one.

    Args:
        average: of contributions to the weights that were sent out.
        settings: FedAvg's, which come with the strategies above.
    """

    def __init__(
        self,
        average: Average = average_by_task,
        **settings: Any,  # noqa: ANN401 - as many kinds as FedAvg has
    ) -> None:
        super().__init__(**settings)
        self.average = average
        self.sent: Packed = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Keep what is sent out; the rounds themselves ask the sites."""
        self.sent = packed_of(arrays)
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Average what ``message_of`` made of the sites' contributions."""
        contributions = [contribution_of(reply) for reply in replies]
        return record_of(self.average(contributions, self.sent)), MetricRecord()


def message_of(contribution: Contribution) -> Message:
    """A contribution as a reply that strategies read."""
    content = RecordDict(
        {
            wire.WEIGHTS: record_of(contribution.weights),
            wire.SITE: ConfigRecord({wire.NAME: contribution.site}),
            wire.SUMS: MetricRecord({group: contribution.counts[group] for group in GROUPS}),
        }
    )
    return Message(content, dst_node_id=0, message_type=wire.TRAIN)


def contribution_of(reply: Message) -> Contribution:
    """What ``message_of`` was given, with the weights that a strategy has put in their place.

    They are taken out of the reply: twice the networks of all sites may be too much for a machine.
    """
    sums = reply.content.metric_records[wire.SUMS]
    record = reply.content.array_records[wire.WEIGHTS]
    # Flower's own way to take arrays out collects garbage each time, for half a second
    weights = {key: np.asarray(record.pop(key).numpy()) for key in list(record)}
    return Contribution(
        site=str(reply.content.config_records[wire.SITE][wire.NAME]),
        weights=weights,
        counts={group: cast(int, sums[group]) for group in GROUPS},
    )


def record_of(packed: Packed) -> ArrayRecord:
    return ArrayRecord({key: Array(array) for key, array in packed.items()})


def packed_of(record: ArrayRecord) -> Packed:
    return {key: np.asarray(array.numpy()) for key, array in record.items()}
