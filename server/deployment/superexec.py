"""Keep ``flower-superexec`` running, Flower's process that starts server apps.

The SuperLink starts this process once and does not restart it. The process ends at the first error
that it receives from the SuperLink (for example, while a reply of a gigabyte locks the database).
After that the SuperLink accepts runs but starts none of them.
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

REST_S = 1.0  # seconds before a restart; doubled as long as the process keeps ending
MAX_REST_S = 60.0  # maximum of these seconds


def supervise_superexec(control: int, authority: Path) -> None:
    """Start ``flower-superexec``, and restart it whenever it ends while this process lives.

    Args:
        control: control port of the SuperLink.
        authority: file with the authority's certificate.
    """
    command = [
        "flower-superexec",
        *("--runtime-api-address", f"127.0.0.1:{control}"),
        *("--root-certificates", str(authority)),
        *("--parent-pid", str(os.getpid())),
    ]
    threading.Thread(target=keep_running, args=(command,), daemon=True).start()


def keep_running(command: list[str]) -> NoReturn:
    """Run a program, and restart it whenever it ends.

    Ended processes stay in the process table as zombies. Flower's server apps end when the process
    that started them leaves the table, although their run could continue.
    """
    ended: list[subprocess.Popen[bytes]] = []  # without a reference, Popen would reap the zombies
    rest = REST_S
    while True:
        began = time.monotonic()
        try:
            process = subprocess.Popen(command, start_new_session=True)
        except OSError as error:  # for example, if there is not enough memory
            how = f"cannot be started: {error}"
        else:
            how = f"ended ({_end_of(process)})"
            ended.append(process)
        rest = min(2 * rest, MAX_REST_S) if time.monotonic() - began < MAX_REST_S else REST_S
        log.error("%s %s; no run can start until it is restarted, in %g s", command[0], how, rest)
        time.sleep(rest)


def _end_of(process: subprocess.Popen[bytes]) -> str:
    """Wait for a process to end, leave it in the process table, and return how it ended."""
    result = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert result is not None  # None is possible only with WNOHANG
    return f"{'status' if result.si_code == os.CLD_EXITED else 'signal'} {result.si_status}"
