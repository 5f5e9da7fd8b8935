"""The sites of a run over Flower's Grid: who is there, asking them, and what became of it.

Flower's own ``Strategy.start`` waits for missing sites without a bound, ends the run when two
replies carry different metrics, and keeps no values by site; so asking is ours, and Flower carries
the messages. Nothing here waits without a bound, not even for the SuperLink.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import httpx
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from polyclinic.configs import wire
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.rounds import RoundsConfig
from polyclinic.server.rounds.messages import (
    Declined,
    Late,
    Refusal,
    ReplyError,
    Unreachable,
    read_description,
)
from polyclinic.server.rounds.roster import SiteRoster, named
from polyclinic.server.runs.events import Notify
from polyclinic.server.runs.history import POOLED
from polyclinic.server.runs.reports import SiteReport

log = logging.getLogger(__name__)

POLL_S = 0.2  # between two looks for replies
PULL_S = 5.0  # for a reply that is there to be taken in, before others are looked at
STUCK_S = 60.0  # and after which it is taken for one that never becomes whole
MOST_PULLS = 3  # at a time, but for stuck ones: each may hold a whole network
SETTLE_S = 1.0  # without a new site for so long, all are taken to be there
SUPERLINK_S = 300.0  # longest wait for one answer of the SuperLink, which may be restarting
AGAIN_S = 2.0  # before the SuperLink is asked again what it could not answer

Answer = TypeVar("Answer")
Result = TypeVar("Result")


class GridClient(Protocol):
    """What is asked of Flower's Grid."""

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes that are connected, with the names that their keys are registered under."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:
        """Send messages; their ids, None for one whose node is not there."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come to some messages."""


class RunFailed(RuntimeError):
    """The run cannot go on. The message names the sites and their reasons."""


class RunRefused(RunFailed):
    """The run could not begin: settings and sites' data do not fit. Nothing was trained."""


@dataclass
class Phase(Generic[Answer]):
    """One question to several sites and what came of it, by site."""

    name: str
    asked: tuple[str, ...]
    answered: dict[str, Answer] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)  # why it would not, by its own rules
    failed: dict[str, str] = field(default_factory=dict)  # why it could not
    late: dict[str, str] = field(default_factory=dict)  # how long it was waited for
    refused: dict[str, str] = field(default_factory=dict)  # what is wrong with its reply
    left_out: dict[str, str] = field(default_factory=dict)  # why it was not asked

    @property
    def lost(self) -> dict[str, str]:
        """Sites that were asked in vain, and why."""
        return self.failed | self.late | self.refused

    def refuse(self, site: str, reason: str) -> None:
        """Take an answer back that others show to be no good."""
        self.answered.pop(site, None)
        self.refused[site] = reason

    def outcomes(self) -> Iterator[tuple[str, Mapping[str, str]]]:
        """Every outcome but an answer, with its sites and reasons."""
        for outcome in ("declined", "failed", "late", "refused", "left_out"):
            yield outcome, getattr(self, outcome)


class Federation:
    """The sites that take part in a run, and the means to ask them.

    Sites are known by name, whatever Flower's number of their node: a SuperNode that was restarted
    may come back under another number, and is asked again from the next phase on.

    Args:
        grid: Flower's door to the sites.
        rounds: how long to wait, and how many sites must be there.
        data: what their descriptions are read by.
        greeting: makes the question that a site describes itself for.
    """

    def __init__(
        self,
        grid: GridClient,
        rounds: RoundsConfig,
        data: DataConfig,
        greeting: Callable[[], RecordDict],
        notify: Notify,
    ) -> None:
        self.grid = grid
        self.rounds = rounds
        self.data = data
        self.greeting = greeting
        self.notify = notify
        self.roster = SiteRoster(rounds.suspend_after, rounds.suspend_rounds)
        self.reports: dict[str, SiteReport] = {}
        self.closed = False  # to sites that were not there when the run began
        self.nodes: dict[str, int] = {}
        self._bounded = DeadlineExecutor(max(SUPERLINK_S, rounds.deadline_s), "the SuperLink")
        self._pulls = ReplyCollector(grid)
        self._registered: dict[int, str] = {}  # node: name of its key; empty in simulation
        self._greeted: dict[str, int] = {}  # message id: node
        self._strangers: dict[int, int] = {}  # node: the round in which it is greeted again

    def wait_for_sites(self, config: RunConfig) -> None:
        """Wait for sites, ask who they are, and check that the run makes sense with their data.

        Raises:
            RunRefused: if too few sites are there in time or can take part (rounds.min-sites), or
                a class occurs at none.
        """
        nodes = self._wait_for_nodes()
        needed = sites_needed(self.rounds.min_sites, len(nodes))
        self._greet(0)
        failed: dict[str, str] = {}
        self.notify({"event": "phase", "round": 0, "phase": "describe", "sites": len(nodes)})
        began = time.monotonic()
        while time.monotonic() - began < self.rounds.deadline_s:
            failed |= self._introduce(0, self._pull([*self._greeted]))
            if not self._greeted:
                # after a restart Flower takes nodes for connected that are not yet there again
                if len(self.reports) >= needed or time.monotonic() - began > (
                    self.rounds.wait_for_sites_s
                ):
                    break
                self._greet(0)
                if not self._greeted:
                    break  # all have spoken
            time.sleep(POLL_S)
        late = f"no answer in {self.rounds.deadline_s:g} s (rounds.deadline-s)"
        failed |= {f"node {node}": late for node in self._greeted.values()}
        for node in self.nodes.values():  # asked again, and here after all
            failed.pop(f"node {node}", None)
        if len(self.reports) < needed:
            raise RunRefused(
                f"{len(self.reports)} of {len(nodes)} sites can take part, {needed} are needed "
                f"(rounds.min-sites): {'; '.join(dict.fromkeys(failed.values()))}"
            )
        told = {name: r.classes.get(wire.TRAIN_SPLIT) for name, r in self.reports.items()}
        if None not in told.values():  # with privacy no site tells
            counts = {name: n for name, n in told.items() if n is not None}
            check_classes(config.data.classes, counts)
        self.notify(
            {
                "event": "sites",
                "sites": {name: vars(report) for name, report in sorted(self.reports.items())},
                "failed": failed,
            }
        )

    def ask(
        self,
        number: int,
        phase: str,
        kind: str,
        content: RecordDict,
        sites: Sequence[str],
        read: Callable[[Message, str], Answer],
        needed: int,
        suspended: Mapping[str, str] | None = None,
    ) -> Phase[Answer]:
        """Ask sites the same, read every reply as it comes, and wait for the deadline at most.

        Args:
            sites: whom to ask, by name; those that are not connected are left out.
            read: makes an answer of a reply; what it raises of ``ReplyError`` is that site's
                outcome and hurts no other.
            needed: how many must be there; it is waited for them to connect, but not for more.
            resting: sites that this phase leaves out, and why.

        Raises:
            RunFailed: if the SuperLink does not answer.
        """
        there = self._wait_for(number, sites, needed)
        asked = [site for site in sites if site in there]
        found: Phase[Answer] = Phase(phase, tuple(asked), left_out=dict(suspended or {}))
        found.left_out |= {s: "not connected" for s in sites if s not in there}
        self.notify({"event": "phase", "round": number, "phase": phase, "sites": len(asked)})
        waiting: dict[str, str] = {}  # message id: site
        ends = time.monotonic() + self.rounds.deadline_s
        for site in asked:
            message = Message(
                content, self.nodes[site], kind, ttl=self.rounds.deadline_s, group_id=str(number)
            )
            identity = self._push(message)
            if identity:
                waiting[identity] = site
            else:
                found.failed[site] = "its node could not be reached"
        seen: set[str] = set()
        over = False
        while waiting and not over:
            over = time.monotonic() >= ends  # what has arrived by then is taken in
            for reply in self._pull([*waiting, *self._greeted]):
                identity = answered(reply)
                if identity in self._greeted:
                    self._introduce(number, [reply])
                elif identity in waiting:
                    site = waiting.pop(identity)
                    seen.add(identity)
                    if isinstance(reply, Unreadable):
                        found.refused[site] = reply.reason
                    else:
                        self._take(found, reply, site, read)
                    self.notify({"event": "answer", "round": number, "phase": phase, "site": site})
                else:
                    again = "a second reply" if identity in seen else "a reply to no question"
                    log.warning("round %d, %s: %s was dropped", number, phase, again)
            if waiting and not over:
                time.sleep(POLL_S)
        late = f"no answer in {self.rounds.deadline_s:g} s (rounds.deadline-s)"
        found.late |= dict.fromkeys(waiting.values(), late)
        self._pulls.forget(waiting)
        return found

    def finish_phase(self, number: int, phase: Phase[Answer], needed: int) -> None:
        """Note what came of a phase in the book and the log, and see whether the run can go on.

        A site that declines is there and well: the round goes on without it, whatever
        rounds.min-sites says, as long as one site answers.

        Raises:
            RunFailed: if fewer sites than needed are there, or none but declining ones.
        """
        for outcome, reasons in phase.outcomes():
            for site, reason in sorted(reasons.items()):
                say = log.info if outcome == "left_out" else log.warning
                word = outcome.replace("_", " ")
                say("round %d, %s: %s %s: %s", number, phase.name, site, word, reason)
        for site in (*phase.answered, *phase.declined):
            self.roster.answered(site)
        for site in sorted(phase.lost):
            if self.roster.failed(number, site):
                again = self.roster.standings[site].rests_until
                log.warning("%s is set aside and asked again in round %d", site, again)
                self.notify({"event": "set aside", "round": number, "site": site, "until": again})
        self.notify(
            {
                "event": "settled",
                "round": number,
                "phase": phase.name,
                "answered": sorted(phase.answered),
                **{outcome: dict(reasons) for outcome, reasons in phase.outcomes()},
            }
        )
        there = len(phase.answered) + len(phase.declined)
        if there < needed or not phase.answered:
            missing = phase.lost | phase.declined | phase.left_out
            declined = f" and {len(phase.declined)} declined" if phase.declined else ""
            raise RunFailed(
                f"round {number}, {phase.name}: {len(phase.answered)} of "
                f"{len(self.roster.standings)} sites answered{declined}, {needed} are needed "
                f"(rounds.min-sites): {named(missing)}"
            )

    def _take(
        self,
        phase: Phase[Answer],
        reply: Message,
        site: str,
        read: Callable[[Message, str], Answer],
    ) -> None:
        try:
            phase.answered[site] = read(reply, site)
        except Declined as error:
            phase.declined[site] = str(error)
        except Late as error:
            phase.late[site] = str(error)
        except Refusal as error:
            phase.failed[site] = str(error)
        except ReplyError as error:
            phase.refused[site] = str(error)

    def _wait_for_nodes(self) -> list[int]:
        """The connected nodes, once there are enough and no more come."""
        least = int(self.rounds.min_sites) if self.rounds.min_sites.isdigit() else 1
        started = last_change = time.monotonic()
        nodes: list[int] = []
        while True:
            before, nodes = nodes, self._connected()
            now = time.monotonic()
            if nodes != before:
                last_change = now
            if len(nodes) >= least and now - last_change >= SETTLE_S:
                return nodes
            if now - started > self.rounds.wait_for_sites_s:
                if len(nodes) >= least:
                    return nodes
                raise RunRefused(
                    f"{len(nodes)} sites are connected, {least} are needed (rounds.min-sites), "
                    f"after {self.rounds.wait_for_sites_s:g} s (rounds.wait-for-sites-s)"
                )
            time.sleep(POLL_S)

    def _wait_for(self, number: int, sites: Sequence[str], needed: int) -> set[str]:
        """Those of some sites that are connected, once enough are, or the wait is over."""
        ends = time.monotonic() + self.rounds.wait_for_sites_s
        while True:
            self._greet(number)
            if self._greeted:
                self._introduce(number, self._pull([*self._greeted]))
            nodes = set(self._connected())
            there = {site for site in sites if self.nodes.get(site) in nodes}
            if len(there) >= min(needed, len(sites)) or time.monotonic() > ends:
                return there
            time.sleep(POLL_S)

    def _greet(self, number: int) -> None:
        """Ask unknown nodes to describe themselves; their answers come when they come."""
        known = {*self.nodes.values(), *self._greeted.values()}
        for node in self._connected():
            if node in known or self._strangers.get(node, 0) > number:
                continue
            ttl = self.rounds.deadline_s
            message = Message(self.greeting(), node, wire.DESCRIBE, ttl=ttl, group_id=str(number))
            identity = self._push(message)
            if identity:
                self._greeted[identity] = node

    def _introduce(self, number: int, replies: Iterable[Message | Unreadable]) -> dict[str, str]:
        """Take descriptions in; by node, why one does not take part."""
        failed: dict[str, str] = {}
        for reply in replies:
            node = self._greeted.pop(answered(reply), None)
            if node is None:
                continue
            try:
                if isinstance(reply, Unreadable):
                    raise ReplyError(reply.reason)
                self._admit(number, node, read_description(reply, self.data))
            except (Late, Unreachable) as error:  # it has not spoken, and is asked again
                failed[f"node {node}"] = str(error)
            except ReplyError as error:
                self._strangers[node] = number + 1 + self.rounds.suspend_rounds
                failed[f"node {node}"] = str(error)
                log.warning("node %d does not take part: %s", node, error)
        return failed

    def _admit(self, number: int, node: int, report: SiteReport) -> None:
        """Let a node stand for the site that it says it is.

        Raises:
            ReplyError: if its key is another site's, if that site is connected already, or if it
                is not to join.
        """
        name = report.name
        if name == POOLED:
            raise ReplyError(f"its name is {POOLED!r}, which stands for all sites together")
        registered = self._registered.get(node)
        if registered and registered != name:
            raise ReplyError(
                f"its key is registered as site {registered!r}, its site.yaml says {name!r}; the "
                "two must be the same"
            )
        before = self.nodes.get(name)
        if before is not None and before in self._connected():
            raise ReplyError(
                f"site {name!r} is connected already, as node {before}; one of the two must stop, "
                "or be given a name of its own"
            )
        if name not in self.reports and self.closed:  # a resumed run's book may have others
            raise ReplyError(
                f"site {name!r} was not there when the run began, and central differential privacy "
                "is accounted for those that were"
            )
        known = name in self.reports
        self.nodes[name], self.reports[name] = node, report
        self.roster.add(name)
        if number or known:
            log.info("round %d: %s %s", number, name, "is back" if known else "joins")
            self.notify({"event": "joined", "round": number, "site": name, "back": known})

    def _connected(self) -> list[int]:
        nodes = list(self._bounded(self.grid.get_nodes))
        self._registered = {node.node_id: node.name for node in nodes}
        return sorted(self._registered)

    def _push(self, message: Message) -> str | None:
        """Send one message, which may carry the whole network; None if its node is not there."""
        ids = list(self._bounded(lambda: self.grid.push_messages([message])))
        return ids[0] if ids else None

    def _pull(self, ids: Iterable[str]) -> Iterator[Message | Unreadable]:
        """What has come, one reply at a time: several with a network each may be too many."""
        return self._pulls.take(ids)


@dataclass(frozen=True)
class Unreadable:
    """A reply that Flower could make no message of."""

    question: str  # the message that it answers
    reason: str


def answered(reply: Message | Unreadable) -> str:
    """Which message a reply answers."""
    if isinstance(reply, Unreadable):
        return reply.question
    return str(reply.metadata.reply_to_message_id)


class ReplyCollector:
    """Takes replies in, so that one which never becomes whole holds up no other.

    Of a site that vanishes while it sends, Flower has a reply without all its parts, and
    ``pull_messages`` waits for them, for hours if need be. Such a pull goes on by itself, in a
    thread that ends with the process, while others are looked at; a few at a time, so that a slow
    machine does not take all sites' networks in at once.
    """

    def __init__(self, grid: GridClient) -> None:
        self.grid = grid
        self._going: dict[str, Future[list[Message]]] = {}
        self._since: dict[str, float] = {}

    def take(self, ids: Iterable[str]) -> Iterator[Message | Unreadable]:
        """What has come of some messages' replies.

        One that is not whole within ``PULL_S`` ends the look: the others have theirs next time,
        and a look takes no longer, however many there are and whoever does not answer. So does
        one that the SuperLink cannot hand out at the moment.

        Raises:
            httpx.HTTPError: if the SuperLink does not answer this run any more.
        """
        for identity in ids:
            new = identity not in self._going
            if new and self._fresh() >= MOST_PULLS:
                continue
            if new:
                self._start(identity)
            future = self._going[identity]
            wait((future,), PULL_S if new else 0.0)
            if not future.done():
                if new:
                    return
                continue
            self.forget((identity,))
            error = future.exception()
            if error is None:
                yield from future.result()
            elif passes(error):
                log.warning(
                    "the SuperLink could not hand a reply out, and is asked again: %s", error
                )
                return
            elif isinstance(error, Exception) and not isinstance(error, (httpx.HTTPError, OSError)):
                yield Unreadable(identity, f"expected a message, {type(error).__name__}: {error}")
            else:
                raise error

    def forget(self, ids: Iterable[str]) -> None:
        """Keep nothing of replies that come later: each may carry the whole network."""
        for identity in ids:
            self._going.pop(identity, None)
            self._since.pop(identity, None)

    def _fresh(self) -> int:
        """How many are being taken in that may still become whole."""
        return sum(time.monotonic() - since < STUCK_S for since in self._since.values())

    def _start(self, identity: str) -> None:
        self._since[identity] = time.monotonic()
        self._going[identity] = future = Future[list[Message]]()
        threading.Thread(target=self._work, args=(identity, future), daemon=True).start()

    def _work(self, identity: str, future: Future[list[Message]]) -> None:
        try:
            future.set_result(list(self.grid.pull_messages([identity])))
        except BaseException as error:  # noqa: BLE001 - handed on to whoever waits
            future.set_exception(error)


class DeadlineExecutor:
    """Calls what may wait for ever, and waits for it so long at most.

    Flower's Grid tries again without end when the SuperLink is gone. All calls are made by one
    thread, which ends with the process even if it is stuck.
    """

    def __init__(self, seconds: float, whom: str) -> None:
        self.seconds = seconds
        self.whom = whom
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, call: Callable[[], Result]) -> Result:
        """Make a call; again, where the answer is that there can be none at the moment.

        Raises:
            RunFailed: if it has not returned in time.
        """
        ends = time.monotonic() + self.seconds
        while True:
            try:
                return self._once(call, ends - time.monotonic())
            except httpx.HTTPStatusError as error:
                if not passes(error):
                    raise
                if time.monotonic() + AGAIN_S > ends:
                    raise RunFailed(
                        f"{self.whom} could not answer in {self.seconds:g} s: {error}"
                    ) from None
                log.warning("%s could not answer, and is asked again: %s", self.whom, error)
            time.sleep(AGAIN_S)

    def _once(self, call: Callable[[], Result], seconds: float) -> Result:
        future: Future[Result] = Future()

        def make() -> None:
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - handed on to whoever waits
                future.set_exception(error)

        self._calls.put(make)
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.done():
                raise  # the call's own
            raise RunFailed(f"{self.whom} did not answer in {self.seconds:g} s") from None

    def _work(self) -> None:
        while True:
            self._calls.get()()


def passes(error: BaseException) -> bool:
    """Whether a SuperLink's error may be over soon, as when its database is locked for long."""
    return isinstance(error, httpx.HTTPStatusError) and error.response.is_server_error


def sites_needed(min_sites: str, sites: int) -> int:
    """``all``, a number, or a percentage (rounded up) of the sites."""
    if min_sites == "all":
        return sites
    if min_sites.endswith("%"):
        return max(1, -(-sites * int(min_sites[:-1]) // 100))
    return int(min_sites)


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
