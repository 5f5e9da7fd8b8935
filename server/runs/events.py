"""Report a run's events to its progress file and to a command that the coordinator configured."""

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

from polyclinic.configs.files import append_line
from polyclinic.server.runs.folder import RunFolder

log = logging.getLogger(__name__)

Notify = Callable[[Mapping[str, object]], None]

COMMAND_S = 30.0  # time limit in seconds of one execution of the command
FAREWELL_S = 60.0  # longest wait in seconds, at the end of a run, for events not yet passed on


class Events:
    """The events of a run, written with their time to its progress file and passed to a command.

    The command (``rounds.on-event``) is executed once per event, without a shell, with the event
    as one line of JSON on its standard input. The executions are sequential and run in a thread: a
    slow command does not delay the rounds, and a failing command is logged and does not end the
    run.

    Args:
        folder: the run's folder.
        command: program and arguments; empty for no command.
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
        """Write an event to the progress file and pass it to the command."""
        timed = {"time": time.time(), **event}
        append_line(self.folder.progress, timed)
        if self.command:
            self._waiting.put(json.dumps({"run": self.folder.name, **timed}))

    def _work(self) -> None:
        while (line := self._waiting.get()) is not None:
            _execute(self.command, line)


def _execute(command: Sequence[str], line: str) -> None:
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
            "rounds.on-event: %s exited with status %d: %s",
            *(command[0], done.returncode, done.stderr.strip()[-500:]),
        )
