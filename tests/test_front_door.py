"""The coordinator's public port: registered sites reach what sites need; nobody reaches more.

tests/test_deployment.py has the same with real processes over TLS.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.superlink import extensions, main
from flwr.superlink.cli import flower_superlink
from flwr.superlink.routers.control.router import router as control_router
from flwr.superlink.routers.fleet.router import router as fleet_router

import server.superlink
from configs.credentials import Validity, read_private_key
from configs.reach import ABOUT
from server.provision import provision
from server.registry import Registry
from server.superlink import MOST_BODY, FrontDoor, Node, Registrar, write_connection
from tests.test_provision import federation

PUBLIC, PRIVATE = 9092, 9093


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    provision(federation(), tmp_path / "kits")
    return tmp_path / "kits"


@pytest.fixture
def registry(kits: Path) -> Registry:
    return Registry(kits / "server")


class Inside:
    """The SuperLink behind the door: what came through to it."""

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


def signed(key: ec.EllipticCurvePrivateKey, at: datetime | None = None) -> dict[str, bytes]:
    """A site's headers, as Flower's SuperNode makes them."""
    timestamp = (at or datetime.now(UTC)).isoformat()
    public = public_key_to_bytes(key.public_key())
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public),
        TIMESTAMP_HEADER: timestamp.encode(),
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(key, timestamp.encode())),
    }


def ask(
    door: FrontDoor,
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


def test_flower_is_started_where_the_door_is_hung() -> None:
    """Fails when a new Flower moves what server/superlink.py stands on."""
    assert "extensions.get_middleware()" in inspect.getsource(main._get_middleware)
    assert main.extensions is extensions
    module = inspect.getmodule(flower_superlink)
    started = inspect.getsource(module._run_superlink_http_api)
    assert "uvicorn.run(\n        app=fastapi_app," in started
    assert "create_app(lifespan_config, SuperLinkLifespan)" in started
    fleet = {route.path for route in fleet_router.routes}
    assert fleet
    assert all(path.startswith(server.superlink.FLEET) for path in fleet)
    assert all(path.startswith("/v1/control/") for path in (r.path for r in control_router.routes))


def test_a_registered_site_comes_in(kits: Path, registry: Registry) -> None:
    inside = Inside()
    door = FrontDoor(inside, registry, PUBLIC)
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
def test_what_is_not_for_sites_is_not_there(kits: Path, registry, path: str) -> None:
    """Not even for a registered site."""
    inside = Inside()
    door = FrontDoor(inside, registry, PUBLIC)
    status, _ = ask(door, path, signed(key_of(kits, "site-a")))
    if path.startswith("/v1/fleet/"):  # Starlette does not resolve dots: no route has this path
        assert inside.paths == [path]
        assert path not in {route.path for route in (*fleet_router.routes, *control_router.routes)}
        return
    assert status == 404
    assert inside.paths == []


def test_on_loopback_the_coordinator_reaches_everything(registry: Registry) -> None:
    inside = Inside()
    door = FrontDoor(inside, registry, PUBLIC)
    assert ask(door, "/v1/control/start-run", port=PRIVATE) == (200, b"inside")
    assert ask(door, "/v1/control/start-run", port=PUBLIC)[0] == 404


def test_strangers_are_turned_away_by_reason(kits: Path, registry, caplog) -> None:
    inside = Inside()
    door = FrontDoor(inside, registry, PUBLIC)
    door._tell = lambda scope, what: logging.warning(what)  # not only once in a while
    unknown = ec.generate_private_key(ec.SECP384R1())
    good = signed(key_of(kits, "site-a"))
    other = signed(key_of(kits, "site-b"))
    for headers, said in (
        ({}, "no key of a site in the request"),
        ({**good, FLEET_HTTP_PUBLIC_KEY_HEADER: b"rubbish"}, "no key of a site in the request"),
        (signed(unknown), "is not registered: unknown, revoked or superseded"),
        (
            {**good, FLEET_HTTP_PUBLIC_KEY_HEADER: other[FLEET_HTTP_PUBLIC_KEY_HEADER]},
            "the request's signature is wrong",
        ),
        ({**good, TIMESTAMP_HEADER: b"2020-01-01"}, "the request's signature is wrong"),
    ):
        status, body = ask(door, "/v1/fleet/pull-messages", headers)
        assert status == 401
        assert said in json.loads(body)["message"]
        assert said in caplog.text
    assert inside.paths == []


def test_what_strangers_make_up_is_turned_away_and_breaks_nothing(kits: Path, registry) -> None:
    inside = Inside()
    door = FrontDoor(inside, registry, PUBLIC)
    odd = signed(ec.generate_private_key(ec.SECP256K1()))  # a curve that no site has
    assert ask(door, "/v1/fleet/x", odd)[0] == 401
    good = signed(key_of(kits, "site-a"))
    endless = {**good, "content-length": b"9" * 5000}  # more digits than Python takes
    assert ask(door, "/v1/fleet/x", endless)[0] == 413
    name = FLEET_HTTP_PUBLIC_KEY_HEADER
    twice = {name.upper(): signed(ec.generate_private_key(ec.SECP384R1()))[name], **good}
    assert ask(door, "/v1/fleet/x", twice)[0] == 401  # Flower would take the first
    assert inside.paths == []


def test_a_revoked_and_an_expired_site_are_turned_away_at_once(
    kits: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.registry.LOOK_S", 0.0)
    door = FrontDoor(Inside(), registry, PUBLIC)
    a, b = key_of(kits, "site-a"), key_of(kits, "site-b")
    assert ask(door, "/v1/fleet/x", signed(b))[0] == 200
    provision(federation("site-a"), kits)
    assert ask(door, "/v1/fleet/x", signed(b))[0] == 401
    assert ask(door, "/v1/fleet/x", signed(a))[0] == 200
    past = datetime.now(UTC) - timedelta(days=2)
    monkeypatch.setattr("server.registry.validity_of", lambda certificate: Validity(past, past))
    (kits / "server" / "sites" / "site-a.crt").touch()
    status, body = ask(door, "/v1/fleet/x", signed(a))
    assert status == 401
    assert f"the key of site site-a expired on {past:%Y-%m-%d}" in json.loads(body)["message"]


def test_bodies_are_bounded_whether_they_say_their_size_or_not(kits: Path, registry) -> None:
    inside = Inside()
    door = FrontDoor(inside, registry, PUBLIC)
    headers = signed(key_of(kits, "site-a"))
    for length in (str(MOST_BODY + 1).encode(), b"-1", b"1e9", b""):
        assert ask(door, "/v1/fleet/push-object", {**headers, "content-length": length})[0] == 413
    assert inside.paths == []
    part = b"x" * (MOST_BODY // 4 + 1)
    assert ask(door, "/v1/fleet/push-object", headers, body=(part,) * 5) == (0, b"")
    assert inside.got <= MOST_BODY


def test_whoever_asks_is_told_time_and_versions_alone(registry: Registry) -> None:
    status, body = ask(FrontDoor(Inside(), registry, PUBLIC), ABOUT)
    assert status == 200
    assert set(json.loads(body)) == {"time", "polyclinic", "flwr"}
    assert ask(FrontDoor(Inside(), registry, PUBLIC), ABOUT, kind="websocket") == (0, b"")


def test_strangers_cannot_fill_the_log(registry: Registry, caplog) -> None:
    door = FrontDoor(Inside(), registry, PUBLIC)
    for _ in range(100):
        ask(door, "/v1/control/start-run")
    assert caplog.text.count("turned away 203.0.113.7") == 1


class SuperLink:
    """The part of Flower's control client that a registrar uses."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}

    def RegisterNode(self, request) -> None:  # noqa: N802 - Flower's name
        line = server.superlink._line(request.public_key)
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


def test_the_superlink_follows_the_registry(kits: Path, registry, monkeypatch, caplog) -> None:
    monkeypatch.setattr("server.registry.LOOK_S", 0.0)
    monkeypatch.setattr(server.superlink, "list_nodes", lambda client: [*client.nodes.values()])
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
    left_behind.write_bytes(aside)  # by a kit that is copied over an older one
    registrar.bring_in_step(superlink)
    assert superlink.standing()[0] == ("site-a", "unregistered")
    assert "site-a.crt: site site-a is not in federation.yaml so; left out" in caplog.text
    provision(federation(), kits)
    left_behind.write_bytes(aside)
    registrar.bring_in_step(superlink)
    registrar.bring_in_step(superlink)
    assert superlink.standing()[0] == ("site-a", "unregistered")
    assert caplog.text.count("site site-a: its key was revoked once; it needs a new one") == 1


def test_the_coordinators_own_connection_is_on_loopback_and_checked(tmp_path: Path) -> None:
    write_connection(tmp_path / "flwr", 9093, tmp_path / "ca.crt")
    text = (tmp_path / "flwr" / "config.toml").read_text()
    assert 'address = "127.0.0.1:9093"' in text
    assert f'root-certificates = "{tmp_path / "ca.crt"}"' in text
    assert "insecure" not in text
