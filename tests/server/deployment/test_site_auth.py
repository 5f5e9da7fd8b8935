"""The coordinator's public port: site authentication and limits on requests.

tests/deployment/test_deployment.py tests the same with real processes over TLS.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.superlink import extensions, main
from flwr.superlink.cli import flower_superlink
from flwr.superlink.routers.control.router import router as control_router
from flwr.superlink.routers.fleet.router import router as fleet_router

import polyclinic.server.deployment.site_auth
import polyclinic.server.deployment.superlink
from polyclinic.configs.diagnostics.network import ABOUT
from polyclinic.configs.ports import free_port
from polyclinic.configs.security.credentials import Validity, read_private_key
from polyclinic.server.deployment.provision import provision
from polyclinic.server.deployment.registry import Registry
from polyclinic.server.deployment.site_auth import (
    MAX_BODY,
    MAX_CONNECTIONS,
    MAX_HEAD,
    IdleTimeout,
    SiteAuthMiddleware,
)
from polyclinic.server.deployment.superlink import (
    Endpoints,
    Node,
    Registrar,
    write_connection,
)
from tests.factories import ABOUT_REQUEST, ENDLESS_HEAD, UPGRADE, federation, read_all, send, signed

PUBLIC, PRIVATE = 9092, 9093


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    provision(federation(), tmp_path / "kits")
    return tmp_path / "kits"


@pytest.fixture
def registry(kits: Path) -> Registry:
    return Registry(kits / "server")


class Inside:
    """The application behind the middleware; records the requests that reach it."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.got = 0

    async def __call__(self, scope, receive, send) -> None:
        self.paths.append(scope["path"])
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            self.got += len(message["body"])
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})


def ask(
    door: SiteAuthMiddleware,
    path: str,
    headers: dict[str, bytes] | None = None,
    port: int = PUBLIC,
    body: tuple[bytes, ...] = (b"",),
    kind: str = "http",
) -> tuple[int, bytes]:
    parts = [
        {"type": "http.request", "body": part, "more_body": i + 1 < len(body)}
        for i, part in enumerate(body)
    ]
    sent: list[dict] = []

    async def receive() -> dict:
        return parts.pop(0)

    async def send(message) -> None:
        sent.append(message)

    scope = {
        "type": kind,
        "path": path,
        "server": ("0.0.0.0", port),
        "client": ("203.0.113.7", 40000),
        "headers": [(k.lower().encode(), v) for k, v in (headers or {}).items()],
    }
    asyncio.run(door(scope, receive, send))
    if not sent:
        return 0, b""
    return sent[0]["status"], sent[1]["body"]


def key_of(kits: Path, site: str) -> ec.EllipticCurvePrivateKey:
    return read_private_key(kits / "sites" / site / "site.key")


def test_flower_startup_hooks_match_the_middleware() -> None:
    """Fails when a new version of Flower changes what superlink.py and site_auth.py use."""
    assert "extensions.get_middleware()" in inspect.getsource(main._get_middleware)
    assert main.extensions is extensions
    module = inspect.getmodule(flower_superlink)
    started = inspect.getsource(module._run_superlink_http_api)
    assert "uvicorn.run(\n        app=fastapi_app," in started
    assert "create_app(lifespan_config, SuperLinkLifespan)" in started
    fleet = {route.path for route in fleet_router.routes}
    assert fleet
    assert all(path.startswith(polyclinic.server.deployment.site_auth.FLEET) for path in fleet)
    assert all(path.startswith("/v1/control/") for path in (r.path for r in control_router.routes))


def test_registered_site_is_admitted(kits: Path, registry: Registry) -> None:
    inside = Inside()
    door = SiteAuthMiddleware(inside, registry, PUBLIC)
    headers = signed(key_of(kits, "site-a"))
    assert ask(door, "/v1/fleet/pull-messages", headers, body=(b"ab", b"c")) == (200, b"inside")
    assert inside.paths == ["/v1/fleet/pull-messages"]
    assert inside.got == 3


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/start-run",
        "/V1/control/start-run",
        "//v1/control/start-run",
        "/docs",
        "/openapi.json",
        "/health",
        "/",
    ],
)
def test_paths_not_for_sites_return_404(kits: Path, registry, path: str) -> None:
    """This holds for registered sites, too."""
    inside = Inside()
    door = SiteAuthMiddleware(inside, registry, PUBLIC)
    status, _ = ask(door, path, signed(key_of(kits, "site-a")))
    if path.startswith("/v1/fleet/"):  # Starlette does not resolve dots, so no route has this path
        assert inside.paths == [path]
        assert path not in {route.path for route in (*fleet_router.routes, *control_router.routes)}
        return
    assert status == 404
    assert inside.paths == []


def test_coordinator_on_loopback_reaches_every_path(registry: Registry) -> None:
    inside = Inside()
    door = SiteAuthMiddleware(inside, registry, PUBLIC)
    assert ask(door, "/v1/control/start-run", port=PRIVATE) == (200, b"inside")
    assert ask(door, "/v1/control/start-run", port=PUBLIC)[0] == 404


def test_unauthorised_requests_are_refused_with_reason(kits: Path, registry, caplog) -> None:
    inside = Inside()
    door = SiteAuthMiddleware(inside, registry, PUBLIC)
    door._log_refused = lambda scope, reason: logging.warning(reason)  # log every refusal
    unknown = ec.generate_private_key(ec.SECP384R1())
    good = signed(key_of(kits, "site-a"))
    other = signed(key_of(kits, "site-b"))
    for headers, said in (
        ({}, "the request has no valid key of a site"),
        (
            {**good, FLEET_HTTP_PUBLIC_KEY_HEADER: b"rubbish"},
            "the request has no valid key of a site",
        ),
        (signed(unknown), "is not registered: unknown, revoked or superseded"),
        (
            {**good, FLEET_HTTP_PUBLIC_KEY_HEADER: other[FLEET_HTTP_PUBLIC_KEY_HEADER]},
            "the request's signature is invalid",
        ),
        ({**good, TIMESTAMP_HEADER: b"2020-01-01"}, "the request's signature is invalid"),
    ):
        status, body = ask(door, "/v1/fleet/pull-messages", headers)
        assert status == 401
        assert said in json.loads(body)["message"]
        assert said in caplog.text
    assert inside.paths == []


def test_malformed_credentials_are_refused(kits: Path, registry) -> None:
    inside = Inside()
    door = SiteAuthMiddleware(inside, registry, PUBLIC)
    odd = signed(ec.generate_private_key(ec.SECP256K1()))  # a curve that no site uses
    assert ask(door, "/v1/fleet/x", odd)[0] == 401
    good = signed(key_of(kits, "site-a"))
    endless = {**good, "content-length": b"9" * 5000}  # more digits than Python converts
    assert ask(door, "/v1/fleet/x", endless)[0] == 413
    name = FLEET_HTTP_PUBLIC_KEY_HEADER
    twice = {name.upper(): signed(ec.generate_private_key(ec.SECP384R1()))[name], **good}
    assert ask(door, "/v1/fleet/x", twice)[0] == 401  # Flower would use the first
    assert inside.paths == []


def test_revoked_and_expired_sites_are_refused_immediately(
    kits: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyclinic.server.deployment.registry.LOOK_S", 0.0)
    door = SiteAuthMiddleware(Inside(), registry, PUBLIC)
    a, b = key_of(kits, "site-a"), key_of(kits, "site-b")
    assert ask(door, "/v1/fleet/x", signed(b))[0] == 200
    provision(federation("site-a"), kits)
    assert ask(door, "/v1/fleet/x", signed(b))[0] == 401
    assert ask(door, "/v1/fleet/x", signed(a))[0] == 200
    past = datetime.now(UTC) - timedelta(days=2)
    monkeypatch.setattr(
        "polyclinic.server.deployment.registry.validity_of",
        lambda certificate: Validity(past, past),
    )
    (kits / "server" / "sites" / "site-a.crt").touch()
    status, body = ask(door, "/v1/fleet/x", signed(a))
    assert status == 401
    assert f"the key of site site-a expired on {past:%Y-%m-%d}" in json.loads(body)["message"]


def test_body_size_is_limited_with_and_without_content_length(kits: Path, registry) -> None:
    inside = Inside()
    door = SiteAuthMiddleware(inside, registry, PUBLIC)
    headers = signed(key_of(kits, "site-a"))
    for length in (str(MAX_BODY + 1).encode(), b"-1", b"1e9", b""):
        assert ask(door, "/v1/fleet/push-object", {**headers, "content-length": length})[0] == 413
    assert inside.paths == []
    part = b"x" * (MAX_BODY // 4 + 1)
    assert ask(door, "/v1/fleet/push-object", headers, body=(part,) * 5) == (0, b"")
    assert inside.got <= MAX_BODY


def test_about_endpoint_shows_only_time_and_versions(registry: Registry) -> None:
    status, body = ask(SiteAuthMiddleware(Inside(), registry, PUBLIC), ABOUT)
    assert status == 200
    assert set(json.loads(body)) == {"time", "polyclinic", "flwr"}
    assert ask(SiteAuthMiddleware(Inside(), registry, PUBLIC), ABOUT, kind="websocket") == (0, b"")


def test_repeated_refusals_are_logged_once(registry: Registry, caplog) -> None:
    door = SiteAuthMiddleware(Inside(), registry, PUBLIC)
    for _ in range(100):
        ask(door, "/v1/control/start-run")
    assert caplog.text.count("refused a request from 203.0.113.7") == 1


class SuperLink:
    """The part of Flower's control client that a registrar uses."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}

    def RegisterNode(self, request) -> None:  # noqa: N802 - Flower's name
        line = polyclinic.server.deployment.superlink._line(request.public_key)
        assert line not in {node.public_key for node in self.nodes.values()}  # as Flower does
        number = len(self.nodes) + 1
        self.nodes[number] = Node(number, request.name, line, "registered", "")

    def UnregisterNode(self, request) -> None:  # noqa: N802
        node = self.nodes[request.node_id]
        self.nodes[request.node_id] = Node(
            node.identity, node.name, node.public_key, "unregistered", ""
        )

    def standing(self) -> list[tuple[str, str]]:
        return [(node.name, node.status) for node in self.nodes.values()]


def test_superlink_nodes_follow_the_registry(kits: Path, registry, monkeypatch, caplog) -> None:
    monkeypatch.setattr("polyclinic.server.deployment.registry.LOOK_S", 0.0)
    monkeypatch.setattr(
        polyclinic.server.deployment.superlink,
        "list_nodes",
        lambda client: [*client.nodes.values()],
    )
    superlink, registrar = SuperLink(), Registrar(registry)
    registrar.bring_in_step(superlink)
    registrar.bring_in_step(superlink)
    assert superlink.standing() == [("site-a", "registered"), ("site-b", "registered")]
    provision(federation(), kits, renew=["site-b"])
    registrar.bring_in_step(superlink)
    assert superlink.standing() == [
        *(("site-a", "registered"), ("site-b", "unregistered"), ("site-b", "registered"))
    ]
    aside = (kits / "server" / "sites" / "site-a.crt").read_bytes()
    provision(federation("site-b"), kits)
    registrar.bring_in_step(superlink)
    assert superlink.standing()[0] == ("site-a", "unregistered")
    left_behind = kits / "server" / "sites" / "site-a.crt"
    left_behind.write_bytes(aside)  # as when a kit is copied over an older one
    registrar.bring_in_step(superlink)
    assert superlink.standing()[0] == ("site-a", "unregistered")
    assert "site-a.crt: ignored, expected NAME.crt of a site in federation.yaml" in caplog.text
    provision(federation(), kits)
    left_behind.write_bytes(aside)
    registrar.bring_in_step(superlink)
    registrar.bring_in_step(superlink)
    assert superlink.standing()[0] == ("site-a", "unregistered")
    assert (
        caplog.text.count("site site-a: its key was revoked before and cannot be used again") == 1
    )


def test_coordinator_connection_uses_loopback_and_tls(tmp_path: Path) -> None:
    write_connection(tmp_path / "flwr", 9093, tmp_path / "ca.crt")
    text = (tmp_path / "flwr" / "config.toml").read_text()
    assert 'address = "127.0.0.1:9093"' in text
    assert f'root-certificates = "{tmp_path / "ca.crt"}"' in text
    assert "insecure" not in text


class Connections(set[IdleTimeout]):
    """The server's open connections, with a wait for their end."""

    def __init__(self) -> None:
        super().__init__()
        self.added = 0
        self._changed = threading.Condition()

    def add(self, connection: IdleTimeout) -> None:
        with self._changed:
            super().add(connection)
            self.added += 1
            self._changed.notify_all()

    def discard(self, connection: IdleTimeout) -> None:
        with self._changed:
            super().discard(connection)
            self._changed.notify_all()

    def all_ended(self, added: int) -> bool:
        """Wait until the given number of connections was counted and all of them have ended."""
        with self._changed:
            return self._changed.wait_for(lambda: self.added >= added and not self, 10)


@dataclass(frozen=True)
class Served:
    """uvicorn with both ports over TLS, in a thread, serving the application ``inside``."""

    public: int
    private: int
    authority: Path
    inside: Inside
    connections: Connections

    def connect(self, port: int | None = None, seconds: float = 10.0) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.authority))
        context.check_hostname = False
        raw = socket.create_connection(("127.0.0.1", port or self.public), seconds)
        return context.wrap_socket(raw)

    def exchange(self, data: bytes, port: int | None = None) -> bytes:
        """Send data and read until the server closes the connection."""
        with self.connect(port) as connection:
            send(connection, data)
            return read_all(connection)


@pytest.fixture
def served(kits: Path, registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    connections, inside, kit = Connections(), Inside(), kits / "server"
    monkeypatch.setattr(IdleTimeout, "_open", connections)
    monkeypatch.setattr(IdleTimeout, "_logged", {})
    doors = Endpoints("127.0.0.1", free_port(), free_port(), "", registry)
    options = {
        **{"host": "127.0.0.1", "port": doors.control, "lifespan": "off", "log_config": None},
        **{"ssl_keyfile": kit / "server.key", "ssl_certfile": kit / "server.crt"},
        "timeout_graceful_shutdown": 5,
    }
    app = SiteAuthMiddleware(inside, registry, doors.port)
    running, sockets = polyclinic.server.deployment.superlink._server(app, doors, options)
    running.config.load()  # here, so that its errors fail the test
    for each in sockets:
        each.listen()  # so that clients need not wait for the thread
    thread = threading.Thread(target=running.run, kwargs={"sockets": sockets})
    thread.start()
    yield Served(doors.port, doors.control, kit / "ca.crt", inside, connections)
    running.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def about_request_of(size: int) -> bytes:
    return ENDLESS_HEAD + b"a" * (size - len(ENDLESS_HEAD) - 4) + b"\r\n\r\n"


def signed_request(kits: Path, *lines: bytes) -> bytes:
    """Return the head of a site's request."""
    headers = [
        name.encode() + b": " + value for name, value in signed(key_of(kits, "site-a")).items()
    ]
    first = b"POST /v1/fleet/push-object HTTP/1.1"
    return b"\r\n".join([first, b"Host: x", *headers, *lines, b"", b""])


def test_request_head_at_the_limit_is_served(served: Served) -> None:
    request = about_request_of(MAX_HEAD)
    assert len(request) == MAX_HEAD
    assert served.exchange(request).startswith(b"HTTP/1.1 200")


def test_request_head_over_the_limit_is_closed(served: Served, caplog) -> None:
    assert served.exchange(about_request_of(MAX_HEAD + 1)) == b""
    assert served.exchange(b"\r\n" * MAX_HEAD) == b""
    assert caplog.text.count("closed a connection from 127.0.0.1: expected at most") == 1


def test_request_head_over_the_limit_is_served_on_loopback(served: Served) -> None:
    request = about_request_of(3 * MAX_HEAD)
    answer = served.exchange(request[:-2] + b"Connection: close\r\n\r\n", served.private)
    assert answer.startswith(b"HTTP/1.1 200")
    assert served.connections.added == 0


@pytest.mark.parametrize("earlier_requests", [0, 1])
def test_request_head_trickled_too_long_is_closed(
    served: Served, kits: Path, monkeypatch, earlier_requests: int
) -> None:
    monkeypatch.setattr("polyclinic.server.deployment.site_auth.HEAD_S", 1.0)
    with served.connect() as connection:
        for _ in range(earlier_requests):
            connection.sendall(signed_request(kits, b"Content-Length: 0"))
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            while not connection.recv(65536).endswith(b"0\r\n\r\n"):
                pass
        began = time.monotonic()
        connection.sendall(ENDLESS_HEAD)
        while not select.select([connection], [], [], 0.2)[0]:
            assert time.monotonic() - began < 6
            send(connection, b"a")
        assert read_all(connection) == b""
    assert time.monotonic() - began > 0.5


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(b"1;" + b"x" * MAX_HEAD * 2, id="one-extension"),
        pytest.param((b"1;" + b"x" * 1000 + b"\r\na\r\n") * 200, id="many-extensions"),
        pytest.param(b"1\r\na\r\n" * 40_000, id="tiny-chunks"),
        pytest.param(b"0\r\nX: " + b"x" * MAX_HEAD * 2, id="one-trailer"),
        pytest.param(b"0\r\n" + b"X: x\r\n" * 40_000, id="many-trailers"),
    ],
)
def test_chunk_overhead_over_the_limit_is_closed(served: Served, kits: Path, flood: bytes) -> None:
    head = signed_request(kits, b"Transfer-Encoding: chunked")
    assert served.exchange(head + flood) == b""
    assert served.connections.all_ended(1)


def test_about_during_endless_heads_answers_within_a_second(served: Served) -> None:
    began = threading.Barrier(5)

    def attack() -> bool:
        """Return whether the server closed the connection before 50 MB and 20 s."""
        ends = time.monotonic() + 20
        with served.connect() as connection:
            connection.sendall(ENDLESS_HEAD)
            began.wait()
            with suppress(ConnectionError, ssl.SSLError):
                for _ in range(50):
                    connection.sendall(b"a" * 1_000_000)
                    if time.monotonic() > ends:
                        break
                return False
        return True

    with ThreadPoolExecutor(4) as attackers:
        attacks = [attackers.submit(attack) for _ in range(4)]
        began.wait()
        slowest = 0.0
        while True:
            asked = time.monotonic()
            assert served.exchange(ABOUT_REQUEST).startswith(b"HTTP/1.1 200")
            slowest = max(slowest, time.monotonic() - asked)
            if all(each.done() for each in attacks):
                break
    assert all(each.result() for each in attacks)
    assert slowest < 1


def reset(connection: ssl.SSLSocket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def break_tls(connection: ssl.SSLSocket) -> None:
    os.write(connection.fileno(), b"not a TLS record, and longer than the head of one")
    read_all(connection)


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda connection: None, id="closed"),
        pytest.param(lambda connection: connection.unwrap(), id="closed-in-order"),
        pytest.param(reset, id="reset"),
        pytest.param(break_tls, id="not-tls"),
        *(
            pytest.param(
                lambda connection, data=data: (send(connection, data), read_all(connection)),
                id=name,
            )
            for name, data in {
                "answered": ABOUT_REQUEST,
                "websocket": UPGRADE % b"websocket",
                "h2c": UPGRADE % b"h2c",
                "connect": b"CONNECT localhost:1 HTTP/1.1\r\nHost: x\r\n\r\n",
                "malformed": b"not HTTP\r\n\r\n",
                "large-head": ENDLESS_HEAD + b"a" * MAX_HEAD,
            }.items()
        ),
    ],
)
def test_connection_count_after_any_end_is_zero(served: Served, end) -> None:
    with served.connect() as connection:
        end(connection)
    assert served.connections.all_ended(1)


def test_refused_websocket_upgrades_release_their_connections(served: Served, caplog) -> None:
    for _ in range(MAX_CONNECTIONS + 1):
        answer = served.exchange(UPGRADE % b"websocket")
        assert answer.startswith(b"HTTP/1.1 400"), answer
    assert served.exchange(ABOUT_REQUEST).startswith(b"HTTP/1.1 200")
    assert served.connections.all_ended(MAX_CONNECTIONS + 2)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "a change of protocol from 127.0.0.1" in caplog.text


def test_malformed_requests_are_answered_and_logged_once(served: Served, caplog) -> None:
    for request in (b"not HTTP\r\n\r\n", b"GET \xff HTTP/1.1\r\n\r\n", b"GET / HTTP/9\r\n\r\n"):
        assert served.exchange(request).startswith(b"HTTP/1.1 400")
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


def test_upgrade_on_loopback_is_refused(served: Served) -> None:
    answer = served.exchange(UPGRADE % b"websocket", served.private)
    assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("limit", ["MAX_CONNECTIONS", "MAX_CONNECTIONS_EACH"])
@pytest.mark.parametrize("closing", [True, False])
def test_connections_that_are_closing_do_not_count_at_the_limit(
    served: Served, monkeypatch, limit: str, closing: bool
) -> None:
    monkeypatch.setattr(f"polyclinic.server.deployment.site_auth.{limit}", 2)
    aborted: list[int] = []
    for number in range(2):
        transport = SimpleNamespace(
            is_closing=lambda: closing, abort=lambda number=number: aborted.append(number)
        )
        other = type("Other", (), {"_address": "127.0.0.1", "transport": transport})()
        served.connections.add(other)
    answer = served.exchange(ABOUT_REQUEST)
    assert answer.startswith(b"HTTP/1.1 200") == closing
    assert sorted(aborted) == ([0, 1] if closing else [])


def test_pipelined_requests_are_all_served(served: Served, kits: Path) -> None:
    request = signed_request(kits, b"Content-Length: 3") + b"abc"
    last = signed_request(kits, b"Content-Length: 3", b"Connection: close") + b"abc"
    count = 3 * MAX_HEAD // len(request)  # together more than the limit of one head
    answer = served.exchange(request * count + last)
    assert answer.count(b"HTTP/1.1 200") == count + 1
    assert served.inside.got == 3 * (count + 1)


@pytest.mark.parametrize("chunk", [None, 4096])
def test_signed_body_of_5_mb_is_received(served: Served, kits: Path, chunk: int | None) -> None:
    body = os.urandom(5_000_000)
    if chunk is None:
        data = signed_request(kits, b"Connection: close", b"Content-Length: 5000000") + body
    else:
        parts = [body[at : at + chunk] for at in range(0, len(body), chunk)]
        data = signed_request(kits, b"Connection: close", b"Transfer-Encoding: chunked")
        data += b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    answer = served.exchange(data)
    assert answer.startswith(b"HTTP/1.1 200")
    assert served.inside.got == len(body)
