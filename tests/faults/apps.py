"""The apps of a release with injected faults, started by tests/deployment/test_faults.py.

This file replaces the project's apps.py in a copy of the project; everything else is as shipped.
A fault is a file in the folder named by POLYCLINIC_FAULTS. Its name is a point in a round
(``site-2.train.3.reply``) and its content is the action to take there (``nan``), once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from flwr.app import Array, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import polyclinic.server.rounds.loop as rounds
from polyclinic.client.app import Simulated, client_app
from polyclinic.configs import wire
from polyclinic.server.aggregation.averaging import Combination
from polyclinic.server.app import server_app
from polyclinic.server.rounds.loop import Rounds
from polyclinic.simulation.local.sites import ledger_folder, memory_folder, phantom_root

FAULTS = Path(os.environ["POLYCLINIC_FAULTS"])
WAIT_S = 250.0  # how long a process waits for the test's permission to continue


def reached(point: str) -> str:
    """Record that a process has reached a point; run the action ordered there and return it."""
    (FAULTS / f"{point}.reached").write_text(str(os.getpid()))
    order = FAULTS / point
    if not order.exists():
        return ""
    action = order.read_text().strip()
    order.rename(FAULTS / f"{point}.done")
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action.startswith("sleep:"):
        time.sleep(float(action.removeprefix("sleep:")))
    elif action == "wait":
        ends = time.monotonic() + WAIT_S
        while not (FAULTS / f"{point}.go").exists() and time.monotonic() < ends:
            time.sleep(0.1)
    elif action == "kill-node":
        for process in psutil.Process().parents():
            if any(Path(word).name == "flower-supernode" for word in process.cmdline()[:2]):
                process.kill()
        os.kill(os.getpid(), signal.SIGKILL)
    return action


def spoiled(reply: Message, action: str) -> Message:
    """Modify a reply as a broken site might."""
    record = reply.content.array_records.get(wire.WEIGHTS)
    sums = reply.content.metric_records[wire.SUMS]
    if action == "nan":
        if record is not None:
            key = next(iter(record))
            record[key] = Array(np.full_like(record[key].numpy(), np.nan))
        for key in [k for k in sums if isinstance(sums[k], list)]:
            sums[key] = [float("nan")] * len(sums[key])  # type: ignore[arg-type]
    elif action == "shapes":
        if record is not None:
            key = next(iter(record))
            record[key] = Array(np.zeros(7, np.float32))
        for key in [k for k in sums if isinstance(sums[k], list)]:
            sums[key] = [1.0]
    elif action == "garbage":
        reply.content = RecordDict(
            {"noise": ConfigRecord({"bytes": os.urandom(1000)}), "m": MetricRecord({"x": 1})}
        )
    elif action.startswith("huge:"):
        megabytes = int(action.removeprefix("huge:"))
        reply.content["ballast"] = ConfigRecord({"bytes": bytes(megabytes << 20)})
        if record is not None:
            record["ballast"] = Array(np.zeros(megabytes << 18, np.float32))
    return reply


class FaultyClientApp(ClientApp):
    """Our client app with a fault point before and after each message."""

    def __call__(self, message: Message, context: Context) -> Message:
        file = Path(str(context.node_config["site-config"]))
        site = file.parent.name if file.stem == "site" else file.stem  # site.yaml or NAME.yaml
        asked = message.content.config_records[wire.ROUND]
        point = f"{site}.{message.metadata.message_type.split('.')[0]}.{asked[wire.NUMBER]}"
        if wire.SPLIT in asked and asked[wire.SPLIT] == wire.TEST_SPLIT:
            point = f"{site}.test.{asked[wire.NUMBER]}"
        reached(f"{point}.received")
        reply = super().__call__(message, context)
        action = reached(f"{point}.reply")
        return spoiled(reply, action) if action else reply


def pausing(point: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a server function with a fault point before it."""

    def called(*args: Any, **kwargs: Any) -> Any:
        reached(f"server.{point}.{current[0]}")
        return call(*args, **kwargs)

    return called


current = [0]
_one_round = Rounds.one_round


def one_round(self: Rounds, number: int) -> None:
    current[0] = number
    reached(f"server.waiting.{number}")
    _one_round(self, number)


Rounds.one_round = one_round  # type: ignore[method-assign]
_combination_of = rounds.combination_of


def combination_of(*args: Any) -> Combination:
    reached(f"server.sending.{current[0]}")
    made = _combination_of(*args)
    made.combined = pausing("aggregating", made.combined)  # type: ignore[method-assign]
    return made


rounds.combination_of = combination_of
rounds.save_round = pausing("saving", rounds.save_round)

server = server_app()
client = client_app(Simulated(phantom_root, ledger_folder, memory_folder))
client.__class__ = FaultyClientApp
