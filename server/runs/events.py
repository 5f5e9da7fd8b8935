"""Whoever wants to know how a run goes: its progress file, and a command of the coordinator's."""

from __future__ import annotations

import json
import logging
import queue
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from polyclinic.server.runs.folder import RunFolder, append_line

log = logging.getLogger(__name__)

Notify = Callable[[Mapping[str, object]], None]

COMMAND_S = 30.0  # that a command may take for one event
FAREWELL_S = 60.0  # that a run's end waits for the events that its command has not yet had


class Events:
    """Writes a run's events, with the time, to its progress file, and hands each to a command.

    The command (``rounds.on-event``) is started once for each event, with the event as one line of
    JSON on its standard input, without a shell, one after the other and beside the run: a slow one
    delays no round, and one that fails is told in the log and ends nothing.

    Args:
        command: program and arguments; empty for none.
    """

    def __init__(self, folder: RunFolder, command: str = "") -> None:
        self.folder = folder
        self.command = shlex.split(command)
        self._waiting: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        if self.command:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.command:
            self._waiting.put(None)
            self._thread.join(FAREWELL_S)

    def notify(self, event: Mapping[str, object]) -> None:
        timed = {"time": time.time(), **event}
        append_line(self.folder.progress, timed)
        if self.command:
            self._waiting.put(json.dumps({"run": self.folder.name, **timed}))

    def _work(self) -> None:
        while (line := self._waiting.get()) is not None:
            _tell(self.command, line)


def _tell(command: Sequence[str], line: str) -> None:
    try:
        done = subprocess.run(
            command,
            input=f"{line}\n",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("rounds.on-event: %s", error)
        return
    if done.returncode:
        log.warning(
            "rounds.on-event: %s ended with status %d: %s",
            *(command[0], done.returncode, done.stderr.strip()[-500:]),
        )
