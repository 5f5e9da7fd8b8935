"""A run on one machine: a SuperLink of its own, the app given to it, its progress followed.

What ``flwr run .`` does by itself, made safe: its SuperLink may be one that another checkout left
running, it simulates two sites unless told otherwise, and it exits 0 when the run failed. Here
the SuperLink listens on a free port with its own FLWR_HOME under the run folder, the number of
sites follows from the data, and every process is gone at the end, also after Ctrl-C or SIGTERM.
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
from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.distance import check_distances
from polyclinic.server.aggregation.initial import initial_network
from polyclinic.server.rounds.federation import RunRefused, check_classes, sites_needed
from polyclinic.server.runs.folder import RunFolder, read_lines_from, to_toml, write_json
from polyclinic.simulation.local.sites import simulated_sites

START_S = 60.0  # longest wait for the SuperLink's first answer
SILENCE_S = 20.0  # without an event for so long, Flower is asked whether the run still goes on
STOP_S = 5.0  # from asking processes to end until they are ended
_MARK = "POLYCLINIC_LAUNCH"  # in the environment of every process of a launch

Event = dict[str, Any]


class LaunchError(RuntimeError):
    """The run could not be started or ended without saying how. The message has Flower's words."""


@dataclass(frozen=True)
class Plan:
    """A checked run, ready to start."""

    config: RunConfig  # with absolute folders and a name
    sites: tuple[str, ...]
    folder: RunFolder
    parallel: int  # sites that compute at the same time


def plan(config: RunConfig, parallel: int | None = None) -> Plan:
    """Read and check everything that can be checked before anything is started or written.

    A config that resumes a run is one that ``server.app.resumed_config`` made.

    Args:
        parallel: sites that compute at the same time; None for one on a GPU, and otherwise as many
            as there are cores and sites, since small layers gain little from a second core.

    Raises:
        BackboneError, ConfigError, DataError, DeviceError, DistanceError, PretrainedError,
        RunRefused: saying what does not fit.
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
            pass  # nobody else runs it
    else:
        folder = RunFolder.free(config)
    run = config.run.model_copy(update={"name": folder.name, "output_dir": str(folder.path.parent)})
    data = config.data.model_copy(update={"root": str(root), "sites": sites})
    config = config.model_copy(update={"run": run, "data": data, "model": model})
    at_once = parallel or (1 if _gpus() else min(_cores(), len(sites)))
    return Plan(config, sites, folder, at_once)


def launch(plan: Plan, follow: Callable[[Event], None]) -> Event:
    """Start the run, hand every event to ``follow``, and return the one that ended it.

    Raises:
        LaunchError: if Flower could not start it, or it ended without an outcome.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, once every process has ended.
    """
    names = chain(["flower"], (f"flower-{i}" for i in count(2)))  # a resumed run has one already
    home = next(p for name in names if not (p := plan.folder.path / name).exists())
    began = time.time()
    try:
        home.mkdir(parents=True)
        plan.folder.outcome.unlink(missing_ok=True)
    except OSError as error:
        raise LaunchError(f"run folder {plan.folder.path}: cannot be made: {error}") from None
    mark = uuid.uuid4().hex
    try:
        with _terminated_as_interrupt(), _superlink(home, mark) as superlink:
            _submit(plan, superlink)
            return _followed(plan, superlink, follow, began)
    except BaseException as error:
        if not plan.folder.outcome.exists():
            reason = "stopped by the user" if isinstance(error, KeyboardInterrupt) else str(error)
            write_json(plan.folder.outcome, {"status": "failed", "reason": reason})
        raise


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink process and where it lives."""

    process: subprocess.Popen[bytes]
    home: Path
    log: Path
    environment: Mapping[str, str]
    family: set[psutil.Process] = field(default_factory=set)  # all that were ever seen

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

    def look_around(self) -> psutil.Process | None:
        """Note every process of this launch; return the one that runs our server app, if any."""
        self.family.update(_family(self.environment[_MARK]))
        return next((p for p in self.family if _name(p) == "flwr-simulation"), None)

    def last_words(self) -> str:
        """The end of the log, where the reason usually stands."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines[-30:] if line.strip())


@contextlib.contextmanager
def _superlink(home: Path, mark: str) -> Iterator[SuperLink]:
    port = _free_port()
    address = f"127.0.0.1:{port}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "{address}"\ninsecure = true\n'
    )
    environment = {
        # A waiting thread of libgomp spins 300,000 turns before it sleeps, which starves whoever
        # shares its core; with none at all, small layers wait for it twice as long.
        "GOMP_SPINCOUNT": "5000",
        **os.environ,
        # Flower starts its own programs by name, also where the environment is not activated
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
            start_new_session=True,  # Ctrl-C is for us to handle
        )
    superlink = SuperLink(process, home, log, environment)
    try:
        _wait_until_up(superlink, port)
        yield superlink
    finally:
        with _deaf_to_interrupts():
            superlink.look_around()
            _end_all(superlink.family)
            _end_all(_family(mark))  # what was being started meanwhile
            process.wait()


def _wait_until_up(superlink: SuperLink, port: int) -> None:
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        if superlink.process.poll() is not None:
            raise LaunchError(f"flower-superlink ended at start:\n{superlink.last_words()}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.1)
    raise LaunchError(f"flower-superlink did not answer in {START_S:g} s; see {superlink.log}")


def _submit(plan: Plan, superlink: SuperLink) -> None:
    settings = superlink.home / "run-config.toml"
    settings.write_text(to_toml(plan.config))
    resources: dict[str, int | float] = {
        "num-supernodes": len(plan.sites),
        "client-resources-num-cpus": max(1, _cores() // plan.parallel),
        "init-args-num-cpus": _cores(),  # or Ray's own count may be less than one site asks for
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
        raise LaunchError(f"flwr run did not end in {error.timeout:g} s") from None
    if done.returncode:
        raise LaunchError(f"flwr run failed:\n{done.stdout}{done.stderr}")


def _followed(
    plan: Plan, superlink: SuperLink, follow: Callable[[Event], None], began: float
) -> Event:
    """Hand on events until the run's last one; those of before it was resumed are history.

    In silence it is looked whether the server's process is still there, and, since that process
    starts late and may end before its first word, Flower is asked how the run stands.
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
            raise LaunchError(f"the run's server process ended:\n{superlink.last_words()}")
        if superlink.process.poll() is not None:
            raise LaunchError(f"flower-superlink ended:\n{superlink.last_words()}")
        if events:
            silence, asked_after = time.monotonic(), SILENCE_S
            server = superlink.look_around()
        elif time.monotonic() - silence > asked_after:
            asked_after *= 2
            status = run_status(superlink)
            if status and status.startswith("finished"):
                raise LaunchError(f"Flower says {status}:\n{superlink.last_words()}")
        time.sleep(0.2)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def run_status(superlink: SuperLink) -> str | None:
    """Flower's word for how the run stands, ``finished:failed`` for example.

    None if it gives none this time: a busy machine must not end a run that goes on.
    """
    try:
        done = superlink.flwr("ls", "own", "--format", "json")
        return str(json.loads(done.stdout)["runs"][0]["status"])
    except (json.JSONDecodeError, KeyError, IndexError, subprocess.TimeoutExpired):
        return None


def app_folder() -> Path:
    """The folder with our pyproject.toml, from which Flower bundles the app.

    Raises:
        LaunchError: if the package was installed without it.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "pyproject.toml").is_file():
        raise LaunchError(
            f"{folder}: expected the source tree with pyproject.toml, which Flower bundles; "
            "install with pip install -e from a clone"
        )
    return folder


def _program(name: str) -> str:
    """A program of this environment, also if the environment is not activated."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise LaunchError(f"{name}: no such program; install with pip install 'flwr[simulation]'")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


@contextlib.contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM, and a terminal that closes, end a launch as Ctrl-C does: with its processes."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling({signal.SIGTERM, signal.SIGHUP}, interrupt):
        yield


def _deaf_to_interrupts() -> contextlib.AbstractContextManager[None]:
    """A second Ctrl-C must not keep the first from ending processes."""
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
    """Ask processes to end, then end them. psutil leaves alone who has an ended one's number."""
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
    """Every process with the mark in its environment, and its descendants.

    Both, because some are adopted when their parent ends, and Ray's agents, which leave every
    process group, write their title over their environment.
    """
    family: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(_MARK) == mark:
                family |= {process, *process.children(recursive=True)}
    return family
