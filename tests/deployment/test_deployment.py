"""A real coordinator and real sites from generated kits, and unauthorised access attempts.

Processes over TLS, started as in docs/deploy.md without containers;
tests/deployment/test_containers.py tests the containers.
tests/server/deployment/test_site_auth.py and tests/client/node/test_supernode.py test the parts.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from polyclinic.client.node.preflight import preflight
from polyclinic.client.node.supernode import probe_registration
from polyclinic.configs import VERSION
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.federation import FederationConfig
from polyclinic.configs.security.credentials import read_certificate, read_private_key
from polyclinic.server.deployment.authority import Authority, new_key, pem, private_openssh
from polyclinic.server.deployment.provision import provision
from polyclinic.server.deployment.site_auth import MAX_BODY, MAX_CONNECTIONS, PATIENCE_S
from polyclinic.server.runs.folder import RunFolder
from polyclinic.server.runs.history import read_history
from tests.consortium import Consortium
from tests.factories import ABOUT_REQUEST, ENDLESS_HEAD, PRIVATE, UPGRADE, read_all, send, signed
from tests.faults.deployment import events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    made = Consortium(tmp_path_factory.mktemp("consortium"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def submit(place: Consortium, name: str, **changes: float | str) -> RunFolder:
    """Submit a run of one round with a deadline long enough for the attacks on a busy machine."""
    return place.submit(name, rounds__count=1, rounds__deadline_s=300.0, **changes)


def url(place: Consortium, path: str) -> str:
    return f"https://127.0.0.1:{place.port}{path}"


def post(place: Consortium, path: str, headers: dict, content: bytes = b"") -> httpx.Response:
    context = ssl.create_default_context(cafile=str(place.kits / "server" / "ca.crt"))
    kind = {"content-type": "application/protobuf"}
    with httpx.Client(verify=context, timeout=20) as client:
        return client.post(url(place, path), headers={**kind, **headers}, content=content)


def tls(place: Consortium) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(place.kits / "server" / "ca.crt"))
    raw = socket.create_connection(("127.0.0.1", place.port), 20)
    return context.wrap_socket(raw, server_hostname="127.0.0.1")


def node_of(place: Consortium, key) -> tuple[FleetHttpClient, bytes]:
    client = FleetHttpClient.from_server_address(
        f"127.0.0.1:{place.port}",
        False,
        (place.kits / "server" / "ca.crt").read_bytes(),
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
    )
    return client, public_key_to_bytes(key.public_key())


def test_run_completes_despite_unauthorised_access_attempts(consortium: Consortium) -> None:
    """The first run from kits; all access attempts happen while its first round is paused."""
    place = consortium
    place.fault("site-1.train.1.received", "wait")
    folder = submit(place, "attacked", rounds__min_sites="all")
    place.reached("site-1.train.1.received")
    an_unregistered_key(place)
    a_site_that_speaks_for_another(place)
    a_request_of_ten_minutes_ago(place)
    a_message_far_too_large(place)
    no_tls(place)
    another_authority(place)
    an_expired_kit(place)
    a_second_coordinator(place)
    a_copied_kit_with_another_name(place)
    connections_that_never_say_anything(place)
    flowers_starter_of_server_apps_ends(place)
    place.go("site-1.train.1.received")
    outcome = place.outcome(folder)
    assert outcome["status"] == "completed", outcome
    tested = {
        line.site: line.metrics for line in read_history(folder.history) if line.split == "test"
    }
    assert set(tested) == {"site-1", "site-2", "pooled"}
    assert all(metrics is not None for metrics in tested.values())
    assert not [e for e in events(folder) if e["event"] == "joined"]
    assert place.well("server")
    assert place.well("site-1")
    told = place.status()["site-1"]
    assert told["status"] == "online"
    assert set(told["versions"]) == {"polyclinic", "flwr", "torch", "release"}


def an_unregistered_key(place: Consortium) -> None:
    key = new_key()
    client, public = node_of(place, key)
    with client, pytest.raises(httpx.HTTPStatusError) as refused:
        client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30))
    assert refused.value.response.status_code == 401
    assert "is not registered: unknown, revoked or superseded" in place.log("superlink")


def a_site_that_speaks_for_another(place: Consortium) -> None:
    key = read_private_key(place.kits / "sites" / "site-2" / "site.key")
    client, _ = node_of(place, key)
    (other,) = re.findall(r"SuperNode ID: (\d+)", place.log("site-1"))[-1:]
    with client, pytest.raises(httpx.HTTPStatusError) as refused:
        client.PullMessages(PullMessagesRequest(node=Node(node_id=int(other))))
    assert refused.value.response.status_code == 401
    assert "Invalid SuperNode authentication" in refused.value.response.text


def a_request_of_ten_minutes_ago(place: Consortium) -> None:
    key = read_private_key(place.kits / "sites" / "site-1" / "site.key")
    (own,) = re.findall(r"SuperNode ID: (\d+)", place.log("site-1"))[-1:]
    body = PullMessagesRequest(node=Node(node_id=int(own))).SerializeToString()
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=10)
    answer = post(place, "/v1/fleet/pull-messages", signed(key, then), body)
    assert answer.status_code == 401
    assert post(place, "/v1/fleet/pull-messages", signed(key), body).status_code == 200


def a_message_far_too_large(place: Consortium) -> None:
    key = read_private_key(place.kits / "sites" / "site-1" / "site.key")
    headers = {**signed(key), "content-length": str(MAX_BODY + 1).encode(), "host": b"x"}
    lines = b"".join(name.encode() + b": " + value + b"\r\n" for name, value in headers.items())
    with tls(place) as connection:
        connection.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\n" + lines + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def no_tls(place: Consortium) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{place.port}/v1/polyclinic/about", timeout=10)


def another_authority(place: Consortium) -> None:
    """Check that a site with kits of another federation refuses this server."""
    others = place.folder / "others"
    config = FederationConfig.model_validate(
        {
            "name": "others",
            "server": {"address": "127.0.0.1", "port": place.port},
            "sites": [{"name": "site-1"}],
        }
    )
    provision(config, others)
    stranger = others / "sites" / "site-1" / "site.yaml"
    stranger.write_text(stranger.read_text().replace("/var/lib/", f"{others}/"))
    found = {check.name: check for check in preflight(stranger, DataConfig(), probe_registration)}
    assert found["TLS"].level == "fail"
    assert "this is not the coordinator of the kit" in found["TLS"].advice


def an_expired_kit(place: Consortium) -> None:
    """Check that a site with an expired kit does not start and that the server rejects its key."""
    place.provision([*place.names, "late"])
    site_file = place.copy_kit("site-2", "expired")
    authority = Authority(
        read_private_key(place.kits / "authority" / "ca.key"),
        read_certificate(place.kits / "authority" / "ca.crt"),
    )
    key = new_key()
    certificate = authority.issue_site("late", key.public_key(), days=0)
    (site_file.parent / "site.crt").write_bytes(pem(certificate))
    (site_file.parent / "site.key").write_bytes(private_openssh(key))
    site_file.write_text(site_file.read_text().replace("name: site-2", "name: late"))
    registered = place.kits / "server" / "sites" / "late.crt"
    registered.write_bytes(pem(certificate))
    try:
        time.sleep(3)  # until the registry is read again
        status, said = place.polyclinic("site", "start", site_file, "--health", "127.0.0.1:1")
        assert status == 2
        assert re.search(r"fail +kit +it expired on ", said)
        assert "ask the coordinator for a new kit" in said
        answer = post(place, "/v1/fleet/pull-messages", signed(key))
        assert answer.status_code == 401
        assert "the key of site late expired on " in answer.text
    finally:
        place.provision(place.names)


def a_second_coordinator(place: Consortium) -> None:
    """Check that nobody can start runs, register sites or acquire tasks through the public port."""
    key = read_private_key(place.kits / "sites" / "site-1" / "site.key")
    for path in ("control/start-run", "control/register-node", "runtime/acquire-task"):
        assert post(place, f"/v1/{path}", signed(key)).status_code == 404
    home = place.folder / "intruder"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "polyclinic"\n[superlink.polyclinic]\naddress = '
        f'"127.0.0.1:{place.port}"\nroot-certificates = "{place.kits / "server" / "ca.crt"}"\n'
    )
    own = place.environment["FLWR_HOME"]
    place.environment["FLWR_HOME"] = str(home)
    try:
        with pytest.raises(AssertionError, match="404"):
            place.flwr("run", str(place.app), "polyclinic")
    finally:
        place.environment["FLWR_HOME"] = own


def a_copied_kit_with_another_name(place: Consortium) -> None:
    site_file = place.copy_kit("site-2", "posing")
    site_file.write_text(site_file.read_text().replace("name: site-2", "name: site-1"))
    found = {check.name: check for check in preflight(site_file, DataConfig(), probe_registration)}
    assert found["kit"].level == "fail"
    assert found["kit"].seen == "the kit belongs to site site-2, site.yaml says site-1"


def connections_that_never_say_anything(place: Consortium) -> None:
    held = []
    for _ in range(100):
        held.append(tls(place))
        held[-1].sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    assert place.well("server")
    began = time.monotonic()
    for connection in held:
        connection.settimeout(PATIENCE_S + 10)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        connection.close()
    assert time.monotonic() - began < PATIENCE_S + 10


def flowers_starter_of_server_apps_ends(place: Consortium) -> None:
    """Kill the process that starts server apps: it is replaced, and the current run continues."""
    (first,) = place.starters()
    first.kill()
    place.wait_for(lambda: place.starters() not in ([], [first]), 60, "another one is there")
    assert "flower-superexec ended (signal 9); no run can start until" in place.log("superlink")


def test_coordinator_under_endless_heads_and_upgrades_serves_its_sites(
    consortium: Consortium,
) -> None:
    """Two attacks without a key that once blocked the port for all sites."""
    place = consortium
    began = threading.Barrier(5)

    def send_endless_head() -> bool:
        """Return whether the coordinator closed the connection before it received 50 MB."""
        with tls(place) as connection:
            connection.sendall(ENDLESS_HEAD)
            began.wait(60)
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                for _ in range(50):
                    connection.sendall(b"a" * 1_000_000)
                return False
        return True

    def seconds_to_answer() -> float:
        asked = time.monotonic()
        with tls(place) as connection:
            connection.sendall(ABOUT_REQUEST)
            assert read_all(connection).startswith(b"HTTP/1.1 200")
        return time.monotonic() - asked

    with ThreadPoolExecutor(4) as attackers:
        attacks = [attackers.submit(send_endless_head) for _ in range(4)]
        began.wait(60)
        slowest = seconds_to_answer()
        while not all(attack.done() for attack in attacks):
            slowest = max(slowest, seconds_to_answer())
    assert all(attack.result() for attack in attacks)
    assert slowest < 1

    for _ in range(MAX_CONNECTIONS + 1):
        with tls(place) as connection:
            send(connection, UPGRADE % b"websocket")
            assert read_all(connection).startswith(b"HTTP/1.1 400")
    assert seconds_to_answer() < 1
    assert place.online() == set(place.names)


def test_release_with_a_modified_policy_check_is_not_run(consortium: Consortium) -> None:
    """The coordinator ships code without the policy check; it does not run before its approval."""
    place = consortium
    evil = place.folder / "evil"
    shutil.copytree(place.app, evil)
    gate = evil / "client" / "policy" / "site_policy.py"
    gate.write_text(gate.read_text().replace("policy.evaluation", "True"))
    marker = place.folder / "evil-ran"
    apps = evil / "apps.py"
    text = apps.read_text()
    apps.write_text(f'{text}\nif "clientapp" in " ".join(__import__("sys").argv):\n'
                    f'    __import__("pathlib").Path({str(marker)!r}).touch()\n')  # fmt: skip
    packed = place.pack(evil)
    app, place.app = place.app, evil
    try:
        folder = submit(place, "evil")
    finally:
        place.app = app
    outcome = place.outcome(folder)
    assert outcome["status"] == "refused", outcome
    assert "release not approved: this site has not approved release " in outcome["reason"]
    assert not marker.exists()
    digest = re.findall(r"approved release ([0-9a-f]{64})", outcome["reason"])[0]
    for name in place.names:
        assert f"this site has not approved release {digest}" in place.log(name)
    status, said = place.polyclinic(
        *("site", "approve", place.site_file("site-1"), packed, "--brief", "--yes")
    )
    assert status == 0
    assert f"release {digest}" in said
    assert re.search("changed +client/policy/site_policy.py", said)
    place.polyclinic("site", "approve", place.site_file("site-1"), "--withdraw", digest)


@pytest.mark.long  # in CI, tests/server/deployment/test_site_auth.py tests a revoked key
def test_revoked_site_is_disconnected_and_returns_with_a_new_kit(
    consortium: Consortium,
) -> None:
    place = consortium
    place.fault("site-1.train.1.received", "wait")
    folder = submit(place, "revoked")
    place.reached("site-1.train.1.received")
    assert "site-2: removed" in place.provision(["site-1"])
    place.wait_for(lambda: place.online() == {"site-1"}, 60, "site-2 is cut off")
    place.wait_for(
        lambda: "the coordinator does not accept this site's key" in place.log("site-2"),
        *(90, "site-2 says why"),
    )
    place.kill(place.nodes["site-2"])
    place.go("site-1.train.1.received")
    outcome = place.outcome(folder)
    assert outcome["status"] == "completed", outcome
    assert "site-2: added" in place.provision(["site-1", "site-2"])
    place.fill_in("site-2")
    place.start_site("site-2")
    place.wait_for(lambda: place.online() == {"site-1", "site-2"}, 90, "site-2 is back")


def test_backup_of_a_running_coordinator_can_be_restored(
    consortium: Consortium, tmp_path: Path
) -> None:
    place = consortium
    archive = tmp_path / "backup.tar.gz"
    status, said = place.polyclinic("server", "backup", archive, "--state", place.state)
    assert status == 0, said
    assert archive.stat().st_mode & 0o077 == 0
    status, said = place.polyclinic("server", "restore", archive, "--state", tmp_path / "new")
    assert status == 0, said
    attacked = RunFolder(tmp_path / "new" / "runs" / "attacked")
    if attacked.path.is_dir():
        assert attacked.read_outcome()["status"] == "completed"
    assert (tmp_path / "new" / "state.db").is_file()
    assert place.polyclinic("server", "restore", archive, "--state", tmp_path / "new")[0] == 2
    assert place.polyclinic("server", "backup", archive, "--state", place.state)[0] == 2


def test_newer_patch_release_runs_and_newer_minor_is_refused(
    consortium: Consortium,
) -> None:
    """Sites keep their version and approve newer releases.

    The one that runs trains privately, and the coordinator sees the remaining budgets.
    """
    place = consortium
    major, minor, _ = VERSION.split(".")
    newer, further = f"{major}.{minor}.99", f"{major}.{int(minor) + 1}.0"
    private = {key: value for key, value in PRIVATE.items() if key != "rounds__count"}
    for name in place.names:
        place.fill_in(
            name,
            cohort={"examples": 20, "patients": 18},
            budget={"epsilon": 50, "delta": 0.001, "unit": "patient"},
            data={
                "classes": ["benign", "malignant"],
                "mask-classes": ["lesion"],
                "val-fraction": PRIVATE["data__val_fraction"],
                "test-fraction": 0.2,
            },
        )
    app = place.app
    outcomes = {}
    try:
        for version in (further, newer):
            place.app = of_version(version, app)
            packed = place.pack(place.app)
            for name in place.names:
                where = place.site_file(name)
                assert (
                    place.polyclinic("site", "approve", where, packed, "--brief", "--yes")[0] == 0
                )
            folder = submit(place, f"release-{version}", **private)
            outcomes[version] = place.outcome(folder)
    finally:
        place.app = app
    assert outcomes[further]["status"] == "refused", outcomes[further]
    told = f"its version is {further}, this site has {VERSION}; major and minor versions of"
    assert told in outcomes[further]["reason"]
    assert outcomes[newer]["status"] == "completed", outcomes[newer]
    lines = {x.site: x for x in read_history(folder.history) if x.split == "val"}
    for name, site in place.status().items():
        assert site["versions"]["polyclinic"] == newer
        assert site["epsilon_spent"] == lines[name].train.epsilon > 0
        assert site["epsilon_left"] == 50 - site["epsilon_spent"]


def of_version(version: str, app: Path) -> Path:
    """Copy an app with another version number."""
    other = app.parent / f"app-{version}".replace(".", "-")
    shutil.copytree(app, other)
    for file in (other / "pyproject.toml", other / "configs" / "__init__.py"):
        text = file.read_text()
        assert text.count(f'"{VERSION}"') == 1
        file.write_text(text.replace(f'"{VERSION}"', f'"{version}"'))
    return other
