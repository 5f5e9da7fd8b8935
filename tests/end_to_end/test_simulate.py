"""``polyclinic simulate`` through Flower's real runtime: SuperLink, Ray, processes, signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests import ROOT
from tests.conftest import TINY
from tests.faults.deployment import PROGRAMS, plant_foreign_packages

PROGRAM = str(PROGRAMS / "polyclinic")


def command(out: Path, *more: str) -> list[str]:
    settings = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    return [PROGRAM, "simulate", *settings, "--out", str(out), *more]


def flower_processes(out: Path) -> set[psutil.Process]:
    """Find processes with their FLWR_HOME under a folder, and their descendants."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("FLWR_HOME", "").startswith(str(out)):
                found |= {process, *process.children(recursive=True)}
    return found


def running(processes: set[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sign",
    [
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.long),
    ],
)
def test_stopped_simulation_leaves_no_process(tmp_path: Path, sign: signal.Signals) -> None:
    out = tmp_path / "runs"
    process = subprocess.Popen(
        command(out, "--rounds", "1000"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: list(out.glob("*/checkpoints/state-*.json")), process)
        before = flower_processes(tmp_path)
        assert any(p.name().startswith("ray::") for p in before)
        process.send_signal(sign)
        _, words = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 130
    assert "stopped; saved results are in" in words
    assert not running(before | flower_processes(tmp_path))
    (outcome,) = out.glob("*/outcome.json")
    assert json.loads(outcome.read_text()) == {
        "status": "stopped",
        "reason": "stopped by the user",
    }


@pytest.mark.slow
@pytest.mark.long
def test_failed_run_exits_1_with_reason(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "--set", "train.learning-rate=1e30", "--set", "train.clip-norm=0"),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 1
    assert "error: the run failed: round 1, train: 0 of 3 sites answered" in done.stderr
    assert "site-1: round 1: loss not finite" in done.stderr
    assert done.stdout == ""
    assert not flower_processes(tmp_path)


@pytest.mark.slow
def test_killed_simulation_exits_1_and_can_be_resumed(tmp_path: Path) -> None:
    """Uses the README's own-data example: written by `polyclinic phantom`, passed as --data."""
    data, out = tmp_path / "my-phantoms", tmp_path / "runs"
    elsewhere = plant_foreign_packages(tmp_path / "elsewhere")
    written = [PROGRAM, "phantom", "--out", str(data), "--sites", "3", "--examples", "12"]
    subprocess.run([*written, "--size", "48"], check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(
        command(*(out, "--data", str(data), "--sites", "site-1,site-3", "--rounds", "1000")),
        cwd=elsewhere,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: list(out.glob("*/checkpoints/state-*.json")), process)
        before = flower_processes(out)
        servers = [p for p in before if p.name() == "flwr-simulation"]
        assert len(servers) == 1
        servers[0].kill()
        _, words = process.communicate(timeout=300)
    finally:
        end(process)
    assert process.returncode == 1
    assert "error: the run's server process exited" in words
    assert not running(before | flower_processes(out))
    (folder,) = (path.parent for path in out.glob("*/run.json"))
    done = max(int(path.stem[-4:]) for path in folder.glob("checkpoints/state-*.json"))
    resumed = subprocess.run(
        [
            *(PROGRAM, "simulate", "--resume", folder.name, "--out", str(out)),
            *("--rounds", str(done + 1), "--json"),
        ],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after round {done}" in resumed.stderr
    assert f"round {done + 1}/{done + 1}" in resumed.stderr
    outcome = json.loads((folder / "outcome.json").read_text())
    assert (outcome["status"], outcome["rounds"]) == ("completed", done + 1)
    results = json.loads(resumed.stdout)
    assert set(results["sites"]) == {"site-1", "site-3"}
    assert results["pooled"]["images"] == sum(s["images"] for s in results["sites"].values())
    assert (Path(results["run"]) / "best.safetensors").is_file()
    assert not running(flower_processes(out))


def end(process: subprocess.Popen[str]) -> None:
    """Terminate a simulation so that it cleans up, in whatever state it is."""
    process.terminate()
    process.wait(timeout=60)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def wait_for(happened, process: subprocess.Popen[str], seconds: float = 300.0) -> None:
    ends = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < ends, "nothing happened in time"
        time.sleep(0.2)


@pytest.mark.slow
def test_flwr_run_streams_a_local_run(tmp_path: Path) -> None:
    """The README's `flwr run . --stream` on a local SuperLink with its own FLWR_HOME."""
    folder = PROGRAMS
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    changes = {**TINY, "run.output-dir": str(tmp_path), "run.name": "by-flwr"}
    elsewhere = plant_foreign_packages(tmp_path / "elsewhere")
    settings = tmp_path / "run.toml"
    with settings.open("w") as file:
        words = [w for key, value in changes.items() for w in ("--set", f"{key}={value}")]
        preset = str(ROOT / "configs/demo.toml")
        subprocess.run([PROGRAM, "settings", "--config", preset, *words], stdout=file, check=True)
    try:
        done = subprocess.run(
            [
                *(str(folder / "flwr"), "run", str(ROOT), "local", "--stream"),
                *("-c", str(settings), "--federation-config", "num-supernodes=3"),
            ],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert "INFO: round 2/2: pooled: Dice 0." in done.stdout, done.stdout
        assert "Best round's model on the held-out test images" in done.stdout, done.stdout
        outcome = json.loads((tmp_path / "by-flwr" / "outcome.json").read_text())
        assert outcome["status"] == "completed"
    finally:
        for process in flower_processes(tmp_path):  # flwr leaves its local SuperLink running
            process.kill()
