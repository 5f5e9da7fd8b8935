"""Run a federation on one machine: start a SuperLink, submit the app and follow its progress.

This is a safer form of ``flwr run .``, which may use a SuperLink that another checkout left
running, simulates two sites by default, and exits with status 0 if the run failed. Here the
SuperLink listens on a free port with its own FLWR_HOME in the run folder, the number of sites
follows from the data, and every process has ended when the launch returns, even after Ctrl-C or
SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from polyclinic.client.data.dataset import load_site
from polyclinic.client.training.device import find_device
from polyclinic.configs import wire
from polyclinic.configs.files import read_lines_from, write_json
from polyclinic.configs.ports import free_port
from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.distance import check_distances
from polyclinic.server.aggregation.initial import initial_network
from polyclinic.server.rounds.errors import RunRefused
from polyclinic.server.rounds.federation import check_classes, sites_needed
from polyclinic.server.runs.folder import STOPPED_REASON, RunFolder, to_toml
from polyclinic.simulation.local.sites import simulated_sites

START_S = 60.0  # longest wait for the SuperLink to accept connections, in seconds
SILENCE_S = 20.0  # seconds without an event after which Flower is asked for the run's status
STOP_S = 5.0  # seconds between terminating processes and killing them
_MARK = "POLYCLINIC_LAUNCH"  # environment variable that identifies the processes of a launch

Event = dict[str, Any]


class LaunchError(RuntimeError):
    """The run could not be started, or ended without an outcome. The message includes Flower's."""


@dataclass(frozen=True)
class Plan:
    """A checked run, ready to start."""

    config: RunConfig  # with absolute folders and a run name
    sites: tuple[str, ...]  # names of the sites
    folder: RunFolder
    parallel: int  # number of sites that compute at the same time


def plan(config: RunConfig, parallel: int | None = None) -> Plan:
    """Check a run as far as possible before anything is started or written.

    Args:
        config: the settings. To resume a run, they must come from ``server.app.resumed_config``.
        parallel: number of sites that compute at the same time. None means one with a GPU, and
            otherwise the smaller of the numbers of cores and sites, because small layers gain
            little from a second core.

    Raises:
        BackboneError: if the configured backbone cannot be used.
        ConfigError: if the settings are invalid.
        DataError: if the data of a site are missing or invalid.
        DeviceError: if the configured device is not available.
        DistanceError: if distances are requested and MONAI is not installed.
        PretrainedError: if the pretrained weights cannot be used.
        RunRefused: if the sites' data do not suit the run, or the run folder is in use.
    """
    find_device(config.train.device)
    if config.evaluate.hd95:
        check_distances()
    root, manifests = simulated_sites(config.data, config.phantom)
    classes = config.data.classes
    counts = {
        name: load_site(manifest, config.data).splits[wire.TRAIN_SPLIT].class_counts().tolist()
        for name, manifest in manifests.items()
    }
    check_classes(classes, counts)
    sites = tuple(manifests)
    if sites_needed(config.rounds.min_sites, len(sites)) > len(sites):
        raise RunRefused(
            f"rounds.min-sites: expected at most {len(sites)}, the number of sites, got "
            f"{config.rounds.min_sites}"
        )
    model = config.model
    if model.pretrained not in ("none", "timm"):
        file = str(Path(model.pretrained).expanduser().absolute())
        model = model.model_copy(update={"pretrained": file})
    initial_network(model, config.data, config.loss, config.run.seed)
    if config.run.resume:
        folder = RunFolder(Path(config.run.resume))
        with folder.locked():
            pass  # checks that no other process uses the run folder
    else:
        folder = RunFolder.free(config)
    run = config.run.model_copy(update={"name": folder.name, "output_dir": str(folder.path.parent)})
    data = config.data.model_copy(update={"root": str(root), "sites": sites})
    config = config.model_copy(update={"run": run, "data": data, "model": model})
    at_once = parallel or (1 if _gpus() else min(_cores(), len(sites)))
    return Plan(config, sites, folder, at_once)


def launch(plan: Plan, follow: Callable[[Event], None]) -> Event:
    """Start the run, pass every event to ``follow``, and return the final event.

    Args:
        plan: the checked run.
        follow: called with each event of the run.

    Raises:
        LaunchError: if Flower could not start the run, or the run ended without an outcome.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after every process has ended.
    """
    # A resumed run already has a folder named "flower".
    names = chain(["flower"], (f"flower-{i}" for i in count(2)))
    home = next(p for name in names if not (p := plan.folder.path / name).exists())
    began = time.time()
    try:
        home.mkdir(parents=True)
        plan.folder.outcome.unlink(missing_ok=True)
    except OSError as error:
        raise LaunchError(f"run folder {plan.folder.path}: cannot be created: {error}") from None
    mark = uuid.uuid4().hex
    try:
        with _terminated_as_interrupt(), _superlink(home, mark) as superlink:
            _submit(plan, superlink)
            return _followed(plan, superlink, follow, began)
    except BaseException as error:
        if not plan.folder.outcome.exists():
            stopped = isinstance(error, KeyboardInterrupt)
            status, reason = ("stopped", STOPPED_REASON) if stopped else ("failed", str(error))
            write_json(plan.folder.outcome, {"status": status, "reason": reason})
        raise


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink process with its folder and environment."""

    process: subprocess.Popen[bytes]
    home: Path  # FLWR_HOME
    log: Path
    environment: Mapping[str, str]
    family: set[psutil.Process] = field(default_factory=set)  # all processes seen so far

    def flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Flower's command line against this SuperLink."""
        return subprocess.run(
            [_program("flwr"), *arguments],
            env=dict(self.environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def record_processes(self) -> psutil.Process | None:
        """Record the processes of this launch; return the one running our server app, or None."""
        self.family.update(_family(self.environment[_MARK]))
        return next((p for p in self.family if _name(p) == "flwr-simulation"), None)

    def log_tail(self) -> str:
        """Return the last 30 lines of the log, which usually contain the reason of a failure."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines[-30:] if line.strip())


@contextlib.contextmanager
def _superlink(home: Path, mark: str) -> Iterator[SuperLink]:
    port = free_port()
    address = f"127.0.0.1:{port}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "{address}"\ninsecure = true\n'
    )
    environment = {
        # By default a waiting thread of libgomp spins 300,000 times before it sleeps, which starves
        # other threads on its core; without any spinning, small layers take twice as long.
        "GOMP_SPINCOUNT": "5000",
        **os.environ,
        # Flower starts its programs by name, which must work without an activated environment.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        _MARK: mark,
    }
    log = home / "superlink.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                *(_program("flower-superlink"), "--insecure", "--simulation"),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C must reach only this process
        )
    superlink = SuperLink(process, home, log, environment)
    try:
        _wait_until_up(superlink, port)
        yield superlink
    finally:
        with _ignore_interrupts():
            superlink.record_processes()
            _end_all(superlink.family)
            _end_all(_family(mark))  # processes that started in the meantime
            process.wait()


def _wait_until_up(superlink: SuperLink, port: int) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        if superlink.process.poll() is not None:
            raise LaunchError(f"flower-superlink exited at startup:\n{superlink.log_tail()}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.1)
    raise LaunchError(f"flower-superlink did not respond in {START_S:g} s; see {superlink.log}")


def _submit(plan: Plan, superlink: SuperLink) -> None:
    settings = superlink.home / "run-config.toml"
    settings.write_text(to_toml(plan.config))
    resources: dict[str, int | float] = {
        "num-supernodes": len(plan.sites),
        "client-resources-num-cpus": max(1, _cores() // plan.parallel),
        "init-args-num-cpus": _cores(),  # Ray's own count may be less than one site requests
    }
    gpus = _gpus()
    if gpus:
        resources["client-resources-num-gpus"] = (
            math.floor(1000 * min(1.0, gpus / plan.parallel)) / 1000
        )
    federation = " ".join(f"{key}={value}" for key, value in resources.items())
    try:
        done = superlink.flwr(
            *("run", str(app_folder()), "own", "-c", str(settings)),
            *("--federation-config", federation),
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"flwr run did not finish in {error.timeout:g} s") from None
    if done.returncode:
        raise LaunchError(f"flwr run failed:\n{done.stdout}{done.stderr}")


def _followed(
    plan: Plan, superlink: SuperLink, follow: Callable[[Event], None], began: float
) -> Event:
    """Pass on the run's events, except those from before it was resumed, and return the last one.

    The loop also checks that the server process is still running. That process starts late and may
    exit before its first event, so after a period without events Flower is asked for the status.
    """
    position, silence, asked_after = 0, time.monotonic(), SILENCE_S
    server: psutil.Process | None = None
    while True:
        gone = server is not None and not _runs(server)
        found, position = read_lines_from(plan.folder.progress, position)
        events = [event for event in found if event["time"] >= began]
        for event in events:
            follow(event)
            if event["event"] == "end":
                return event
        if gone:
            raise LaunchError(f"the run's server process exited:\n{superlink.log_tail()}")
        if superlink.process.poll() is not None:
            raise LaunchError(f"flower-superlink exited:\n{superlink.log_tail()}")
        if events:
            silence, asked_after = time.monotonic(), SILENCE_S
            server = superlink.record_processes()
        elif time.monotonic() - silence > asked_after:
            asked_after *= 2
            status = run_status(superlink)
            if status and status.startswith("finished"):
                raise LaunchError(f"Flower reports {status}:\n{superlink.log_tail()}")
        time.sleep(0.2)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def run_status(superlink: SuperLink) -> str | None:
    """Ask Flower for the status of the run, for example ``finished:failed``.

    Returns:
        The status, or None if Flower gives no valid answer, which may happen on a busy machine and
        must not end the run.
    """
    try:
        done = superlink.flwr("ls", "own", "--format", "json")
        return str(json.loads(done.stdout)["runs"][0]["status"])
    except (json.JSONDecodeError, KeyError, IndexError, subprocess.TimeoutExpired):
        return None


def app_folder() -> Path:
    """Return the folder that contains pyproject.toml, from which Flower bundles the app.

    Raises:
        LaunchError: if the package was installed without its source tree.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "pyproject.toml").is_file():
        raise LaunchError(
            f"{folder}: expected the source tree with pyproject.toml, which Flower bundles; "
            "clone the repository and install with pip install -e"
        )
    return folder


def _program(name: str) -> str:
    """Find a program of this Python environment, which need not be activated."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if not found:
        raise LaunchError(f"{name}: program not found; pip install 'flwr[simulation]'")
    return found


def _cores() -> int:
    """Count the cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


@contextlib.contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP like Ctrl-C, so that all processes of the launch are ended."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling({signal.SIGTERM, signal.SIGHUP}, interrupt):
        yield


def _ignore_interrupts() -> contextlib.AbstractContextManager[None]:
    """Ignore signals, so that a second Ctrl-C does not interrupt the clean-up of the first."""
    return _handling({signal.SIGINT, signal.SIGTERM, signal.SIGHUP}, signal.SIG_IGN)


@contextlib.contextmanager
def _handling(
    signals: set[signal.Signals],
    handler: Callable[[int, FrameType | None], None] | signal.Handlers,
) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)


def _end_all(processes: set[psutil.Process]) -> None:
    """Terminate processes and kill those that remain; psutil spares reused process ids."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(list(processes), timeout=STOP_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def _family(mark: str) -> set[psutil.Process]:
    """Find every process with the mark in its environment, and its descendants.

    Neither is sufficient: some processes are re-parented when their parent ends, and Ray's agents,
    which leave every process group, overwrite their environment with their title.
    """
    family: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(_MARK) == mark:
                family |= {process, *process.children(recursive=True)}
    return family
