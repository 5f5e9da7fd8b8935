"""Flower's process that starts server apps (``flower-superexec``), started again whenever it ends.

A SuperLink starts it once and does not look after it: it ends with the first error that the
SuperLink answers it with, as when a reply of a gigabyte locks the database, and from then on the
SuperLink takes runs and starts none.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import NoReturn

log = logging.getLogger("flwr.polyclinic")

REST_S = 1.0  # after its end; doubled while it goes on ending
MOST_REST_S = 60.0


def supervise_superexec(control: int, authority: Path) -> None:
    """Start it now, and again for as long as this process is there, which it does not outlive."""
    command = [
        "flower-superexec",
        *("--runtime-api-address", f"127.0.0.1:{control}"),
        *("--root-certificates", str(authority)),
        *("--parent-pid", str(os.getpid())),
    ]
    threading.Thread(target=keep_running, args=(command,), daemon=True).start()


def keep_running(command: list[str]) -> NoReturn:
    """Run a program for ever.

    One that has ended stays in the table of processes: Flower's server apps end when the process
    that started them is gone from there, and the run that they serve need not.
    """
    ended: list[subprocess.Popen[bytes]] = []  # one that nobody holds would leave the table
    rest = REST_S
    while True:
        began = time.monotonic()
        try:
            process = subprocess.Popen(command, start_new_session=True)
        except OSError as error:  # as where memory for a process is wanting
            how = f"cannot be started: {error}"
        else:
            how = f"ended ({_end_of(process)})"
            ended.append(process)
        rest = min(2 * rest, MOST_REST_S) if time.monotonic() - began < MOST_REST_S else REST_S
        log.error("%s %s; no run begins until it is there again, in %g s", command[0], how, rest)
        time.sleep(rest)


def _end_of(process: subprocess.Popen[bytes]) -> str:
    """Wait for a process to end, and leave it in the table; how it ended."""
    result = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert result is not None  # it is without WNOHANG
    return f"{'status' if result.si_code == os.CLD_EXITED else 'signal'} {result.si_status}"
