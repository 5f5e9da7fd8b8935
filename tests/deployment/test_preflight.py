"""Preflight checks: common faults are found and reported with advice."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import polyclinic.configs.diagnostics.machine
import polyclinic.configs.diagnostics.network
from polyclinic.client.data.split_key import SPLIT_KEY, split_key
from polyclinic.client.ledger.budget import LEDGER, Cohort, Ledger
from polyclinic.client.node.preflight import preflight
from polyclinic.client.policy.approvals import Approvals
from polyclinic.configs import VERSION
from polyclinic.configs.diagnostics.checks import Check, as_json, as_lines, failed
from polyclinic.configs.diagnostics.machine import (
    check_address,
    check_disk,
    check_memory,
    check_port,
    check_shared_memory,
    check_writable,
)
from polyclinic.configs.diagnostics.network import (
    About,
    check_proxy,
    check_tls,
    compare_clocks,
    connect,
    resolve,
)
from polyclinic.configs.ports import free_port
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.federation import read_federation
from polyclinic.configs.schema.site import read_site_config
from polyclinic.configs.security.credentials import now_utc
from polyclinic.server.deployment.preflight import preflight as server_preflight
from polyclinic.server.deployment.provision import provision
from polyclinic.server.deployment.startup import server_health
from polyclinic.simulation.phantom.writer import write_phantoms
from tests.factories import app, federation, packed


class Coordinator:
    """A TLS server that answers like a coordinator's about endpoint."""

    def __init__(self, kit: Path, port: int) -> None:
        self.cut_short: list[OSError] = []  # connections closed by the preflight
        self.about = {"polyclinic": VERSION, "flwr": "1.41.0"}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(kit / "server.crt", kit / "server.key")
        self._door = socket.create_server(("127.0.0.1", port))
        self._context = context
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                raw, _ = self._door.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(raw,), daemon=True).start()

    def _answer(self, raw: socket.socket) -> None:
        try:
            with self._context.wrap_socket(raw, server_side=True) as tls:
                if tls.recv(1000):
                    body = json.dumps({"time": now_utc().isoformat(), **self.about}).encode()
                    tls.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body)
        except OSError as error:  # the preflight only checked the route, or refused the certificate
            self.cut_short.append(error)

    def close(self) -> None:
        self._door.close()


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    server_ = {"address": "127.0.0.1", "port": free_port()}
    provision(federation(server=server_), tmp_path / "kits")
    return tmp_path / "kits"


@pytest.fixture
def site_file(tmp_path: Path, kits: Path) -> Path:
    write_phantoms(tmp_path / "data", sites=1, examples=12, seed=0, size=48, normal_fraction=0.0)
    file = kits / "sites" / "site-a" / "site.yaml"
    text = file.read_text().replace("/data #", f"{tmp_path / 'data' / 'site-1'} #")
    file.write_text(text.replace("/var/lib/polyclinic #", f"{tmp_path / 'state'} #"))
    return file


@pytest.fixture
def coordinator(kits: Path, site_file: Path) -> Iterator[Coordinator]:
    server_ = read_site_config(site_file).server
    assert server_ is not None
    made = Coordinator(kits / "server", server_.port)
    yield made
    made.close()


Look = Callable[..., dict[str, Check]]


@pytest.fixture
def look(site_file: Path) -> Look:
    def call(probe_registration: str = "", health: str | None = None) -> dict[str, Check]:
        found = preflight(site_file, DataConfig(), lambda server_: probe_registration, health)
        return {check.name: check for check in found}

    return call


def test_healthy_site_passes_all_checks(site_file, look, coordinator, tmp_path) -> None:
    Approvals(tmp_path / "state").approve(packed(app()))
    checks = look(health=f"127.0.0.1:{free_port()}")
    assert list(checks) == [
        *("site.yaml", "state", "disk", "memory", "shm", "GPU", "health port"),
        *("manifest", "images", "ledger", "releases", "kit"),
        *("proxy", "DNS", "route", "TLS", "clock", "versions", "key"),
    ]
    assert not failed(list(checks.values()))
    wanted = "OK" if torch.cuda.is_available() else "warn"
    assert checks["GPU"].level == wanted
    assert all(check.level == "OK" for name, check in checks.items() if name != "GPU")
    lines = as_lines(list(checks.values()))
    assert any(line.startswith("OK    key") for line in lines)
    assert as_json(list(checks.values()))["ok"] is True


def test_preflight_command_prints_checks_and_exits_1_on_failure(cli, site_file) -> None:
    status, out, _ = cli("site", "preflight", site_file, "--json")
    told = {check["name"]: check for check in json.loads(out)["checks"]}
    assert status == 1
    assert json.loads(out)["ok"] is False
    assert told["route"]["level"] == "fail"
    assert "open TCP connections to 127.0.0.1" in told["route"]["advice"]
    status, out, _ = cli("site", "preflight", site_file)
    assert "fail  route" in out
    assert "-> " in out


def test_missing_site_file_fails_preflight(tmp_path: Path) -> None:
    (check,) = preflight(tmp_path / "missing.yaml", DataConfig(), lambda server_: "")
    assert (check.name, check.level) == ("site.yaml", "fail")


def test_unreadable_images_warn_or_fail_preflight(look, site_file, tmp_path) -> None:
    data = tmp_path / "data" / "site-1"
    images = sorted((data / "images").iterdir())
    images[0].write_bytes(b"no image")
    found = look()["images"]
    assert found.level == "warn"
    assert found.seen.startswith(f"1 of {len(images)} cannot be used: ")
    assert images[0].name in found.seen
    for image in images:
        image.write_bytes(b"no image")
    found = look()["images"]
    assert found.level == "fail"
    assert f"and {len(images) - 3} more" in found.seen
    (data / "labels.csv").unlink()
    assert look()["manifest"].level == "fail"


def test_preflight_reports_split_key_and_ledger_state(look, site_file, tmp_path) -> None:
    text = "cohort: {examples: 100, patients: 50}\n"
    budget = "budget: {epsilon: 1.0, delta: 1.0e-4, unit: patient}\n"
    own = "data: {classes: [benign, malignant], mask-classes: [lesion], val-fraction: 0.15, "
    site_file.write_text(site_file.read_text() + text + budget + own + "test-fraction: 0.2}\n")
    assert look()["split"].level == "OK"
    assert not (tmp_path / "state" / SPLIT_KEY).exists()
    split_key(tmp_path / "state")
    assert look()["split"].level == "OK"
    (tmp_path / "state" / SPLIT_KEY).write_text("rubbish")
    assert look()["split"].level == "fail"
    assert look()["ledger"].seen == "nothing spent yet of epsilon 1"
    path = tmp_path / "state" / LEDGER
    path.write_bytes(b"rubbish" * 1000)
    found = look()["ledger"]
    assert found.level == "fail"
    assert "keep the file" in found.advice
    path.unlink()
    with Ledger(path, Cohort("site-a", "patient", 50), 1e-4, 1.0):
        pass
    assert look()["ledger"].seen == "1 left of epsilon 1"


def test_preflight_reports_approved_releases(look, tmp_path) -> None:
    assert look()["releases"].level == "warn"
    approvals = Approvals(tmp_path / "state")
    digest = approvals.approve(packed(app())).digest
    assert digest[:12] in look()["releases"].seen
    approvals.log.write_text("rubbish")
    assert look()["releases"].level == "fail"


def test_preflight_reports_mismatched_and_expired_kits(
    look, kits, site_file, coordinator, monkeypatch
) -> None:
    site, other = site_file.parent, kits / "sites" / "site-b"
    key = (site / "site.key").read_bytes()
    (site / "site.key").write_bytes((other / "site.key").read_bytes())
    checks = look()
    assert checks["kit"].seen.endswith(f"does not belong to the key {site / 'site.key'}")
    assert "key" not in checks  # the key is not used at the coordinator
    (site / "site.key").write_bytes(key)
    (site / "site.key").chmod(0o644)
    assert "expected a private key that only its owner can read" in look()["kit"].seen
    (site / "site.key").chmod(0o600)
    text = site_file.read_text()
    site_file.write_text(text.replace("name: site-a", "name: site-c"))
    assert look()["kit"].seen == "the kit belongs to site site-a, site.yaml says site-c"
    site_file.write_text(text)
    for days, level, said in (
        (340, "warn", "in 24 days"),
        (366, "fail", "it expired on "),
        (-1, "fail", "it is not valid before"),
    ):
        moment = now_utc() + timedelta(days=days)
        monkeypatch.setattr(
            "polyclinic.client.node.preflight.now_utc", lambda moment=moment: moment
        )
        found = look()["kit"]
        assert found.level == level
        assert said in found.seen


def test_preflight_stops_at_a_certificate_of_another_authority(
    look, kits, site_file, coordinator
) -> None:
    others = kits.parent / "others"
    provision(federation(name="others"), others)
    (site_file.parent / "ca.crt").write_bytes((others / "authority" / "ca.crt").read_bytes())
    checks = look()
    assert checks["kit"].seen.endswith(f"is not signed by {site_file.parent / 'ca.crt'}")
    assert checks["TLS"].level == "fail"
    assert "never connect without" in checks["TLS"].advice
    ends = time.monotonic() + 10
    while not any("alert unknown ca" in str(error) for error in coordinator.cut_short):
        assert time.monotonic() < ends, coordinator.cut_short  # the error at the server's side
        time.sleep(0.01)
    assert "versions" not in checks


def test_preflight_reports_a_rejected_site_key(look, coordinator) -> None:
    found = look(probe_registration="key 1234 is not registered")["key"]
    assert found.level == "fail"
    assert "does not accept this site's key: key 1234 is not registered" in found.seen


@pytest.mark.parametrize(
    ("about", "name", "level"),
    [
        ({"polyclinic": "9.0.0"}, "versions", "fail"),
        ({"flwr": "1.99.0"}, "versions", "fail"),
        ({"polyclinic": f"{'.'.join(VERSION.split('.')[:2])}.99"}, "versions", "OK"),
        ({"time": timedelta(seconds=400)}, "clock", "fail"),
        ({"time": timedelta(days=-1)}, "clock", "fail"),
        ({"strange": 1}, "versions", "fail"),
        ({"time": "noon"}, "versions", "fail"),
    ],
)
def test_preflight_checks_clock_and_versions(look, coordinator, about, name, level) -> None:
    if isinstance(ahead := about.get("time"), timedelta):
        about = {"time": (now_utc() + ahead).isoformat()}
    coordinator.about |= about
    assert look()[name].level == level


def test_clock_off_by_30_seconds_gives_a_warning() -> None:
    about = About((now_utc() - timedelta(seconds=30)).isoformat(), "", "")
    found = compare_clocks(about)
    assert found.level == "warn"
    assert "ahead of the coordinator's" in found.seen


def test_failed_dns_route_and_tls_are_reported(kits: Path) -> None:
    assert resolve("no-such-host.invalid", 1).level == "fail"
    assert connect("127.0.0.1", free_port()).level == "fail"
    with plain_server() as port:
        found = check_tls("127.0.0.1", port, kits / "authority" / "ca.crt")
        assert found.level == "fail"
        assert "blocks or intercepts TLS" in found.advice


@contextmanager
def plain_server() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer() -> None:
            connection, _ = door.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield door.getsockname()[1]


def test_configured_proxy_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert check_proxy("fl.example.org").level == "OK"
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert check_proxy("fl.example.org").level == "warn"
    monkeypatch.setenv("no_proxy", "fl.example.org")
    assert check_proxy("fl.example.org").level == "OK"


def test_disk_memory_and_shared_memory_thresholds(tmp_path: Path, monkeypatch) -> None:
    class Usage:
        def __init__(self, total: float, free: float) -> None:
            self.total, self.free = total, free

    for free, level in ((0.5e9, "fail"), (5e9, "warn"), (50e9, "OK")):
        monkeypatch.setattr(
            polyclinic.configs.diagnostics.machine.shutil,
            "disk_usage",
            lambda folder, free=free: Usage(1e12, free),
        )
        assert check_disk("disk", tmp_path / "not" / "there").level == level
    for total, level in ((64 << 20, "warn"), (1 << 30, "OK")):
        monkeypatch.setattr(
            polyclinic.configs.diagnostics.machine.shutil,
            "disk_usage",
            lambda folder, total=total: Usage(total, 1),
        )
        assert check_shared_memory(tmp_path).level == level
    assert check_shared_memory(tmp_path / "missing").level == "warn"
    monkeypatch.setattr(polyclinic.configs.diagnostics.machine, "MEMORY_WARN", 1e6)
    assert check_memory().level == "warn"


def test_occupied_ports_and_unwritable_folders_fail(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        found = check_port("public port", "127.0.0.1", port)
        assert found.level == "fail"
        assert f"127.0.0.1:{port}: Address already in use" in found.seen
    for wrong in ("9098", "localhost:", "localhost:port", "127.0.0.1:99999"):
        found = check_address("health port", wrong)
        assert found.seen == f"{wrong!r} is not an address"
        assert found.level == "fail"
    assert check_address("health port", f"127.0.0.1:{free_port()}").level == "OK"
    assert check_writable("state", tmp_path / "new").level == "OK"
    (tmp_path / "file").touch()
    found = check_writable("state", tmp_path / "file" / "state")
    assert found.level == "fail"
    assert f"uid {os.geteuid()}" in found.seen
    assert "chown" in found.advice


@pytest.mark.parametrize(
    ("computes", "level", "said"),
    [
        (lambda: torch.full((8, 8), 8.0), "OK", "a card, CUDA"),
        (lambda: torch.zeros(8, 8), "fail", "computes wrong results"),
        (None, "fail", "is visible, but a computation failed: CUDA error: unknown"),
    ],
)
def test_gpu_check_verifies_a_computation(look, monkeypatch, computes, level, said) -> None:
    class Card:
        def __matmul__(self, other: Card) -> torch.Tensor:
            if computes is None:
                raise RuntimeError("CUDA error: unknown\nmore")
            return computes()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch, "ones", lambda *size, device="cpu": Card())
    found = look()["GPU"]
    assert found.level == level
    assert said in found.seen


def server_checks(kits: Path, state: Path, **changes: object) -> dict[str, Check]:
    control = free_port()
    given = {"host": "127.0.0.1", "control": control, "health": f"127.0.0.1:{free_port()}"}
    found = server_preflight(kits / "server", state, **{**given, "running": False, **changes})
    return {check.name: check for check in found}


def test_healthy_coordinator_passes_all_checks(kits: Path, tmp_path: Path) -> None:
    checks = server_checks(kits, tmp_path / "state")
    assert list(checks) == [
        *("kit", "versions", "certificate", "sites", "state", "disk", "memory", "shm"),
        *("database", "DNS", "proxy", "public port", "control port", "health port"),
    ]
    assert {check.level for check in checks.values()} == {"OK"}
    assert "public port" not in server_checks(kits, tmp_path / "state", running=True)


def test_duplicate_port_numbers_fail(kits: Path, tmp_path: Path) -> None:
    public, control = read_federation(kits / "server" / "federation.yaml").server.port, free_port()
    found = server_checks(kits, tmp_path, control=public)["control port"]
    assert (found.level, found.seen) == ("fail", f"{public} is also the public port")
    for port, of in ((public, "public"), (control, "control")):
        address = f"127.0.0.1:{port}"
        found = server_checks(kits, tmp_path, control=control, health=address)["health port"]
        assert (found.level, found.seen) == (
            "fail",
            f"{address}: its number is also the {of} port",
        )


def test_server_preflight_reports_database_and_certificate_faults(
    kits: Path, tmp_path: Path, monkeypatch, cli
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "state.db").write_bytes(b"SQLite format 3\0" + b"rubbish" * 1000)
    found = server_checks(kits, state)["database"]
    assert found.level == "fail"
    assert "restore a backup" in found.advice
    monkeypatch.setattr(
        "polyclinic.server.deployment.preflight.now_utc", lambda: now_utc() + timedelta(days=340)
    )
    checks = server_checks(kits, state)
    assert checks["certificate"].level == checks["sites"].level == "warn"
    assert "--renew site-a --renew site-b" in checks["sites"].advice
    monkeypatch.setattr(
        "polyclinic.server.deployment.preflight.now_utc", lambda: now_utc() + timedelta(days=400)
    )
    assert server_checks(kits, state)["certificate"].level == "fail"
    other = tmp_path / "other"
    provision(federation(), other)
    (kits / "server" / "server.key").write_bytes((other / "server" / "server.key").read_bytes())
    assert "files of two different kits" in server_checks(kits, state)["certificate"].seen
    (kits / "server" / "sites" / "site-b.crt").unlink()
    status, out, _ = cli(
        *("server", "preflight", "--kit", kits / "server", "--state", state, "--json", "--running")
    )
    assert status == 1
    assert json.loads(out)["ok"] is False
    (kits / "server" / "federation.yaml").unlink()
    assert list(server_checks(kits, state)) == ["kit"]


def test_unreachable_coordinator_is_unhealthy(kits: Path) -> None:
    assert "does not answer" in server_health(kits / "server", f"127.0.0.1:{free_port()}")
