"""Combine the sites' weights with Flower's strategies and the average per task.

A round's contributions are first *combined*, either by the average per task or by one of Flower's
robust statistics, applied per task. The result may then pass through one of Flower's *server
optimisers*. Only the arithmetic of Flower's strategies is used; server/rounds/loop.py selects the
sites, waits for them and checks their replies. Using Flower's own classes means that fixes in
Flower apply here as well.
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
    """FedAvg with a replaceable averaging function.

    Strategies that call ``super().aggregate_train``, such as FedAdam, use it as a second base
    class. Strategies that wrap another strategy, such as the clipping wrappers, are given an
    instance.

    Args:
        average: computes the new weights from the contributions and the weights that were sent.
        settings: settings of FedAvg, passed on by the subclasses.
    """

    def __init__(
        self,
        average: Average = average_by_task,
        **settings: Any,  # noqa: ANN401 - FedAvg's settings have various types
    ) -> None:
        super().__init__(**settings)
        self.average = average
        self.sent: Packed = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Keep the weights that are sent, and return no messages: Federation sends the requests."""
        self.sent = packed_of(arrays)
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the contributions in the replies (see ``message_of``)."""
        contributions = [contribution_of(reply) for reply in replies]
        return record_of(self.average(contributions, self.sent)), MetricRecord()


class _FedAvgM(FedAvgM, AverageByTask):
    """Server momentum on top of the average per task."""


class _FedAdam(FedAdam, AverageByTask):
    """Adam on top of the average per task."""


class _FedYogi(FedYogi, AverageByTask):
    """Yogi on top of the average per task."""


class _FedAdagrad(FedAdagrad, AverageByTask):
    """Adagrad on top of the average per task."""


class ServerOptimiser:
    """A server optimiser, which computes the next weights from each round's combined weights.

    The difference between the combined weights and the weights that were sent serves as the
    gradient (Hsu et al., 2019; Reddi et al., 2021). Integer arrays are passed through unchanged.

    Args:
        strategy: the Flower strategy that implements the optimiser.
    """

    def __init__(self, strategy: _FedAvgM | _FedAdam | _FedYogi | _FedAdagrad) -> None:
        self.strategy = strategy

    def step(self, number: int, sent: Packed, combined: Packed) -> Packed:
        """Compute the next weights.

        Args:
            number: the round.
            sent: the weights that were sent to the sites.
            combined: the combined weights of the sites' contributions.

        Raises:
            RuntimeError: if Flower's strategy returns no weights.
        """
        floats = [k for k, array in combined.items() if np.issubdtype(array.dtype, np.floating)]
        averaged = {key: combined[key] for key in floats}
        before = record_of({key: sent[key] for key in floats})
        self.strategy.average = lambda _contributions, _sent: averaged
        self.strategy.configure_train(number, before, ConfigRecord(), cast(Grid, None))
        stepped, _ = self.strategy.aggregate_train(number, [])
        if stepped is None:
            raise RuntimeError(f"round {number}: Flower's strategy returned no weights")
        after = {
            key: array.astype(sent[key].dtype, copy=False)
            for key, array in packed_of(stepped).items()
        }
        return combined | after

    def state(self) -> Packed:
        """Return the moments as named arrays; empty before the first step."""
        if isinstance(self.strategy, _FedAvgM):
            vector = self.strategy.momentum_vector
            return {f"momentum/{i}": np.asarray(array) for i, array in enumerate(vector or [])}
        found = {"m": self.strategy.m_t or {}, "v": self.strategy.v_t or {}}
        return {
            f"{moment}/{key}": array
            for moment, arrays in found.items()
            for key, array in arrays.items()
        }

    def restore(self, state: Packed) -> None:
        """Restore moments that ``state`` returned."""
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
    """Create the server optimiser of a strategy, or return None if the strategy has none."""
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
    """One of Flower's robust statistics, applied per task group to the sites that trained it.

    The statistics work on updates in float64 instead of weights. This does not change their
    results, but Krum's distances between small updates of large weights stay accurate. All
    contributions are held in memory at once. Integer arrays are treated as in ``RunningAverage``.

    Args:
        config: settings of the strategy.
        current: the weights that were sent to the sites.
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
                raise RuntimeError(f"{group}: Flower's strategy returned no weights")
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
                "%s: none of the %d sites that trained it is left out, because "
                "strategy.trim-fraction is only %g; the result is a plain mean",
                *(group, sites, config.trim_fraction),
            )
        return FedTrimmedAvg(weighted_by_key=_WEIGHTED_BY, beta=config.trim_fraction)
    bad = config.malicious_sites
    if sites < 2 * bad + 3:
        log.warning(
            "%s: only %d sites trained it; Krum has no guarantee with fewer than %d sites when %d "
            "may be malicious (strategy.malicious-sites)",
            *(group, sites, 2 * bad + 3, bad),
        )
    kept = 1 if config.name == "krum" else config.krum_sites or max(1, sites - bad)
    return MultiKrum(
        weighted_by_key=_WEIGHTED_BY, num_malicious_nodes=bad, num_nodes_to_select=kept
    )


def combination_of(config: StrategyConfig, current: Packed) -> Combination:
    """Create the accumulator of one round's contributions for a strategy."""
    return RobustByTask(config, current) if config.name in ROBUST else RunningAverage(current)


def _whole(array: np.ndarray[Any, Any]) -> bool:
    return bool(np.issubdtype(array.dtype, np.integer))


def message_of(contribution: Contribution) -> Message:
    """Convert a contribution to a reply that Flower's strategies can read."""
    content = RecordDict(
        {
            wire.WEIGHTS: record_of(contribution.weights),
            wire.SITE: ConfigRecord({wire.NAME: contribution.site}),
            wire.SUMS: MetricRecord({group: contribution.counts[group] for group in GROUPS}),
        }
    )
    return Message(content, dst_node_id=0, message_type=wire.TRAIN)


def contribution_of(reply: Message) -> Contribution:
    """Convert a reply of ``message_of``, which a strategy may have changed, to a contribution.

    The weights are removed from the reply, since two copies of all sites' networks may not fit in
    memory.
    """
    sums = reply.content.metric_records[wire.SUMS]
    record = reply.content.array_records[wire.WEIGHTS]
    # Flower's own method to extract arrays runs the garbage collector each time, for 0.5 s.
    weights = {key: np.asarray(record.pop(key).numpy()) for key in list(record)}
    return Contribution(
        site=str(reply.content.config_records[wire.SITE][wire.NAME]),
        weights=weights,
        counts={group: cast(int, sums[group]) for group in GROUPS},
    )


def record_of(packed: Packed) -> ArrayRecord:
    """Convert arrays by name to Flower's record."""
    return ArrayRecord({key: Array(array) for key, array in packed.items()})


def packed_of(record: ArrayRecord) -> Packed:
    """Convert Flower's record to arrays by name."""
    return {key: np.asarray(array.numpy()) for key, array in record.items()}
