"""Real processes that train privately and are killed, or compete for a remaining budget."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from polyclinic.client.ledger.budget import LEDGER, read_accounts, verify_ledger
from polyclinic.client.privacy.accounting import DpEvent, epsilon
from tests import ROOT
from tests.mortal_site import DELTA, EXAMPLES, NOISE, STEPS

KILLS = 50
COST = DpEvent(NOISE, 4 / EXAMPLES, STEPS)  # cost of one round with batches of 4


@dataclass
class Life:
    """The output of one site process, from its first to its last line."""

    run: str
    pid: int = 0
    said: list[tuple[str, int]] = field(default_factory=list)
    died_of: int | None = None  # the signal that ended it; 0: exited by itself

    def begun(self) -> Counter[int]:
        """Count the steps that were run or about to run, by round."""
        return Counter(round for word, round in self.said if word == "step")


class Hospital:
    """Starts site processes and reads their output."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.mortal_site"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lives: dict[str, Life] = {}

    def begin(self, state: Path, run: str, cap: float = 100.0, late: bool = False) -> Life:
        assert self.process.stdin is not None
        given = {"state": str(state), "run": run, "cap": cap, "late": late}
        self.lives[run] = Life(run)
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        return self.lives[run]

    def listen(self) -> None:
        """Read one more line, from any site."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the program that forks the sites has ended"
        run, word, number = line.split()
        life = self.lives[run]
        if word == "pid":
            life.pid = int(number)
        elif word == "dead":
            life.died_of = int(number)
        else:
            life.said.append((word, int(number)))

    def wait_for(self, life: Life, word: str, round: int) -> None:
        while not life.pid or (word, round) not in life.said:
            assert life.died_of is None, f"{life} ended before {word} {round}"
            self.listen()

    def bury(self, life: Life) -> Life:
        while life.died_of is None:
            self.listen()
        return life

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def hospital() -> Iterator[Hospital]:
    opened = Hospital()
    yield opened
    opened.close()


def killed(
    hospital: Hospital, state: Path, run: str, after: tuple[str, int], delay: float, **given: Any
) -> Life:
    """Start a site and kill it some seconds after it has reported an event."""
    life = hospital.begin(state, run, **given)
    hospital.wait_for(life, *after)
    time.sleep(delay)
    os.kill(life.pid, signal.SIGKILL)
    assert hospital.bury(life).died_of == signal.SIGKILL
    return life


def check(state: Path, lives: list[Life]) -> None:
    """Check that the ledger is intact and covers all that the sites may have released."""
    verify_ledger(state / LEDGER)
    account = read_accounts(state / LEDGER).get("north")
    rows = {} if account is None else {(row.run, row.round): row for row in account.rounds}
    steps = 0
    for life in lives:
        for round, begun in life.begun().items():
            row = rows.get((life.run, round))
            assert row is not None, f"run {life.run}, round {round}: {begun} steps, not reserved"
            assert row.spent.steps >= begun
            steps += begun
    if (state / "released").exists():
        for line in (state / "released").read_text().splitlines():
            left = json.loads(line)
            row = rows[left["run"], left["round"]]
            assert row.taken is not None
            assert row.taken == left["steps"]
    if account is not None:
        assert account.spent() >= epsilon([replace(COST, steps=steps)], DELTA)


COMMITS = [("reserving", 1), ("settling", 1)]
MOMENTS = [
    ("ready", 0),
    *((word, 1) for word in ("reserved", "step", "settled", "released")),
    *((word, 2) for word in ("reserving", "reserved", "step")),
]


def moments(chance: random.Random) -> Iterator[tuple[tuple[str, int], float]]:
    """Yield the event after which a site is killed, and the delay in seconds."""
    for number in range(KILLS):
        if number % 5 < 2:  # a commit lasts a few milliseconds, which random times rarely hit
            yield COMMITS[number % 5], chance.uniform(0, 0.003)
        else:
            yield chance.choice(MOMENTS), 10 ** chance.uniform(-4, -1)


@pytest.mark.slow
def test_killed_site_has_recorded_all_it_released(hospital: Hospital, tmp_path: Path) -> None:
    """One ledger through fifty kills; it is checked after each one."""
    lives: list[Life] = []
    for number, (after, delay) in enumerate(moments(random.Random(20))):
        lives.append(killed(hospital, tmp_path, f"run-{number}", after, delay))
        check(tmp_path, lives)
    ends = Counter(life.said[-1][0] for life in lives)
    # kills before, during and after both commits; their numbers are random
    assert ends["ready"] + ends["released"] > 0, ends
    assert ends["reserved"] + ends["step"] > 0, ends
    assert ends["reserving"] > 0, ends
    assert ends["settling"] > 0, ends
    rows = read_accounts(tmp_path / LEDGER)["north"].rounds
    assert {row.taken for row in rows} == {STEPS, None}
    assert len(rows) > KILLS / 2


def test_check_detects_a_ledger_written_after_the_round(hospital: Hospital, tmp_path: Path) -> None:
    """Negative control: the same kill and the same check."""
    for late in (False, True):
        state = tmp_path / str(late)
        life = killed(hospital, state, f"late-{late}", ("step", 1), 0.0, late=late)
        if late:
            with pytest.raises(AssertionError, match=r"run late-True, round 1: \d steps, not"):
                check(state, [life])
        else:
            check(state, [life])


def test_repeatedly_killed_site_exhausts_its_budget(hospital: Hospital, tmp_path: Path) -> None:
    """Being killed before the end of a round does not restore any budget."""
    cap = epsilon([replace(COST, steps=3 * STEPS)], DELTA) * 1.0001
    for number in range(3):
        killed(hospital, tmp_path, f"dying-{number}", ("reserved", 1), 0.0, cap=cap)
    life = hospital.bury(hospital.begin(tmp_path, "last", cap))
    assert life.said == [("ready", 0), ("reserving", 1), ("refused", 1)]
    (account,) = read_accounts(tmp_path / LEDGER).values()
    assert [row.taken for row in account.rounds] == [None] * 3


def test_concurrent_processes_do_not_overspend_a_budget(hospital: Hospital, tmp_path: Path) -> None:
    """Three processes of one cohort share a budget of ten rounds: exactly ten are trained."""
    cap = epsilon([replace(COST, steps=10 * STEPS)], DELTA) * 1.0001
    lives = [hospital.begin(tmp_path, f"racing-{k}", cap) for k in range(3)]
    for life in lives:
        assert hospital.bury(life).died_of == 0
    check(tmp_path, lives)
    ends = [life.said[-1][0] for life in lives]
    assert ends == ["refused"] * 3
    assert sum(word == "released" for life in lives for word, _ in life.said) == 10
    assert sum(sum(life.begun().values()) for life in lives) == 10 * STEPS
