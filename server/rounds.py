"""The rounds of a run over Flower's Grid: ask, wait with a deadline, go on with who answered.

Flower's own ``Strategy.start`` waits for missing sites without a bound, ends the run when two
replies carry different metrics, and keeps neither per-site values nor checkpoints; so the loop is
ours, and Flower carries its messages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Generic, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from configs import wire
from configs.run import RoundsConfig, RunConfig
from mtl_model.metrics import Metrics, compute
from mtl_model.packing import Layout, Packed
from mtl_model.sums import Classes, empty_sums
from server.aggregate import Contribution, average_by_task
from server.central import CentralPrivacy
from server.checkpoint import Best, save_round
from server.folder import RunFolder, append_line, write_json
from server.history import POOLED, Line, write_line
from server.records import (
    Declined,
    ReplyError,
    SiteReport,
    TrainReport,
    question,
    read_description,
    read_evaluation,
    read_training,
    task,
)
from server.report import central_text

log = logging.getLogger(__name__)

POLL_S = 0.2  # between two looks for replies
SETTLE_S = 1.0  # without a new site for so long, all are taken to be there

Answer = TypeVar("Answer")
Notify = Callable[[dict[str, object]], None]  # told of every event, for whoever watches


class RunFailed(RuntimeError):
    """The run cannot go on. The message names the sites and their reasons."""


class RunRefused(RunFailed):
    """The run could not begin: settings and sites' data do not fit. Nothing was trained."""


@dataclass(frozen=True)
class Phase:
    """One question to several sites and what came of it."""

    name: str
    answered: Mapping[str, Message]  # by site
    silent: Mapping[str, str]  # by site: why there is no answer


@dataclass(frozen=True)
class Answers(Generic[Answer]):
    """What came of a phase, by site."""

    usable: dict[str, Answer]
    failed: dict[str, str]  # why there is no usable answer
    declined: dict[str, str]  # why a site would not, by its own rules


@dataclass(frozen=True)
class Evaluation:
    """One model on one split of every site."""

    metrics: dict[str, Metrics]  # by site, then POOLED
    failed: dict[str, str]
    declined: dict[str, str]
    withheld: dict[str, tuple[str, ...]]  # what a site's policy keeps out of its sums


class Federation:
    """The sites that take part in a run, and the means to ask them.

    Args:
        grid: Flower's door to the sites.
        nodes: the node of each site, by its name.
        needed: sites that must answer each phase.
        deadline_s: longest wait for a phase's answers.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Mapping[str, int],
        needed: int,
        deadline_s: float,
        notify: Notify,
    ) -> None:
        self.grid = grid
        self.nodes = nodes
        self.needed = needed
        self.deadline_s = deadline_s
        self.notify = notify

    def ask(self, number: int, phase: str, kind: str, content: RecordDict) -> Phase:
        """Ask every site the same, and wait until all answered or the deadline is over."""
        self.notify({"event": "phase", "round": number, "phase": phase, "sites": len(self.nodes)})
        asked: dict[str, str] = {}  # message id: site
        failed: dict[str, str] = {}
        for site, node in self.nodes.items():
            message = Message(content, node, kind, ttl=self.deadline_s, group_id=str(number))
            # one at a time: each carries the whole network
            ids = list(self.grid.push_messages([message]))
            if ids and ids[0]:
                asked[ids[0]] = site
            else:
                failed[site] = "its node could not be reached"
        answered: dict[str, Message] = {}
        ends = time.monotonic() + self.deadline_s
        while asked and time.monotonic() < ends:
            for reply in self.grid.pull_messages(list(asked)):
                site = asked.pop(reply.metadata.reply_to_message_id)
                answered[site] = reply
                self.notify({"event": "answer", "round": number, "phase": phase, "site": site})
            if asked:
                time.sleep(POLL_S)
        failed |= dict.fromkeys(asked.values(), f"no answer in {self.deadline_s:g} s")
        return Phase(phase, answered, failed)

    def read(
        self, phase: Phase, number: int, read: Callable[[Message, str], Answer]
    ) -> Answers[Answer]:
        """Read every reply; one that cannot be used becomes a failure with its reason.

        A site that declines is there and well: the round goes on without it, whatever
        rounds.min-sites says, as long as one site answers.

        Raises:
            RunFailed: if fewer sites than needed answered, or none but declining ones.
        """
        answers: Answers[Answer] = Answers({}, dict(phase.silent), {})
        for site in sorted(phase.answered):
            try:
                answers.usable[site] = read(phase.answered[site], site)
            except Declined as error:
                answers.declined[site] = str(error)
            except ReplyError as error:
                answers.failed[site] = str(error)
        for site, reason in answers.failed.items():
            log.warning("round %d, %s: %s: %s", number, phase.name, site, reason)
        for site, reason in answers.declined.items():
            log.warning("round %d, %s: %s declined: %s", number, phase.name, site, reason)
        there = len(answers.usable) + len(answers.declined)
        if there < self.needed or (self.needed and not answers.usable):
            missing = answers.failed | answers.declined
            reasons = "; ".join(f"{site}: {why}" for site, why in sorted(missing.items()))
            declined = f" and {len(answers.declined)} declined" if answers.declined else ""
            raise RunFailed(
                f"round {number}, {phase.name}: {len(answers.usable)} of {len(self.nodes)} sites "
                f"answered{declined}, {self.needed} are needed (rounds.min-sites): {reasons}"
            )
        return answers


def gather_sites(
    grid: Grid, config: RunConfig, notify: Notify
) -> tuple[Federation, dict[str, SiteReport]]:
    """Wait for sites, ask who they are, and check that the run makes sense with their data.

    Raises:
        RunRefused: if too few sites are there in time or can take part (rounds.min-sites), two
            have the same name, or a class occurs at none.
    """
    rounds = config.rounds
    nodes = _wait_for_nodes(grid, rounds)
    needed = sites_needed(rounds.min_sites, len(nodes))
    unnamed = {f"node {node}": node for node in nodes}
    asked = Federation(grid, unnamed, 0, rounds.deadline_s, notify)
    phase = asked.ask(0, "describe", wire.DESCRIBE, question())
    described = asked.read(phase, 0, lambda reply, _: read_description(reply, config.data))
    found, failed = described.usable, described.failed | described.declined
    if len(found) < needed:
        raise RunRefused(
            f"{len(found)} of {len(nodes)} sites can take part, {needed} are needed "
            f"(rounds.min-sites): {'; '.join(dict.fromkeys(failed.values()))}"
        )
    by_name: dict[str, str] = {}
    for label, report in found.items():
        if report.name in by_name or report.name == POOLED:
            raise RunRefused(f"two sites are called {report.name!r}, or it is a reserved name")
        by_name[report.name] = label
    reports = {name: found[by_name[name]] for name in sorted(by_name)}
    told = {name: r.classes.get(wire.TRAIN_SPLIT) for name, r in reports.items()}
    if None not in told.values():  # with privacy no site tells
        check_classes(config.data.classes, {name: n for name, n in told.items() if n is not None})
    notify(
        {
            "event": "sites",
            "sites": {name: vars(report) for name, report in reports.items()},
            "failed": failed,
        }
    )
    named = {name: unnamed[by_name[name]] for name in reports}
    return Federation(grid, named, needed, rounds.deadline_s, notify), reports


def sites_needed(min_sites: str, sites: int) -> int:
    """``all``, a number, or a percentage (rounded up) of the sites."""
    if min_sites == "all":
        return sites
    if min_sites.endswith("%"):
        return max(1, -(-sites * int(min_sites[:-1]) // 100))
    return int(min_sites)


def _wait_for_nodes(grid: Grid, rounds: RoundsConfig) -> list[int]:
    """The connected nodes, once there are enough and no more come."""
    least = int(rounds.min_sites) if rounds.min_sites.isdigit() else 1
    started = last_change = time.monotonic()
    nodes: list[int] = []
    while True:
        before, nodes = nodes, sorted(grid.get_node_ids())
        now = time.monotonic()
        if nodes != before:
            last_change = now
        if len(nodes) >= least and now - last_change >= SETTLE_S:
            return nodes
        if now - started > rounds.wait_for_sites_s:
            if len(nodes) >= least:
                return nodes
            raise RunRefused(
                f"{len(nodes)} sites are connected, {least} are needed (rounds.min-sites), after "
                f"{rounds.wait_for_sites_s:g} s (rounds.wait-for-sites-s)"
            )
        time.sleep(POLL_S)


def check_classes(classes: Sequence[str], counts: Mapping[str, Sequence[int]]) -> None:
    """See that every class is trained somewhere, unless no site has labels at all.

    Args:
        counts: training images of each class, by site.

    Raises:
        RunRefused: naming a class that no site has.
    """
    totals = [sum(of_site) for of_site in zip(*counts.values(), strict=True)]
    for name, total in zip(classes, totals, strict=True):
        if total == 0 and any(totals):
            raise RunRefused(
                f"data.classes: no site has a training image of class {name!r}; "
                f"the sites are {', '.join(counts)}"
            )


class Rounds:
    """The rounds of one run, from initial weights to the best model's test results."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        federation: Federation,
        layout: Layout,
        weights: Packed,
        watch: Callable[[Line], None] = lambda line: None,
        central: CentralPrivacy | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.federation = federation
        self.layout = layout
        self.weights = weights
        self.watch = watch
        self.central = central
        self.best: Best | None = None
        self.best_weights = weights

    def run(self) -> Evaluation:
        """Train all rounds, then test the best one's model.

        Raises:
            RunFailed: if too few sites answered a phase. What was saved before stays.
        """
        for number in range(1, self.config.rounds.count + 1):
            self.one_round(number)
        return self.test()

    def one_round(self, number: int) -> None:
        """Train at every site, average, evaluate at every site, save."""
        size = sum(array.nbytes for array in self.weights.values())
        content = task(number, self.layout, self.weights, wire.TRAIN_SPLIT)
        phase = self.federation.ask(number, "train", wire.TRAIN, content)
        trained = self.federation.read(
            phase, number, lambda reply, site: read_training(reply, site, self.layout)
        )
        contributions: list[Contribution] = [c for c, _ in trained.usable.values()]
        if self.central is None:
            self.weights = average_by_task(contributions, self.weights)
        else:
            self.weights = self.central.average(number, contributions, self.weights)
        release = self.central.releases[-1] if self.central else None
        evaluation = self._evaluate(number, wire.VAL_SPLIT)
        self._choose(number, evaluation)
        reports: dict[str, TrainReport] = {s: report for s, (_, report) in trained.usable.items()}
        failed = {"train": trained.failed, "evaluate": evaluation.failed}
        declined = {"train": trained.declined, "evaluate": evaluation.declined}
        for site in (*self.federation.nodes, POOLED):
            self._record(
                Line(
                    number,
                    site,
                    wire.VAL_SPLIT,
                    evaluation.metrics.get(site),
                    reports.get(site),
                    {phase: reasons[site] for phase, reasons in failed.items() if site in reasons},
                    {
                        phase: reasons[site]
                        for phase, reasons in declined.items()
                        if site in reasons
                    },
                    bytes_down=0 if site == POOLED else 2 * size,  # to train, and to evaluate
                    bytes_up=size if site in reports else 0,
                    central=release if site == POOLED else None,
                )
            )
        for site, metrics in evaluation.metrics.items():
            log.info("round %d/%d: %s: %s", number, self.config.rounds.count, site, metrics.brief())
        if release is not None:
            log.info("round %d/%d: %s", number, self.config.rounds.count, central_text(release))
        # after its history: a round whose state is there is complete
        save_round(
            self.folder,
            self.config,
            self.layout,
            self.weights,
            number,
            self.best,
            self.central.state() if self.central else None,
        )
        self.federation.notify(
            {
                "event": "round",
                "round": number,
                "best": self.best.number if self.best else None,
                "metrics": {site: asdict(m) for site, m in evaluation.metrics.items()},
                "failed": trained.failed | evaluation.failed,
                "declined": trained.declined | evaluation.declined,
                "epsilon": {s: r.epsilon for s, r in reports.items() if r.epsilon is not None},
                "central": asdict(release) if release else None,
            }
        )

    def test(self) -> Evaluation:
        """Evaluate the best round's model on every site's held-out test images."""
        number = self.best.number if self.best else self.config.rounds.count
        if self.best is not None:
            self.weights = self.best_weights
        evaluation = self._evaluate(number, wire.TEST_SPLIT)
        for site, metrics in evaluation.metrics.items():
            self._record(Line(number, site, wire.TEST_SPLIT, metrics))
        write_json(
            self.folder.results,
            {
                "split": wire.TEST_SPLIT,
                "round": number,
                "positive": self.config.data.positive,
                "sites": {s: asdict(m) for s, m in evaluation.metrics.items() if s != POOLED},
                POOLED: asdict(evaluation.metrics[POOLED]),
                "failed": evaluation.failed,
                "declined": evaluation.declined,
                "withheld": evaluation.withheld,
            },
        )
        return evaluation

    def _evaluate(self, number: int, split: str) -> Evaluation:
        content = task(number, self.layout, self.weights, split)
        phase = self.federation.ask(number, f"evaluate on {split}", wire.EVALUATE, content)
        data = self.config.data
        answers = self.federation.read(phase, number, lambda reply, _: read_evaluation(reply, data))
        sums = {site: found for site, (found, _) in answers.usable.items()}
        withheld = {site: words for site, (_, words) in answers.usable.items() if words}
        classes = Classes.of(data)
        metrics = {site: compute(s, classes) for site, s in sums.items()}
        metrics[POOLED] = compute(sum(sums.values(), empty_sums(classes)), classes)
        return Evaluation(metrics, answers.failed, answers.declined, withheld)

    def _choose(self, number: int, evaluation: Evaluation) -> None:
        """A round beats another that no more sites evaluated; fewer sites make another value."""
        value = evaluation.metrics[POOLED].value(self.config.evaluate.select_by)
        if value is None:
            return
        sites = len(evaluation.metrics) - 1
        if self.best is None or (sites, value) > (self.best.sites, self.best.value):
            self.best, self.best_weights = Best(number, value, sites), self.weights

    def _record(self, line: Line) -> None:
        write_line(self.folder.history, line)
        self.watch(line)


def progress_writer(folder: RunFolder) -> Notify:
    """Make what appends events, with the time, to the run folder's progress file."""

    def notify(event: dict[str, object]) -> None:
        append_line(folder.progress, {"time": time.time(), **event})

    return notify
