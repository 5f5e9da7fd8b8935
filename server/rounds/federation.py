"""Manage the sites of a run over Flower's Grid: connect them, send requests, and collect outcomes.

Flower's own ``Strategy.start`` waits for missing sites without a time limit, ends the run when two
replies carry different metrics, and keeps no values per site. Polyclinic therefore sends the
requests itself and uses Flower as the message transport. Every wait in this module has a time
limit, including waits for the SuperLink.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.app import Message, RecordDict

from polyclinic.configs import wire
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.rounds import RoundsConfig
from polyclinic.server.rounds.errors import RunFailed, RunRefused
from polyclinic.server.rounds.grid import GridClient
from polyclinic.server.rounds.messages import (
    Declined,
    Late,
    Refusal,
    ReplyError,
    Unreachable,
    read_description,
)
from polyclinic.server.rounds.replies import (
    DeadlineExecutor,
    ReplyCollector,
    Unreadable,
    question_of,
)
from polyclinic.server.rounds.roster import SiteRoster, named
from polyclinic.server.runs.events import Notify
from polyclinic.server.runs.history import POOLED
from polyclinic.server.runs.reports import SiteReport

log = logging.getLogger(__name__)

POLL_S = 0.2  # seconds between two polls for replies
SETTLE_S = 1.0  # seconds without a new site after which all sites are considered connected
SUPERLINK_S = 300.0  # longest wait in seconds for the SuperLink, which may be restarting

Answer = TypeVar("Answer")


@dataclass
class Phase(Generic[Answer]):
    """One request to several sites and its outcome at each site, keyed by site name."""

    name: str
    asked: tuple[str, ...]  # sites that were sent the request
    answered: dict[str, Answer] = field(default_factory=dict)  # valid answers
    declined: dict[str, str] = field(default_factory=dict)  # the site's own rule that forbids it
    failed: dict[str, str] = field(default_factory=dict)  # the error at the site
    late: dict[str, str] = field(default_factory=dict)  # the deadline that the site missed
    refused: dict[str, str] = field(default_factory=dict)  # why the reply is invalid
    left_out: dict[str, str] = field(default_factory=dict)  # why the request was not sent

    @property
    def lost(self) -> dict[str, str]:
        """Return the reasons of the sites that were asked and gave no valid answer."""
        return self.failed | self.late | self.refused

    def refuse(self, site: str, reason: str) -> None:
        """Move an answer to the refused ones, after a comparison with the other sites' answers."""
        self.answered.pop(site, None)
        self.refused[site] = reason

    def outcomes(self) -> Iterator[tuple[str, Mapping[str, str]]]:
        """Iterate over all outcomes except answers, each with its reasons per site."""
        for outcome in ("declined", "failed", "late", "refused", "left_out"):
            yield outcome, getattr(self, outcome)


class Federation:
    """The sites that take part in a run, and the requests to them.

    Sites are identified by name, not by Flower's node id: a SuperNode that was restarted may
    reconnect under another id, and takes part again from the next phase.

    Args:
        grid: Flower's connection to the sites.
        rounds: time limits and the number of sites that are needed.
        data: settings that the sites' descriptions are checked against.
        greeting: creates the request that asks a site to describe itself.
        notify: receives the events of the run.
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
        self.closed = False  # True: sites that were absent at the start of the run cannot join
        self.nodes: dict[str, int] = {}  # site name: node id
        self._bounded = DeadlineExecutor(max(SUPERLINK_S, rounds.deadline_s), "the SuperLink")
        self._pulls = ReplyCollector(grid)
        self._registered: dict[int, str] = {}  # node id: registered name; empty in simulation
        self._greeted: dict[str, int] = {}  # message id: node id
        self._rejected: dict[int, int] = {}  # node id: the round in which it is greeted again

    def wait_for_sites(self, config: RunConfig) -> None:
        """Wait for sites, request their descriptions, and check that the settings fit their data.

        Raises:
            RunRefused: if too few sites connect in time or can take part (rounds.min-sites), or if
                no site has training images of some class.
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
                # After a restart Flower lists nodes as connected that have not reconnected yet.
                if len(self.reports) >= needed or time.monotonic() - began > (
                    self.rounds.wait_for_sites_s
                ):
                    break
                self._greet(0)
                if not self._greeted:
                    break  # all nodes have answered
            time.sleep(POLL_S)
        late = f"no answer in {self.rounds.deadline_s:g} s (rounds.deadline-s)"
        failed |= {f"node {node}": late for node in self._greeted.values()}
        for node in self.nodes.values():  # nodes that answered a later request
            failed.pop(f"node {node}", None)
        if len(self.reports) < needed:
            raise RunRefused(
                f"{len(self.reports)} of {len(nodes)} sites can take part, {needed} are needed "
                f"(rounds.min-sites): {'; '.join(dict.fromkeys(failed.values()))}"
            )
        found = {name: r.classes.get(wire.TRAIN_SPLIT) for name, r in self.reports.items()}
        if None not in found.values():  # sites that train privately do not report their counts
            counts = {name: n for name, n in found.items() if n is not None}
            check_classes(config.data.classes, counts)
        self.notify(
            {
                "event": "sites",
                "sites": {name: vars(report) for name, report in sorted(self.reports.items())},
                "failed": failed,
            }
        )

    def ask(  # noqa: PLR0913 settings of one call, each used by name
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
        """Send one request to several sites and read the replies as they arrive.

        The phase ends when every site has replied, or at the deadline (rounds.deadline-s).

        Args:
            number: the round.
            phase: name of the phase in events, log lines and the history.
            kind: Flower's message type.
            content: the request, the same for every site.
            sites: names of the sites to ask; those that are not connected are left out.
            read: converts a reply to an answer; a ``ReplyError`` that it raises is the outcome of
                that site and does not affect the others.
            needed: number of sites to wait for before the request is sent.
            suspended: sites that this phase leaves out, with the reasons.

        Raises:
            RunFailed: if the SuperLink does not answer.
        """
        connected = self._wait_for(number, sites, needed)
        asked = [site for site in sites if site in connected]
        found: Phase[Answer] = Phase(phase, tuple(asked), left_out=dict(suspended or {}))
        found.left_out |= {s: "not connected" for s in sites if s not in connected}
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
            over = time.monotonic() >= ends  # replies that arrived before the deadline count
            for reply in self._pull([*waiting, *self._greeted]):
                identity = question_of(reply)
                if identity in self._greeted:
                    self._introduce(number, [reply])
                elif identity in waiting:
                    site = waiting.pop(identity)
                    seen.add(identity)
                    if isinstance(reply, Unreadable):
                        found.refused[site] = reply.reason
                    else:
                        self._record(found, reply, site, read)
                    self.notify({"event": "answer", "round": number, "phase": phase, "site": site})
                else:
                    kind_of_reply = "a second" if identity in seen else "an unexpected"
                    log.warning("round %d, %s: dropped %s reply", number, phase, kind_of_reply)
            if waiting and not over:
                time.sleep(POLL_S)
        late = f"no answer in {self.rounds.deadline_s:g} s (rounds.deadline-s)"
        found.late |= dict.fromkeys(waiting.values(), late)
        self._pulls.forget(waiting)
        return found

    def finish_phase(self, number: int, phase: Phase[Answer], needed: int) -> None:
        """Record the outcomes of a phase in the roster and the log, and check the quorum.

        A site that declines counts towards rounds.min-sites, since it is connected and working.
        The round continues without it as long as at least one site answers.

        Raises:
            RunFailed: if fewer sites than needed answered or declined, or if no site answered.
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
                log.warning("%s is suspended until round %d", site, again)
                self.notify({"event": "suspended", "round": number, "site": site, "until": again})
        self.notify(
            {
                "event": "settled",
                "round": number,
                "phase": phase.name,
                "answered": sorted(phase.answered),
                **{outcome: dict(reasons) for outcome, reasons in phase.outcomes()},
            }
        )
        working = len(phase.answered) + len(phase.declined)
        if working < needed or not phase.answered:
            missing = phase.lost | phase.declined | phase.left_out
            declined = f" and {len(phase.declined)} declined" if phase.declined else ""
            raise RunFailed(
                f"round {number}, {phase.name}: {len(phase.answered)} of "
                f"{len(self.roster.standings)} sites answered{declined}, {needed} are needed "
                f"(rounds.min-sites): {named(missing)}"
            )

    def _record(
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
        """Return the connected nodes once there are enough and no more connect."""
        minimum = int(self.rounds.min_sites) if self.rounds.min_sites.isdigit() else 1
        started = last_change = time.monotonic()
        nodes: list[int] = []
        while True:
            before, nodes = nodes, self._connected()
            now = time.monotonic()
            if nodes != before:
                last_change = now
            if len(nodes) >= minimum and now - last_change >= SETTLE_S:
                return nodes
            if now - started > self.rounds.wait_for_sites_s:
                if len(nodes) >= minimum:
                    return nodes
                raise RunRefused(
                    f"{len(nodes)} sites are connected, {minimum} are needed (rounds.min-sites), "
                    f"after {self.rounds.wait_for_sites_s:g} s (rounds.wait-for-sites-s)"
                )
            time.sleep(POLL_S)

    def _wait_for(self, number: int, sites: Sequence[str], needed: int) -> set[str]:
        """Return the connected ones of the given sites, once there are enough or time is up."""
        ends = time.monotonic() + self.rounds.wait_for_sites_s
        while True:
            self._greet(number)
            if self._greeted:
                self._introduce(number, self._pull([*self._greeted]))
            nodes = set(self._connected())
            connected = {site for site in sites if self.nodes.get(site) in nodes}
            if len(connected) >= min(needed, len(sites)) or time.monotonic() > ends:
                return connected
            time.sleep(POLL_S)

    def _greet(self, number: int) -> None:
        """Ask unknown nodes to describe themselves, without waiting for their answers."""
        known = {*self.nodes.values(), *self._greeted.values()}
        for node in self._connected():
            if node in known or self._rejected.get(node, 0) > number:
                continue
            ttl = self.rounds.deadline_s
            message = Message(self.greeting(), node, wire.DESCRIBE, ttl=ttl, group_id=str(number))
            identity = self._push(message)
            if identity:
                self._greeted[identity] = node

    def _introduce(self, number: int, replies: Iterable[Message | Unreadable]) -> dict[str, str]:
        """Read descriptions and admit their sites; return the reasons of the rejected nodes."""
        failed: dict[str, str] = {}
        for reply in replies:
            node = self._greeted.pop(question_of(reply), None)
            if node is None:
                continue
            try:
                if isinstance(reply, Unreadable):
                    raise ReplyError(reply.reason)
                self._admit(number, node, read_description(reply, self.data))
            except (Late, Unreachable) as error:  # no answer: the node is asked again
                failed[f"node {node}"] = str(error)
            except ReplyError as error:
                self._rejected[node] = number + 1 + self.rounds.suspend_rounds
                failed[f"node {node}"] = str(error)
                log.warning("node %d does not take part: %s", node, error)
        return failed

    def _admit(self, number: int, node: int, report: SiteReport) -> None:
        """Assign a node to the site that it names in its description.

        Raises:
            ReplyError: if the node's key is registered for another site, if that site is already
                connected, or if no more sites can join the run.
        """
        name = report.name
        if name == POOLED:
            raise ReplyError(f"a site cannot be named {POOLED!r}, which stands for all sites")
        registered = self._registered.get(node)
        if registered and registered != name:
            raise ReplyError(
                f"its key is registered for site {registered!r}, but its site.yaml names "
                f"{name!r}; use the same name in both"
            )
        before = self.nodes.get(name)
        if before is not None and before in self._connected():
            raise ReplyError(
                f"site {name!r} is already connected as node {before}; stop one of the two, or "
                "give it another name"
            )
        # The roster of a resumed run may name sites that have not reported in this process.
        if name not in self.reports and self.closed:
            raise ReplyError(
                f"site {name!r} was not connected when the run started; with central differential "
                "privacy no site can join later, since the accounting fixes the number of sites"
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
        """Send one message and return its id, or None if the node is not connected.

        Messages are sent one at a time, since each may carry the whole network.
        """
        ids = list(self._bounded(lambda: self.grid.push_messages([message])))
        return ids[0] if ids else None

    def _pull(self, ids: Iterable[str]) -> Iterator[Message | Unreadable]:
        """Yield the replies that have arrived, one at a time to limit the memory in use."""
        return self._pulls.take(ids)


def sites_needed(min_sites: str, sites: int) -> int:
    """Convert ``rounds.min-sites`` to a number of sites.

    Args:
        min_sites: ``all``, a number, or a percentage of the sites, which is rounded up.
        sites: number of sites that take part in the run.
    """
    if min_sites == "all":
        return sites
    if min_sites.endswith("%"):
        return max(1, -(-sites * int(min_sites[:-1]) // 100))
    return int(min_sites)


def check_classes(classes: Sequence[str], counts: Mapping[str, Sequence[int]]) -> None:
    """Check that every class has training images at some site, unless no site has labels.

    Args:
        classes: names of the classes.
        counts: number of training images per class, keyed by site.

    Raises:
        RunRefused: if a class has no training images at any site.
    """
    totals = [sum(per_site) for per_site in zip(*counts.values(), strict=True)]
    for name, total in zip(classes, totals, strict=True):
        if total == 0 and any(totals):
            raise RunRefused(
                f"data.classes: no site has a training image of class {name!r}; "
                f"the sites are {', '.join(counts)}"
            )
