"""A program that trains privately, round after round, until it is killed.

It calls ``client.private_round.train_within_budget`` with a tiny network. It prints one line on
stdout before and after each step of a round, and the lines stay in the pipe after its death. Each
line begins with the name of the run:

    a pid 4711              process id of a forked site
    a ready 0               before the first round
    a reserving 1           round 1
    a reserved 1
    a step 1                before each training step
    a settling 1
    a settled 1
    a released 1            weights were sent, and a line in the file ``released`` is on the disk
    a refused 2             refused by the budget; the site ends
    a dead 9                signal that killed it; 0: exited by itself

Each line on stdin starts a site: ``{"state": folder, "run": "a", "cap": 9.0, "late": false}``.
``late`` uses a faulty ledger that records a round only after it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import polyclinic.client.private_round
from polyclinic.client.ledger.budget import LEDGER, Ledger, Reservation
from polyclinic.client.policy.site_policy import OPEN, Decline
from polyclinic.client.privacy.accounting import DpEvent
from polyclinic.client.private_round import train_within_budget
from polyclinic.client.site import PrivacyDeclaration
from polyclinic.client.training.local_round import Round
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.site import BudgetConfig
from tests.conftest import TINY
from tests.factories import small, some

STEPS = 2  # per round
PATIENTS, EXAMPLES = 6, 12
NOISE = 8.0
DELTA = 1e-11  # too small for PRV: the RDP bound takes milliseconds, PRV up to a second

CONFIG = RunConfig.from_flat(
    {
        **TINY,
        "privacy.mode": "dp-sgd",
        "privacy.noise-multiplier": NOISE,
        "privacy.delta": DELTA,
        "loss.class-weights": "none",
        "data.split": "independent",
        "train.local-steps": STEPS,
        "train.augment": False,
    }
)
MODEL = small(size=(32, 32), dfe="none", swin_depth=0)
TRAINING = some(EXAMPLES)

run_now, round_now = "", 0


def say(word: str, number: int) -> None:
    os.write(1, f"{run_now} {word} {number}\n".encode())


class ReportingLedger(Ledger):
    """A ledger that reports its operations."""

    def reserve(self, run: str, round: int, spent: DpEvent) -> Reservation:
        say("reserving", round)
        reservation = super().reserve(run, round, spent)
        say("reserved", round)
        return reservation

    def settle(self, reservation: Reservation, steps_taken: int) -> None:
        say("settling", reservation.round)
        super().settle(reservation, steps_taken)
        say("settled", reservation.round)


class LateLedger(ReportingLedger):
    """A faulty ledger that records a round only after it."""

    def reserve(self, run: str, round: int, spent: DpEvent) -> Reservation:
        return Reservation(0, run, round, spent)

    def settle(self, reservation: Reservation, steps_taken: int) -> None:
        super().settle(
            super().reserve(reservation.run, reservation.round, reservation.spent), STEPS
        )


def live(state: Path, run: str, cap: float, late: bool) -> None:
    """Train until killed or refused by the budget."""
    global round_now
    polyclinic.client.private_round.Ledger = LateLedger if late else ReportingLedger  # type: ignore[misc]
    budget = BudgetConfig(epsilon=cap, delta=DELTA, unit="patient")
    standing = PrivacyDeclaration(run, "north", EXAMPLES, PATIENTS, state / LEDGER, budget)
    say("ready", 0)
    while True:
        round_now += 1
        where = Round(round_now, 1000, 0, "north")
        try:
            train_within_budget(
                MODEL,
                TRAINING,
                where,
                standing,
                CONFIG,
                policy=OPEN,
                device=torch.device("cpu"),
            )
        except Decline:
            say("refused", round_now)
            return
        with (state / "released").open("a") as file:  # at this point the weights would be sent
            file.write(json.dumps({"run": run, "round": round_now, "steps": STEPS}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        say("released", round_now)


def tell_step(*_: Any) -> None:
    say("step", round_now)


def begin(state: str, run: str, cap: float, late: bool) -> None:
    """Run a site in a child process and report its process id and exit status."""
    global run_now
    run_now = run
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        say("pid", pid)
        say("dead", os.waitpid(pid, 0)[1])
        return
    try:
        live(Path(state), run, cap, late)
    except BaseException as error:
        sys.stderr.write(f"run {run}: {error!r}\n")
        os._exit(1)


def rehearse() -> None:
    """Train one round silently, so that torch's one-time setup happens before forking."""
    with tempfile.TemporaryDirectory() as folder:
        budget = BudgetConfig(epsilon=100.0, delta=DELTA, unit="patient")
        standing = PrivacyDeclaration(
            "rehearsal", "north", EXAMPLES, PATIENTS, Path(folder) / LEDGER, budget
        )
        train_within_budget(
            MODEL,
            TRAINING,
            Round(1, 1000, 0, "north"),
            standing,
            CONFIG,
            policy=OPEN,
            device=torch.device("cpu"),
        )


def main() -> None:
    torch.set_num_threads(1)  # other threads would not survive the fork
    rehearse()
    register_optimizer_step_pre_hook(tell_step)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while line := sys.stdin.readline():
        if not os.fork():
            begin(**json.loads(line))
            os._exit(0)


if __name__ == "__main__":
    main()
