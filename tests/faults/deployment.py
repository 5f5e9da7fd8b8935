"""A deployment on loopback: SuperLink and SuperNodes as processes, over TLS, with authentication.

Each site reaches the SuperLink through a proxy connection that a test can cut.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from polyclinic.configs.ports import free_port
from polyclinic.configs.run import RunConfig
from polyclinic.server.runs.folder import RunFolder, to_toml
from polyclinic.simulation.phantom.writer import write_phantoms
from tests import ROOT
from tests.conftest import TINY

# those of another installation, where tests/end_to_end/test_packages.py tries a wheel
PROGRAMS = Path(os.environ.get("POLYCLINIC_TEST_PROGRAMS", Path(sys.executable).parent))
LEFT_OUT = (
    ".git",
    ".venv",
    "tests",
    "docs",
    "runs",
    "docker",
    ".*_cache",
    "__pycache__",
)


class Wire:
    """A TCP proxy from a site to the SuperLink; when cut, it forwards nothing."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self.cut = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed = True
        self._thread.join(5)

    def _work(self) -> None:
        other: dict[socket.socket, socket.socket] = {}
        with selectors.DefaultSelector() as ready, socket.socket() as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind(("127.0.0.1", self.port))
            door.listen(50)
            ready.register(door, selectors.EVENT_READ)
            while not self._closed:
                events = ready.select(0.1)
                if self.cut:
                    time.sleep(0.1)
                    continue
                for key, _ in events:
                    end = key.fileobj
                    assert isinstance(end, socket.socket)
                    if end is door:
                        self._join(door, other, ready)
                    else:
                        self._forward(end, other, ready)
        for end in other:
            end.close()

    def _join(
        self,
        door: socket.socket,
        other: dict[socket.socket, socket.socket],
        ready: selectors.BaseSelector,
    ) -> None:
        near, _ = door.accept()
        try:
            far = socket.create_connection(("127.0.0.1", self.target), 5)
        except OSError:
            _reset(near)
            return
        other[near], other[far] = far, near
        for end in (near, far):
            ready.register(end, selectors.EVENT_READ)

    def _forward(
        self,
        end: socket.socket,
        other: dict[socket.socket, socket.socket],
        ready: selectors.BaseSelector,
    ) -> None:
        if end not in other:
            return
        with contextlib.suppress(OSError):
            data = end.recv(1 << 16)
            if data:
                other[end].sendall(data)
                return
        for half in (end, other[end]):
            ready.unregister(half)
            _reset(half)
        del other[other.pop(end)]


def plant_foreign_packages(folder: Path) -> Path:
    """Write packages with our folders' names that raise when they are imported."""
    for name in ("client", "configs", "mtl_model", "server", "simulation"):
        (folder / name).mkdir(parents=True)
        code = f'raise RuntimeError("the foreign package {name} was imported")\n'
        (folder / name / "__init__.py").write_text(code)
    return folder


def _reset(end: socket.socket) -> None:
    """Reset a connection, as happens when the other program has died.

    Flower mistakes an orderly end of a TLS connection for a wrong certificate, and its SuperNode
    then hangs.
    """
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


class Deployment:
    """One SuperLink and its sites, until ``stop``."""

    connection = "prod"

    def __init__(self, folder: Path, sites: int = 3) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.faults = folder / "faults"
        self.port = free_port()
        self.names = [f"site-{i}" for i in range(1, sites + 1)]
        self.superlink: psutil.Popen | None = None
        self.nodes: dict[str, psutil.Popen] = {}
        self.wires: dict[str, Wire] = {}
        self.started: list[psutil.Popen] = []
        self.last_run = ""
        for part in ("faults", "home", "keys", "runs", "state", "logs"):
            (folder / part).mkdir()
        self.working_folder = plant_foreign_packages(folder / "elsewhere")
        self.app = _app_with_faults(folder / "app")
        _certificates(folder / "keys")
        for name in self.names:
            _key(folder / "keys" / name)
        write_phantoms(
            folder / "data", sites=sites, examples=14, seed=0, size=48, normal_fraction=0.0
        )
        (folder / "home" / "config.toml").write_text(
            '[superlink]\ndefault = "prod"\n[superlink.prod]\n'
            f'address = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder / "keys" / "ca.crt"}"\n'
        )
        self.environment = {
            **os.environ,
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "home"),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3",
            "POLYCLINIC_FAULTS": str(self.faults),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        self.start_superlink()
        for name in self.names:
            key = self.folder / "keys" / f"{name}.pub"
            self.flwr("supernode", "register", str(key), "prod", "--name", name)
        for name in self.names:
            self.start_site(name)

    def start_superlink(self) -> None:
        keys, health = self.folder / "keys", free_port()
        self.superlink = self._spawn(
            "superlink",
            "flower-superlink",
            *(
                "--ssl-certfile",
                str(keys / "server.pem"),
                "--ssl-keyfile",
                str(keys / "server.key"),
            ),
            *("--ssl-ca-certfile", str(keys / "ca.crt"), "--enable-supernode-auth"),
            *("--database", str(self.folder / "state.db"), "--host", "127.0.0.1"),
            *("--port", str(self.port), "--health-server-address", f"127.0.0.1:{health}"),
        )
        self.wait_for(lambda: _listens(self.port), 180, "the SuperLink listens")

    def start_wire(self, name: str) -> Wire:
        """Return a site's proxy to the SuperLink, started on first use."""
        if name not in self.wires:
            self.wires[name] = Wire(self.port)
        return self.wires[name]

    def start_second(self, name: str) -> psutil.Popen:
        """Start another SuperNode with a site's own key and files."""
        return self._start_node(name, f"{name}-again", None, rest_s=60)

    def start_site(self, name: str, environment: dict[str, str] | None = None) -> psutil.Popen:
        self.nodes[name] = self._start_node(name, name, environment)
        return self.nodes[name]

    def _start_node(
        self, name: str, log: str, environment: dict[str, str] | None, rest_s: int = 2
    ) -> psutil.Popen:
        folder = self.folder
        site = folder / f"{name}.yaml"
        site.write_text(
            f"name: {name}\ndata-root: data/{name}\nstate: state/{name}\n"
            "policy: {min-support: 1}\n"
        )
        # restarted like a container: the SuperLink accepts a killed node again only after it
        # has missed its heartbeats, a minute later
        again = ("-c", f'while :; do "$@"; sleep {rest_s}; done', "site")
        return self._spawn(
            log,
            "sh",
            *(*again, str(PROGRAMS / "flower-supernode")),
            *("--root-certificates", str(folder / "keys" / "ca.crt")),
            *("--superlink", f"127.0.0.1:{self.start_wire(name).port}"),
            *("--auth-supernode-private-key", str(folder / "keys" / name)),
            *("--node-config", f'site-config="{site}"', "--port", str(free_port())),
            environment=environment,
        )

    def submit(self, name: str, **changes: bool | float | str) -> RunFolder:
        """Start a run; its folder appears when its server app starts."""
        named = {k.replace("__", ".").replace("_", "-"): v for k, v in changes.items()}
        settings = {
            **TINY,
            "run.output-dir": str(self.runs),
            "run.name": name,
            "rounds.min-sites": "1",
            "rounds.wait-for-sites-s": 60.0,
            "evaluate.select-by": "dice",
            **named,
        }
        file = self.folder / f"{name}.toml"
        file.write_text(to_toml(RunConfig.from_flat(settings)))
        told = self.flwr("run", str(self.app), self.connection, "-c", str(file))
        self.last_run = told.split()[-1]
        return RunFolder(self.runs / name)

    def said(self) -> str:
        """Return the server app's log of the run submitted last."""
        return self.flwr("log", self.last_run, self.connection, "--show")

    def resume(self, folder: RunFolder) -> None:
        """Resume a run with the command of docs/reliability.md."""
        self.flwr("run", str(self.app), self.connection, "-c", f"run.resume='{folder.path}'")

    def finished(self) -> bool:
        """Return whether Flower reports every run as ended."""
        runs = json.loads(self.flwr("ls", self.connection, "--format", "json"))["runs"]
        return all(str(run["status"]).startswith("finished") for run in runs)

    def outcome(self, folder: RunFolder, seconds: float = 600.0) -> dict:
        """Wait for a run's end and return its outcome."""
        self.wait_for(folder.outcome.exists, seconds, f"{folder.name} ends")
        return folder.read_outcome()

    def fault(self, point: str, action: str) -> None:
        (self.faults / point).write_text(action)

    def reached(self, point: str, seconds: float = 400.0) -> int:
        """Wait until a process has reached a point; returns its process id."""
        file = self.faults / f"{point}.reached"
        self.wait_for(lambda: file.exists() and file.read_text(), seconds, f"{point} is reached")
        return int(file.read_text())

    def go(self, point: str) -> None:
        (self.faults / f"{point}.go").touch()

    def flwr(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(PROGRAMS / "flwr"), *arguments],
            cwd=self.working_folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill(self, process: psutil.Popen | psutil.Process) -> None:
        """Kill a process and its descendants."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [process, *process.children(recursive=True)]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(signal.SIGKILL)
            psutil.wait_procs(family, timeout=10)

    def server_app(self) -> psutil.Process:
        """Find the process that runs the server app."""
        found = self._started_by_superlink("flwr-serverapp")
        assert found, "no server app runs"
        return found[0]

    def starters(self) -> list[psutil.Process]:
        """Find Flower's processes that start server apps; a SuperLink needs one to start a run."""
        return self._started_by_superlink("flower-superexec")

    def _started_by_superlink(self, program: str) -> list[psutil.Process]:
        assert self.superlink is not None
        found = []
        for process in psutil.Process(self.superlink.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # the process is a zombie
                if program in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def wait_for(self, happened: Callable[[], object], seconds: float, what: str) -> None:
        ends = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < ends, f"not within {seconds:g} s: {what}\n{self.last_words()}"
            time.sleep(0.1)

    def last_words(self) -> str:
        texts = []
        for log in sorted((self.folder / "logs").iterdir()):
            lines = log.read_text(errors="replace").splitlines()[-12:]
            texts.append("\n".join([f"--- {log.name}", *lines]))
        return "\n".join(texts)

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text(errors="replace")

    def stop(self) -> None:
        for process in self.started:
            self.kill(process)
        for line in self.wires.values():
            line.close()

    def _spawn(
        self, name: str, program: str, *arguments: str, environment: dict[str, str] | None = None
    ) -> psutil.Popen:
        with (self.folder / "logs" / f"{name}.log").open("ab") as out:
            process = psutil.Popen(
                [str(PROGRAMS / program) if program != "sh" else "sh", *arguments],
                cwd=self.working_folder,
                env=self.environment | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process


@contextlib.contextmanager
def deployment(folder: Path, sites: int = 3) -> Iterator[Deployment]:
    made = Deployment(folder, sites)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def events(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.progress.read_text().splitlines() if line]


def _app_with_faults(folder: Path) -> Path:
    def left_out(at: str, names: list[str]) -> set[str]:
        patterns = LEFT_OUT if Path(at) == ROOT else ("__pycache__",)  # server/runs is needed
        return shutil.ignore_patterns(*patterns)(at, names)

    shutil.copytree(ROOT, folder, ignore=left_out)
    shutil.copy(ROOT / "tests" / "faults" / "apps.py", folder / "apps.py")
    return folder


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def _key(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.with_name(f"{path.name}.pub").write_bytes(public)


def _certificates(folder: Path) -> None:
    """Write a certificate authority valid for a day and a server certificate for loopback."""
    now = datetime.datetime.now(datetime.UTC)
    authority = ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")])
    server = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))

    def certificate(name: x509.Name, key: ec.EllipticCurvePrivateKey, ca: bool) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=3))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName("localhost"), loopback]), critical=False
            )
            .sign(authority, hashes.SHA256())
        )

    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(certificate(issuer, authority, True).public_bytes(pem))
    (folder / "server.pem").write_bytes(certificate(subject, server, False).public_bytes(pem))
    (folder / "server.key").write_bytes(
        server.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
