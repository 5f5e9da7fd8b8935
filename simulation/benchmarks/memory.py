"""How much memory the server needs for a round's replies: folded as they come, or all gathered.

The real way of a round's training: our federation over a door that has a site's reply made when it
is pulled, through Flower's serialisation; only sites and network are left out. `polyclinic bench
memory` prints it; docs/reliability.md shows a run.
"""

from __future__ import annotations

import json
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
from rich.console import Console
from rich.table import Table

from polyclinic.configs import wire
from polyclinic.configs.errors import ConfigError
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
EXAMPLES = 80
STEPS = 10
GATHERS = "fedmedian"  # a strategy that needs all replies at once


@dataclass(frozen=True)
class MemoryRow:
    """One way with one number of sites."""

    strategy: str
    sites: int
    peak_mb: float | None  # None: it failed, for lack of memory as a rule


class Replies:
    """A door to sites that have each trained when their reply is pulled."""

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
    return f"site-{node:03d}"


def run_memory_bench(sites: str, gathered: str, preset: str, as_json: bool) -> None:
    """Measure and print, results to standard output and words to standard error.

    Args:
        sites: numbers of sites, with commas, for replies that are folded.
        gathered: numbers of sites for replies that are gathered; may be empty.

    Raises:
        ConfigError: for words that are no numbers.
    """
    words = Console(stderr=True, markup=False)
    rows = []
    for strategy, numbers in (("fedavg", sites), (GATHERS, gathered)):
        for number in _numbers(numbers):
            words.print(f"{strategy}: {number} sites")
            arguments = [strategy, str(number), preset]
            peak = memory_of("polyclinic.simulation.benchmarks.memory", arguments, words)
            rows.append(MemoryRow(strategy, number, peak))
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        return
    table = Table(
        title=f"The server's memory in a round's training, network {preset}",
        title_justify="left",
        caption="peak of the whole process, Python and PyTorch included",
        caption_justify="left",
    )
    for head in ("strategy", "replies are", "sites", "peak MB"):
        table.add_column(head, justify="right" if head in ("sites", "peak MB") else "left")
    for row in rows:
        way = "gathered" if row.strategy == GATHERS else "folded as they come"
        shown = "-" if row.peak_mb is None else f"{row.peak_mb:.0f}"
        table.add_row(row.strategy, way, str(row.sites), shown)
    Console(width=None if sys.stdout.isatty() else 100, markup=False).print(table)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"sites: expected numbers with commas, got {text!r}") from None


def one_round(config: RunConfig, sites: int) -> float:
    """Take one round's replies in, within a task of Flower's (or what is taken for one).

    Returns:
        Seconds that it took, the making of the replies included.
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
        raise RuntimeError(f"expected {sites} good replies, got {len(reports)}")
    return time.perf_counter() - started


def main(strategy: str, sites: int, preset: str) -> None:
    """One round in this process; prints its peak, in MB."""
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)  # Flower makes no message outside of a task
    with TemporaryDirectory() as place:
        flat = {"run.output-dir": place, "model.preset": preset, "strategy.name": strategy}
        seconds = one_round(RunConfig.from_flat(flat), sites)
    sys.stderr.write(f"{seconds:.0f} s\n")
    print(peak_of_process())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
