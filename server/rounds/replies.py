"""Collect replies from Flower's Grid and call the SuperLink, both with time limits.

Flower's own calls can block without end: ``pull_messages`` waits for the missing parts of an
incomplete reply, and every call is retried while the SuperLink is gone.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TypeVar

import httpx
from flwr.app import Message

from polyclinic.server.rounds.errors import RunFailed
from polyclinic.server.rounds.grid import GridClient

log = logging.getLogger(__name__)

PULL_S = 5.0  # seconds to wait for one pull to complete before the poll ends
STUCK_S = 60.0  # seconds after which an incomplete pull is considered stuck
MAX_PULLS = 3  # concurrent pulls, not counting stuck ones: each may hold a whole network
AGAIN_S = 2.0  # seconds before a failed SuperLink call is repeated

Result = TypeVar("Result")


@dataclass(frozen=True)
class Unreadable:
    """A reply that Flower could not convert to a message."""

    question: str  # id of the request that it answers
    reason: str


def question_of(reply: Message | Unreadable) -> str:
    """Return the id of the request that a reply answers."""
    if isinstance(reply, Unreadable):
        return reply.question
    return str(reply.metadata.reply_to_message_id)


class ReplyCollector:
    """Pull replies in threads, so that an incomplete reply does not block the others.

    If a site disconnects while it sends, Flower holds an incomplete reply and ``pull_messages``
    waits for the missing parts, possibly for hours. Each pull therefore runs in a daemon thread of
    its own. Few pulls run at a time, so that a slow machine does not hold the networks of all
    sites in memory at once.

    Args:
        grid: Flower's connection to the sites.
    """

    def __init__(self, grid: GridClient) -> None:
        self.grid = grid
        self._pending: dict[str, Future[list[Message]]] = {}
        self._since: dict[str, float] = {}

    def take(self, ids: Iterable[str]) -> Iterator[Message | Unreadable]:
        """Yield the replies that have arrived to the given messages.

        A pull that is not complete within ``PULL_S`` ends this poll, and so does one that the
        SuperLink cannot serve at the moment; the remaining messages are polled next time. The
        duration of a poll therefore does not grow with the number of missing replies.

        Args:
            ids: ids of the messages that were sent.

        Raises:
            httpx.HTTPError: if the SuperLink no longer accepts requests of this run.
        """
        for identity in ids:
            new = identity not in self._pending
            if new and self._fresh() >= MAX_PULLS:
                continue
            if new:
                self._start(identity)
            future = self._pending[identity]
            wait((future,), PULL_S if new else 0.0)
            if not future.done():
                if new:
                    return
                continue
            self.forget((identity,))
            error = future.exception()
            if error is None:
                yield from future.result()
            elif is_temporary(error):
                log.warning("the SuperLink could not deliver a reply; retrying: %s", error)
                return
            elif isinstance(error, Exception) and not isinstance(error, (httpx.HTTPError, OSError)):
                yield Unreadable(identity, f"expected a message, {type(error).__name__}: {error}")
            else:
                raise error

    def forget(self, ids: Iterable[str]) -> None:
        """Discard replies that arrive later, since each may carry the whole network."""
        for identity in ids:
            self._pending.pop(identity, None)
            self._since.pop(identity, None)

    def _fresh(self) -> int:
        """Count the pulls in progress that are not stuck."""
        return sum(time.monotonic() - since < STUCK_S for since in self._since.values())

    def _start(self, identity: str) -> None:
        self._since[identity] = time.monotonic()
        self._pending[identity] = future = Future[list[Message]]()
        threading.Thread(target=self._work, args=(identity, future), daemon=True).start()

    def _work(self, identity: str, future: Future[list[Message]]) -> None:
        try:
            future.set_result(list(self.grid.pull_messages([identity])))
        except BaseException as error:  # noqa: BLE001 - raised again in the waiting thread
            future.set_exception(error)


class DeadlineExecutor:
    """Run calls that may block forever, with a time limit.

    Flower's Grid retries without end when the SuperLink is gone. All calls run in one daemon
    thread, which does not keep the process alive even if a call is stuck.

    Args:
        seconds: time limit of one call, including its retries.
        target: name of the called service in error messages.
    """

    def __init__(self, seconds: float, target: str) -> None:
        self.seconds = seconds
        self.target = target
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, call: Callable[[], Result]) -> Result:
        """Run a call and return its result; retry after a temporary server error.

        Raises:
            RunFailed: if the call did not succeed within the time limit.
            httpx.HTTPStatusError: if the error is not temporary.
        """
        ends = time.monotonic() + self.seconds
        while True:
            try:
                return self._once(call, ends - time.monotonic())
            except httpx.HTTPStatusError as error:
                if not is_temporary(error):
                    raise
                if time.monotonic() + AGAIN_S > ends:
                    raise RunFailed(
                        f"{self.target} could not answer in {self.seconds:g} s: {error}"
                    ) from None
                log.warning("%s could not answer; retrying: %s", self.target, error)
            time.sleep(AGAIN_S)

    def _once(self, call: Callable[[], Result], seconds: float) -> Result:
        future: Future[Result] = Future()

        def make() -> None:
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised again in the waiting thread
                future.set_exception(error)

        self._calls.put(make)
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.done():
                raise  # the call itself raised TimeoutError
            raise RunFailed(f"{self.target} did not answer in {self.seconds:g} s") from None

    def _work(self) -> None:
        while True:
            self._calls.get()()


def is_temporary(error: BaseException) -> bool:
    """Return whether an error of the SuperLink may pass, for example a locked database."""
    return isinstance(error, httpx.HTTPStatusError) and error.response.is_server_error
