"""Fault injection in a deployment: real processes over TLS, with authentication.

Each test breaks something at a point of a round and checks that the fault is reported and that the
run continues or can be resumed without losing more than the current round. The table of all faults
is printed at the end and written to the file named by POLYCLINIC_FAULT_TABLE;
docs/benchmarks/reliability.md shows it. CI runs one test with ten faults;
`make faults` runs them all.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import pytest

from polyclinic.server.runs.folder import RunFolder
from polyclinic.server.runs.history import Line, read_history
from tests import ROOT
from tests.consortium import Consortium
from tests.faults.deployment import Deployment, deployment, events

pytestmark = pytest.mark.timeout(1500)

DEADLINE_S = 60.0  # a phase without faults takes 15 s
BUSY_DEADLINE_S = 120.0  # a phase takes a minute or more next to other tests
SLACK_S = 60.0  # on top of deadlines: starting processes on a busy machine

# Points of a round at which a fault happens; the process named there waits for the test.
POINTS = {
    "waiting": "server.waiting.{}",
    "sending train": "server.sending.{}",
    "training": "site-1.train.{}.received",
    "replying": "site-1.train.{}.reply",
    "aggregating": "server.aggregating.{}",
    "checkpointing": "server.saving.{}",
    "evaluating": "site-1.evaluate.{}.received",
}


@dataclass(frozen=True)
class Row:
    """One fault and its consequences."""

    fault: str
    phase: str
    detected: str
    recovered: str
    lost: str
    seconds: str  # from the fault to the next saved round


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    heads = [field.name for field in fields(Row)]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    lines += [" | ".join(astuple(row)) for row in rows]
    text = "".join(f"| {line} |\n" for line in lines)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{text}")
    if file := os.environ.get("POLYCLINIC_FAULT_TABLE"):
        Path(file).write_text(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("deployment")) as made:
        yield made


@pytest.fixture
def there(place: Deployment) -> Deployment:
    """Restore a deployment in which all sites run and no fault is pending."""
    for file in place.faults.iterdir():
        file.unlink()
    if place.superlink is not None and place.superlink.is_running() and not place.starters():
        place.kill(place.superlink)  # unlike polyclinic server start, Flower does not replace it
    if place.superlink is None or not place.superlink.is_running():
        place.start_superlink()
    for name in place.names:
        place.start_wire(name).cut = False
        if not place.nodes[name].is_running():
            place.start_site(name)
    return place


def submit(place: Deployment, name: str, **changes: bool | float | str) -> RunFolder:
    settings = {"rounds__count": 2, "rounds__deadline_s": DEADLINE_S, "rounds__min_sites": "1"}
    return place.submit(name, **(settings | changes))


def line(folder: RunFolder, site: str, number: int) -> Line:
    (found,) = (
        x
        for x in read_history(folder.history)
        if (x.site, x.round, x.split) == (site, number, "val")
    )
    return found


def settled(folder: RunFolder, number: int, phase: str) -> dict:
    found = [e for e in events(folder) if e["event"] == "settled"]
    return next(e for e in found if (e["round"], e["phase"]) == (number, phase))


def seconds_to_next_round(folder: RunFolder, since: float) -> str:
    rounds = [e["time"] for e in events(folder) if e["event"] == "round" and e["time"] > since]
    return f"{rounds[0] - since:.0f}" if rounds else "-"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def completed(folder: RunFolder, rounds: int) -> None:
    outcome = folder.read_outcome()
    assert outcome["status"] == "completed", outcome
    assert outcome["rounds"] == rounds
    numbers = {x.round for x in read_history(folder.history) if x.split == "val"}
    assert numbers == set(range(1, rounds + 1))


def no_longer_than(deadlines: int, since: float) -> None:
    """Check that a fault did not delay the run past its deadlines."""
    assert time.time() - since < deadlines * DEADLINE_S + SLACK_S


@pytest.mark.slow
def test_run_with_many_faults_completes(there: Deployment, table: list[Row]) -> None:
    """Several faults per round at different sites are reported, and none ends the run.

    All affected sites take part again.
    """
    late = f"sleep:{BUSY_DEADLINE_S + 8}"
    faults = [
        ("site-1", 1, "train", "nan", "refused", "expected finite values"),
        ("site-2", 1, "train", "shapes", "refused", r"got shape \(7,\)"),
        ("site-3", 1, "evaluate", "garbage", "refused", "expected records"),
        ("site-1", 1, "evaluate", "shapes", "refused", "evaluation: "),
        ("site-1", 2, "train", "kill", "gone", "failed: ClientApp stopped responding"),
        (
            "site-3",
            2,
            "train",
            "kill-node",
            "gone",
            "failed: the SuperLink has had no contact with its node",
        ),
        ("site-2", 2, "evaluate", "nan", "refused", "evaluation: "),
        ("site-2", 3, "train", late, "late", NO_ANSWER),
        ("site-1", 4, "train", "huge:30", "refused", "expected only"),
    ]
    for site, number, phase, action, _, _ in faults:
        before = action.startswith(("kill", "sleep"))
        there.fault(f"{site}.{phase}.{number}.{'received' if before else 'reply'}", action)
    second = there.start_second("site-1")
    busy = {"rounds__deadline_s": BUSY_DEADLINE_S}
    folder = submit(there, "many", rounds__count=4, rounds__suspend_after=0, **busy)
    there.outcome(folder, 10 * BUSY_DEADLINE_S)
    there.kill(second)
    completed(folder, 4)
    for site, number, phase, action, outcome, said in faults:
        found = line(folder, site, number)
        if outcome == "gone":  # Flower reports it after a minute, if at all
            outcome, said = ("failed", said) if phase in found.failed else ("late", NO_ANSWER)
        reason = getattr(found, outcome)[phase].replace("\n", " ")
        assert re.search(said, reason)
        name = NAMES.get(action.partition(":")[0], f"a reply with {action}")
        waited = f"{_waited(folder, number, phase):.0f}"
        table.append(Row(name, phase, reason[:80], "at once", "its answers", waited))
    trained = {(x.site, x.round) for x in _of(folder) if x.train is not None}
    assert {("site-1", 3), ("site-2", 4), ("site-3", 4)} <= trained
    lost = {(x.site, x.round, phase) for x in _of(folder) for phase in x.lost}
    hurt = {(site, number, phase) for site, number, phase, *_ in faults}
    assert hurt <= lost
    # a SuperNode returns only after the SuperLink has missed its heartbeats
    assert {(site, number) for site, number, _ in lost - hurt} <= {("site-3", 2), ("site-3", 3)}
    said = there.log("site-1-again").strip().splitlines()[-1]
    table.append(Row("the same site connects twice", "all", said[:80], "at once", "nothing", "0"))


# whichever ends first: our deadline or Flower's
NO_ANSWER = r"no answer in \d+ s|the request expired at the SuperLink before an answer came"
NAMES = {
    "kill": "kill -9 a site's app",
    "kill-node": "kill -9 a SuperNode, restart",
    "sleep": "a site slower than the deadline",
    "huge": "a reply far too large",
}


def _of(folder: RunFolder) -> list[Line]:
    return [x for x in read_history(folder.history) if x.split == "val"]


def _waited(folder: RunFolder, number: int, phase: str) -> float:
    name = "evaluate on val" if phase == "evaluate" else phase
    began = next(
        e["time"]
        for e in events(folder)
        if e["event"] == "phase" and (e["round"], e["phase"]) == (number, name)
    )
    return settled(folder, number, name)["time"] - began


def rounds_of(phases: list[str]) -> list[tuple[int, str]]:
    """Assign one fault to each round, from the second on."""
    return list(enumerate(phases, 2))


def killed(
    place: Deployment, table: list[Row], fault: str, phases: list[str], kill: Callable[[], None]
) -> None:
    """Kill the coordinator's side of one run in each round, in a new phase, and resume it."""
    faults = rounds_of(phases)
    for number, phase in faults:
        place.fault(POINTS[phase].format(number), "wait")
    last = faults[-1][0]
    name = re.sub("[^a-z]+", "-", f"{fault} {phases[0]}".lower())
    folder = submit(place, name, rounds__count=last, rounds__keep_checkpoints=last)
    for number, phase in faults:
        point = POINTS[phase].format(number)
        place.reached(point)
        saved = {n: digest(folder.checkpoint(n)) for n in range(1, number)}
        since = time.time()
        kill()
        place.go(point)
        place.resume(folder)
        place.wait_for(lambda n=number: n in folder.checkpoints(), 5 * DEADLINE_S, "it goes on")
        assert {n: digest(folder.checkpoint(n)) for n in saved} == saved
        took = seconds_to_next_round(folder, since)
        table.append(Row(fault, phase, "it is gone", "resumed", f"round {number}", took))
    place.outcome(folder)
    completed(folder, last)
    resumed = [e["round"] for e in events(folder) if e["event"] == "resumed"]
    assert resumed == [number - 1 for number, _ in faults]


@pytest.mark.long  # in CI, tests/end_to_end/test_simulate.py kills one
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("phases", ["checkpointing", "all others"])
def test_killed_server_app_is_resumed(there: Deployment, table: list[Row], phases: str) -> None:
    def kill() -> None:
        there.kill(there.server_app())

    chosen = [p for p in POINTS if (p == "checkpointing") == (phases == "checkpointing")]
    killed(there, table, "kill -9 the ServerApp", chosen, kill)


@pytest.mark.long
def test_flower_reports_a_killed_server_app_as_failed(there: Deployment, table: list[Row]) -> None:
    point = "server.waiting.2"
    there.fault(point, "wait")
    folder = submit(there, "noticed")
    there.reached(point)
    since = time.time()
    there.kill(there.server_app())
    there.wait_for(there.finished, 4 * SLACK_S, "Flower says that the run has ended")
    assert not folder.outcome.exists()
    took = f"{time.time() - since:.0f}"
    said = "flwr ls: finished:failed"
    table.append(Row("kill -9 the ServerApp, nobody resumes", "waiting", said, "-", "-", took))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("phases", ["training", "all others"])
def test_killed_superlink_is_resumed(there: Deployment, table: list[Row], phases: str) -> None:
    def kill() -> None:
        assert there.superlink is not None
        there.kill(there.superlink)
        there.start_superlink()

    chosen = [p for p in POINTS if (p == "training") == (phases == "training")]
    killed(there, table, "kill -9 the SuperLink, restart", chosen, kill)


def hurt_site(
    place: Deployment,
    table: list[Row],
    name: str,
    fault: str,
    hurt: Callable[[], None],
    heal: Callable[[], None],
    back: Callable[[], bool] | None = None,
) -> None:
    """Disturb the first site of one run in every third round, in another phase each.

    Args:
        back: whether the site is connected again; the second round after a fault waits for it.
            Without it, the site must be back by then.
    """
    faults = [(2 + 3 * i, phase) for i, phase in enumerate(POINTS)]
    for number, phase in faults:
        place.fault(POINTS[phase].format(number), "wait")
        if back is not None:
            place.fault(POINTS["waiting"].format(number + 2), "wait")
    last = faults[-1][0] + 2
    folder = submit(place, name, rounds__count=last, rounds__suspend_after=0)
    for number, phase in faults:
        point = POINTS[phase].format(number)
        place.reached(point, 8 * DEADLINE_S)
        since = time.time()
        hurt()
        place.go(point)
        heal()
        place.wait_for(
            lambda n=number: n + 1 in folder.checkpoints(), 6 * DEADLINE_S, "two rounds are saved"
        )
        no_longer_than(5, since)
        reasons: dict[str, str] = {}
        for n in (number, number + 1):
            found = line(folder, "site-1", n)
            reasons |= {f"{what} {n}": why for what, why in (found.lost | found.left_out).items()}
        took = seconds_to_next_round(folder, since)
        if back is not None:
            place.wait_for(back, 3 * DEADLINE_S, "the site is connected again")
            place.go(POINTS["waiting"].format(number + 2))
        told = "; ".join(f"{what}: {why}" for what, why in reasons.items())
        lost = ", ".join(reasons) or "nothing"
        table.append(Row(fault, phase, told[:120] or "nobody asked it", "when back", lost, took))
    place.outcome(folder, 8 * DEADLINE_S)
    completed(folder, last)
    for number, _ in faults:
        assert line(folder, "site-1", number + 2).train is not None
        assert line(folder, "site-2", number).train is not None


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_supernode_killed_in_every_phase_rejoins(there: Deployment, table: list[Row]) -> None:
    def kill() -> None:
        there.kill(there.nodes["site-1"])

    def start() -> None:
        there.start_site("site-1")

    hurt_site(there, table, "node-killed", "kill -9 a SuperNode, restart", kill, start)


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_site_disconnected_in_every_phase_rejoins(
    tmp_path_factory: pytest.TempPathFactory, table: list[Row]
) -> None:
    """Uses `polyclinic site start`, which exits when it cannot connect.

    Flower's own SuperNode neither exits nor retries when a handshake takes too long.
    """
    place = Consortium(tmp_path_factory.mktemp("consortium"), sites=3)

    def cut() -> None:
        place.wires["site-1"].cut = True

    def join() -> None:
        time.sleep(1.2 * DEADLINE_S)
        place.wires["site-1"].cut = False

    try:
        place.start()
        fault = "network cut for longer than the deadline"
        # rounds without this site are so short that it may miss several while it restarts
        hurt_site(place, table, "site-cut", fault, cut, join, lambda: "site-1" in place.online())
    finally:
        place.stop()


@pytest.mark.long
@pytest.mark.parametrize("phase", ["training", "evaluating"])
def test_site_slower_than_the_deadline_is_late_and_rejoins(
    there: Deployment, table: list[Row], phase: str
) -> None:
    there.fault(POINTS[phase].format(2), f"sleep:{2.2 * DEADLINE_S}")
    folder = submit(there, f"slow-{phase}", rounds__count=4)
    there.outcome(folder, 10 * DEADLINE_S)
    completed(folder, 4)
    found = line(folder, "site-1", 2)
    assert found.late
    assert line(folder, "site-1", 4).train is not None
    reason = next(iter(found.late.values()))
    table.append(
        Row(
            "a site far slower than the others",
            phase,
            reason,
            "once it has caught up",
            "its late answers",
            f"{_waited(folder, 2, 'train' if phase == 'training' else 'evaluate'):.0f}",
        )
    )


@pytest.mark.long
@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_huge_reply_is_lost_and_run_completes(
    there: Deployment, table: list[Row], phase: str
) -> None:
    """One gigabyte: ten would not fit into this machine's memory at both ends."""
    there.fault(f"site-2.{phase}.1.reply", "huge:500")
    folder = submit(there, f"huge-{phase}", rounds__count=2)
    there.outcome(folder, 8 * DEADLINE_S)
    completed(folder, 2)
    found = line(folder, "site-2", 1)
    assert found.lost, found
    table.append(
        Row(
            "a reply of a gigabyte" if phase == "train" else "a reply of half a gigabyte",
            phase,
            found.lost[phase][:80],
            "next phase",
            "that reply",
            f"{_waited(folder, 1, phase):.0f}",
        )
    )


@pytest.mark.long
def test_two_concurrent_runs_complete_with_equal_weights(
    there: Deployment, table: list[Row]
) -> None:
    since = time.time()
    changes = {"rounds__deadline_s": 4 * DEADLINE_S, "rounds__min_sites": "3"}
    one, other = (submit(there, name, **changes) for name in ("one", "other"))
    for folder in (one, other):
        there.outcome(folder, 12 * DEADLINE_S)
        completed(folder, 2)
    assert digest(one.checkpoint(2)) != ""
    from safetensors.numpy import load_file

    a, b = load_file(one.checkpoint(2)), load_file(other.checkpoint(2))
    assert all((a[name] == b[name]).all() for name in a)  # no reply reached the wrong run
    took = f"{time.time() - since:.0f}"
    table.append(Row("two runs at once", "all", "-", "both complete", "nothing", took))


@pytest.mark.long
@pytest.mark.parametrize("hours", [1, -1])
def test_run_completes_with_a_site_clock_off_by_an_hour(
    there: Deployment, table: list[Row], tmp_path: Path, hours: int
) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("a wrong clock is made with a C compiler, and there is none")
    library = tmp_path / "clock.so"
    source = ROOT / "tests" / "faults" / "clock.c"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-DSKEW={hours * 3600}", "-o", library, source, "-ldl"],
        check=True,
    )
    there.kill(there.nodes["site-1"])
    there.start_site("site-1", {"LD_PRELOAD": str(library)})
    folder = submit(there, f"clock-{hours}")
    there.outcome(folder, 8 * DEADLINE_S)
    there.kill(there.nodes["site-1"])
    completed(folder, 2)
    found = [x for x in read_history(folder.history) if (x.site, x.split) == ("site-1", "val")]
    if found:
        said = "; ".join(f"{k}: {v}" for x in found for k, v in (x.lost | x.left_out).items())
        took_part = all(x.train is not None for x in found)
    else:
        words = [t for t in there.log("site-1").splitlines() if "rror" in t or "WARN" in t]
        said, took_part = (words or ["it did not connect"])[-1].strip(), False
    table.append(
        Row(
            f"a site's clock is {abs(hours)} hour {'ahead' if hours > 0 else 'behind'}",
            "all",
            said[:80] or "-",
            "takes part" if took_part else "without it",
            "nothing" if took_part else "that site, until its clock is right",
            "0",
        )
    )


def small_disk(folder: Path, megabytes: int) -> Callable[[], None]:
    """Mount a small disk over a folder; returns a function that unmounts it."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={megabytes}m"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("a small disk is a mounted tmpfs, which this user may not make")
    return lambda: subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """Fill a disk completely; returns the file to delete afterwards."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free))
    assert shutil.disk_usage(disk).free == 0
    return filler


@pytest.mark.long
def test_full_disk_of_the_run_folder_is_resumed(there: Deployment, table: list[Row]) -> None:
    disk = there.folder / "small"
    unmount = small_disk(disk, 60)
    try:
        folder = RunFolder(disk / "full")
        there.fault("server.saving.2", "wait")
        submit(there, "full", **{"run__output_dir": str(disk)})
        there.reached("server.saving.2")
        since = time.time()
        filler = fill(disk)
        there.go("server.saving.2")
        there.wait_for(there.finished, 2 * SLACK_S, "the run ends")
        assert "No space left" in there.said()
        assert folder.checkpoints() == [1]
        filler.unlink()
        there.resume(folder)
        there.outcome(folder)
        completed(folder, 2)
        took = seconds_to_next_round(folder, since)
        row = Row("full disk", "checkpointing", "No space left", "resumed", "round 2", took)
        table.append(row)
    finally:
        unmount()


@pytest.mark.long
def test_full_disk_of_a_site_loses_one_round(there: Deployment, table: list[Row]) -> None:
    """A site that cannot log its replies does not answer; it returns once it can."""
    unmount = small_disk(there.folder / "state" / "site-1", 1)
    try:
        there.fault("server.waiting.2", "wait")
        folder = submit(there, "site-full", rounds__count=3)
        there.reached("server.waiting.2")
        filler = fill(there.folder / "state" / "site-1")
        there.fault("server.waiting.3", "wait")
        there.go("server.waiting.2")
        there.reached("server.waiting.3", 4 * DEADLINE_S)
        filler.unlink()
        there.go("server.waiting.3")
        there.outcome(folder, 6 * DEADLINE_S)
        completed(folder, 3)
        found = line(folder, "site-1", 2)
        assert "train" in found.lost
        assert line(folder, "site-1", 3).train is not None
        reason = found.lost["train"].replace("\n", " ")
        row = Row("full disk at a site", "train", reason[:80], "next round", "its answers", "0")
        table.append(row)
    finally:
        unmount()
