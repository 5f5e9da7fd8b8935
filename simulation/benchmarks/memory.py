"""Server memory needed for the replies of a round, aggregated incrementally or all at once.

The benchmark runs the server code of a training round, including Flower's serialisation, with a
grid client that generates the reply of a site when it is pulled. Only the sites and the network
connection are simulated. ``polyclinic bench memory`` prints the results;
docs/benchmarks/reliability.md shows an example.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity
from rich.table import Table

from polyclinic.configs import wire
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.output import messages, print_json, print_table
from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.network import network_of
from polyclinic.mtl_model.packing import Packed
from polyclinic.server.aggregation.parameters import Parts
from polyclinic.server.rounds.federation import Federation
from polyclinic.server.rounds.loop import Rounds
from polyclinic.server.rounds.messages import RunIdentity
from polyclinic.server.runs.checkpoint import ServerState
from polyclinic.server.runs.events import Events
from polyclinic.server.runs.folder import RunFolder
from polyclinic.server.runs.reports import SiteReport
from polyclinic.simulation.benchmarks.timing import memory_of, peak_of_process

IDENTITY = RunIdentity("0" * 32)
EXAMPLES = 80  # training examples that each simulated site reports
STEPS = 10  # optimiser steps that each simulated site reports
GATHERS = "fedmedian"  # a strategy that needs all replies at the same time


@dataclass(frozen=True)
class MemoryRow:
    """The measurement for one strategy and number of sites."""

    strategy: str
    sites: int
    peak_mb: float | None  # None if the process failed, usually because it ran out of memory


class Replies:
    """A grid client that generates the training reply of a site when it is pulled."""

    def __init__(self, sites: int) -> None:
        self.sites = sites
        self.node_of: dict[str, int] = {}
        self.weights: Packed = {}
        self.random = np.random.default_rng(0)

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node) for node in range(1, self.sites + 1)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            identity = f"to-{message.metadata.dst_node_id}"
            self.node_of[identity] = message.metadata.dst_node_id
            ids.append(identity)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._reply(i) for i in message_ids if i in self.node_of]

    def _reply(self, identity: str) -> Message:
        node = self.node_of.pop(identity)
        about = ConfigRecord({wire.NAME: name_of(node), wire.NUMBER: 1, wire.RUN: IDENTITY.run})
        counts = dict.fromkeys((wire.EXAMPLES, wire.WITH_MASK, wire.WITH_LABEL), EXAMPLES)
        arrays = {
            key: Array(array + self.random.standard_normal(array.size, np.float32) / 1000)
            for key, array in self.weights.items()
        }
        content = RecordDict(
            {
                wire.SITE: about,
                wire.SUMS: MetricRecord({**counts, wire.STEPS: STEPS}),
                wire.WEIGHTS: ArrayRecord(arrays),
            }
        )
        made = Message(content, dst_node_id=1, message_type=wire.TRAIN)
        reply = message_from_proto(message_to_proto(made))
        reply.metadata.__dict__["_reply_to_message_id"] = identity
        return reply


def name_of(node: int) -> str:
    """Return the name of the simulated site with the given node number."""
    return f"site-{node:03d}"


def run_memory_bench(sites: str, gathered: str, preset: str, as_json: bool) -> None:
    """Measure server memory and print results to standard output, messages to standard error.

    Args:
        sites: numbers of sites for incremental aggregation, separated by commas.
        gathered: numbers of sites for aggregation of all replies at once; may be empty.
        preset: the value of ``model.preset``.
        as_json: True to print the results as JSON, False to print a table.

    Raises:
        ConfigError: if a number of sites is not a whole number.
    """
    words = messages()
    rows = []
    for strategy, numbers in (("fedavg", sites), (GATHERS, gathered)):
        for number in _numbers(numbers):
            words.print(f"{strategy}: {number} sites")
            arguments = [strategy, str(number), preset]
            peak = memory_of("polyclinic.simulation.benchmarks.memory", arguments, words)
            rows.append(MemoryRow(strategy, number, peak))
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]})
        return
    table = Table(
        title=f"Server memory during the training of a round, model.preset {preset}",
        title_justify="left",
        caption="peak memory of the process, including Python and PyTorch",
        caption_justify="left",
    )
    for head in ("strategy", "replies", "sites", "peak MB"):
        table.add_column(head, justify="right" if head in ("sites", "peak MB") else "left")
    for row in rows:
        way = "gathered" if row.strategy == GATHERS else "aggregated incrementally"
        shown = "-" if row.peak_mb is None else f"{row.peak_mb:.0f}"
        table.add_row(row.strategy, way, str(row.sites), shown)
    print_table(table)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(
            f"sites: expected whole numbers separated by commas, got {text!r}"
        ) from None


def one_round(config: RunConfig, sites: int) -> float:
    """Collect and aggregate the replies of one round.

    Must be called inside a Flower task, or with a substitute for its identity as in ``main``.

    Returns:
        The duration in seconds, including the generation of the replies.
    """
    network = network_of(config.model, config.data, config.loss, seed=0)
    parts = Parts.of(network, config.strategy)
    state = ServerState(0, parts.whole.pack(network.state_dict()))
    del network
    grid = Replies(sites)
    grid.weights = state.weights
    folder = RunFolder.create(config)
    events = Events(folder)
    federation = Federation(grid, config.rounds, config.data, RecordDict, events.notify)
    counts = dict.fromkeys(wire.SPLITS, EXAMPLES)
    for node in range(1, sites + 1):
        name = name_of(node)
        federation.nodes[name] = node
        federation.roster.add(name)
        federation.reports[name] = SiteReport(name, counts, {}, counts, counts, (), "", "", {})
    rounds = Rounds(config, folder, federation, parts, state, IDENTITY)
    del state
    started = time.perf_counter()
    _, reports = rounds.train(1)
    if len(reports) != sites:
        raise RuntimeError(f"expected {sites} valid replies, got {len(reports)}")
    return time.perf_counter() - started


def main(strategy: str, sites: int, preset: str) -> None:
    """Run one round in this process and print its peak memory in MB."""
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)  # Flower creates messages only inside a task
    with TemporaryDirectory() as place:
        flat = {"run.output-dir": place, "model.preset": preset, "strategy.name": strategy}
        seconds = one_round(RunConfig.from_flat(flat), sites)
    sys.stderr.write(f"{seconds:.0f} s\n")
    print(peak_of_process())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
