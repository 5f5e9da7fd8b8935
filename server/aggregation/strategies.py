"""How the sites' weights become one: Flower's strategies under and over our average by task.

A round's contributions are *combined* (an average by task, or one of Flower's robust statistics,
task by task), and what comes out may go through one of Flower's *server optimisers*. Only their
arithmetic is used: whom to ask, how long to wait and what to make of an answer stays with
server/rounds/loop.py. Flower's own classes do it, so that what others read and mend is what runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    MultiKrum,
)

from polyclinic.configs import wire
from polyclinic.configs.schema.strategy import ROBUST, StrategyConfig
from polyclinic.mtl_model.packing import Packed, group_of_key
from polyclinic.mtl_model.tasks import GROUPS, Group
from polyclinic.server.aggregation.averaging import (
    Combination,
    Contribution,
    RunningAverage,
    average_by_task,
)

log = logging.getLogger(__name__)

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
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what ``message_of`` made of the sites' contributions."""
        contributions = [contribution_of(reply) for reply in replies]
        return record_of(self.average(contributions, self.sent)), MetricRecord()


class _FedAvgM(FedAvgM, AverageByTask):
    """Server momentum over the average by task."""


class _FedAdam(FedAdam, AverageByTask):
    """Adam over the average by task."""


class _FedYogi(FedYogi, AverageByTask):
    """Yogi over the average by task."""


class _FedAdagrad(FedAdagrad, AverageByTask):
    """Adagrad over the average by task."""


class ServerOptimiser:
    """Takes each round's combined model for a step, and makes the server's own step of it.

    Averages of weights are not gradients, but what they differ from the weights that were sent
    serves as one (Hsu et al., 2019; Reddi et al., 2021). Arrays of integers pass through.
    """

    def __init__(self, strategy: _FedAvgM | _FedAdam | _FedYogi | _FedAdagrad) -> None:
        self.strategy = strategy

    def step(self, number: int, sent: Packed, combined: Packed) -> Packed:
        """The next weights, from those that were sent out and what the sites made of them."""
        floats = [k for k, array in combined.items() if np.issubdtype(array.dtype, np.floating)]
        averaged = {key: combined[key] for key in floats}
        before = record_of({key: sent[key] for key in floats})
        self.strategy.average = lambda _contributions, _sent: averaged
        self.strategy.configure_train(number, before, ConfigRecord(), cast(Grid, None))
        stepped, _ = self.strategy.aggregate_train(number, [])
        if stepped is None:
            raise RuntimeError(f"round {number}: Flower's strategy gave no weights")
        after = {
            key: array.astype(sent[key].dtype, copy=False)
            for key, array in packed_of(stepped).items()
        }
        return combined | after

    def state(self) -> Packed:
        """The moments, as arrays by name; none before the first step."""
        if isinstance(self.strategy, _FedAvgM):
            vector = self.strategy.momentum_vector
            return {f"momentum/{i}": np.asarray(array) for i, array in enumerate(vector or [])}
        found = {"m": self.strategy.m_t or {}, "v": self.strategy.v_t or {}}
        return {
            f"{moment}/{key}": array for moment, of in found.items() for key, array in of.items()
        }

    def restore(self, state: Packed) -> None:
        """Go on with moments that ``state`` gave."""
        if not state:
            return
        if isinstance(self.strategy, _FedAvgM):
            self.strategy.momentum_vector = [state[f"momentum/{i}"] for i in range(len(state))]
            return
        for moment in ("m", "v"):
            prefix = f"{moment}/"
            found = {k.removeprefix(prefix): a for k, a in state.items() if k.startswith(prefix)}
            setattr(self.strategy, f"{moment}_t", found)


def optimiser_of(config: StrategyConfig) -> ServerOptimiser | None:
    """The server optimiser that the settings name; None for those that have none."""
    if config.name == "fedavgm":
        return ServerOptimiser(
            _FedAvgM(
                server_learning_rate=config.server_learning_rate or 1.0,
                server_momentum=config.server_momentum,
            )
        )
    rate = config.server_learning_rate or 0.01
    if config.name in ("fedadam", "fedyogi"):
        kind = _FedAdam if config.name == "fedadam" else _FedYogi
        return ServerOptimiser(
            kind(eta=rate, beta_1=config.beta_1, beta_2=config.beta_2, tau=config.tau)
        )
    if config.name == "fedadagrad":
        return ServerOptimiser(_FedAdagrad(eta=rate, tau=config.tau))
    return None


class RobustByTask:
    """One of Flower's robust statistics, over the sites that trained each task group.

    They work on updates in float64, which changes none of them and keeps Krum's distances from
    drowning in the weights' own size. All contributions are in memory at once. Integer arrays are
    taken as ``RunningAverage`` takes them.
    """

    def __init__(self, config: StrategyConfig, current: Packed) -> None:
        self.config = config
        self.current = current
        self.contributions: list[Contribution] = []

    def add(self, contribution: Contribution) -> None:
        self.contributions.append(contribution)

    def combined(self) -> Packed:
        ordered = sorted(self.contributions, key=lambda c: c.site)
        combined = average_by_task(ordered, {k: a for k, a in self.current.items() if _whole(a)})
        for group in GROUPS:
            trained = [c for c in ordered if c.counts[group] > 0]
            keys = [
                k for k, a in self.current.items() if group_of_key(k) == group and not _whole(a)
            ]
            if not trained or not keys:
                combined |= {key: self.current[key] for key in keys}
                continue
            updates = [self._update(c, group, keys) for c in trained]
            strategy = _robust(self.config, group, len(trained))
            arrays, _ = strategy.aggregate_train(0, updates)
            if arrays is None:
                raise RuntimeError(f"{group}: Flower's strategy gave no weights")
            moved = packed_of(arrays)
            combined |= {
                key: (self.current[key] + moved[key]).astype(self.current[key].dtype)
                for key in keys
            }
        return combined

    def _update(self, contribution: Contribution, group: Group, keys: Sequence[str]) -> Message:
        moved = {
            key: np.subtract(contribution.weights[key], self.current[key], dtype=np.float64)
            for key in keys
        }
        counts = MetricRecord({_WEIGHTED_BY: contribution.counts[group]})
        content = RecordDict({wire.WEIGHTS: record_of(moved), wire.SUMS: counts})
        return Message(content, dst_node_id=0, message_type=wire.TRAIN)


_WEIGHTED_BY = "examples"


def _robust(config: StrategyConfig, group: Group, sites: int) -> FedAvg:
    if config.name == "fedmedian":
        return FedMedian(weighted_by_key=_WEIGHTED_BY)
    if config.name == "trimmed-mean":
        if int(config.trim_fraction * sites) == 0:
            log.warning(
                "%s: %d sites trained it, of which strategy.trim-fraction %g leaves out none: a "
                "plain mean",
                *(group, sites, config.trim_fraction),
            )
        return FedTrimmedAvg(weighted_by_key=_WEIGHTED_BY, beta=config.trim_fraction)
    bad = config.malicious_sites
    if sites < 2 * bad + 3:
        log.warning(
            "%s: %d sites trained it; Krum promises nothing with fewer than %d for %d malicious "
            "ones (strategy.malicious-sites)",
            *(group, sites, 2 * bad + 3, bad),
        )
    kept = 1 if config.name == "krum" else config.krum_sites or max(1, sites - bad)
    return MultiKrum(
        weighted_by_key=_WEIGHTED_BY, num_malicious_nodes=bad, num_nodes_to_select=kept
    )


def combination_of(config: StrategyConfig, current: Packed) -> Combination:
    """What takes one round's contributions in."""
    return RobustByTask(config, current) if config.name in ROBUST else RunningAverage(current)


def _whole(array: np.ndarray[Any, Any]) -> bool:
    return bool(np.issubdtype(array.dtype, np.integer))


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
