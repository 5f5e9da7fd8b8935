"""Flower's SuperLink behind a front door: sites reach what sites need, and nothing else.

Flower 1.41 serves three things on one port: what sites ask (``/v1/fleet``), what starts and stops
runs (``/v1/control``) and what server apps ask (``/v1/runtime``); the last two ask nobody who they
are. Here the SuperLink listens on loopback, for the coordinator alone, and a second, public port
leads to the same program through ``FrontDoor``, which lets registered sites in and knows no other
path. Whoever may log in on the coordinator's machine, or into its container, is the coordinator.

This is the one module that touches internals of Flower's SuperLink: how it starts uvicorn, its hook
for middleware, its client for the control API. tests/test_front_door.py fails when a new
Flower moves any of it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import httpx
import uvicorn
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, verify_signature
from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from configs import VERSION
from configs.credentials import fingerprint, now_utc, public_line
from configs.reach import ABOUT
from server.registry import Registry
from server.superexec import look_after_superexec

log = logging.getLogger("flwr.polyclinic")

FLEET = "/v1/fleet/"
MOST_BODY = 64_000_000  # bytes; Flower cuts arrays into pieces of 5 MB
PATIENCE_S = 30.0  # for a request's first and for its next bytes
MOST_CONNECTIONS = 1000
MOST_CONNECTIONS_EACH = 200  # of one address; behind a proxy all sites have the same
QUIET_S = 30.0  # between two log lines about the same stranger
SYNC_S = 2.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Doors:
    """Where the SuperLink listens, and who may come in."""

    host: str  # of the public port
    port: int
    control: int  # on loopback
    health: str
    registry: Registry


@dataclass(frozen=True)
class Credentials:
    """Files of the coordinator's kit."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class Node:
    """A site as the SuperLink has it."""

    identity: int
    name: str
    public_key: str  # one line
    status: str  # registered, online, offline, unregistered
    since: str  # of that status, UTC; empty if never connected


def start_superlink(doors: Doors, files: Credentials, state: Path) -> NoReturn:
    """Run the SuperLink until it is stopped, and keep its sites those of the registry.

    Args:
        state: folder for its database and logs; relative run folders are in it too.
    """
    os.environ.setdefault("FLWR_HOME", str(state / "flwr"))
    os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.chdir(state)
    (state / "logs").mkdir(exist_ok=True)
    write_connection(Path(os.environ["FLWR_HOME"]), doors.control, files.authority)
    sys.argv = [
        "flower-superlink",
        *("--ssl-certfile", str(files.certificate), "--ssl-keyfile", str(files.key)),
        *("--ssl-ca-certfile", str(files.authority), "--enable-supernode-auth"),
        *("--database", str(state / "state.db"), "--isolation", "process"),
        *("--host", "127.0.0.1", "--port", str(doors.control)),
        *("--health-server-address", doors.health, "--disable-runtime-dependency-installation"),
        *("--log-file", str(state / "logs" / "superlink.log")),
        *("--log-rotation-interval-hours", "24", "--log-rotation-backup-count", "30"),
    ]
    extensions.get_middleware = lambda: (
        Middleware(FrontDoor, registry=doors.registry, port=doors.port),
    )
    uvicorn.run = lambda app, **options: _serve(app, doors, options)
    look_after_superexec(doors.control, files.authority)
    registrar = Registrar(doors.registry)
    threading.Thread(
        target=registrar.keep_in_step, args=(doors.control, files.authority), daemon=True
    ).start()
    flower_superlink()
    sys.exit(0)


def _serve(app: Any, doors: Doors, options: dict[str, Any]) -> None:  # noqa: ANN401
    """Flower's ``uvicorn.run``, on two ports."""
    options |= {"proxy_headers": False, "http": partial(Patient, public=doors.port)}
    private = uvicorn.Config(app, **options)
    public = uvicorn.Config(app, **{**options, "host": doors.host, "port": doors.port})
    sockets = [private.bind_socket(), public.bind_socket()]
    log.info("sites come in at %s:%d", doors.host, doors.port)
    uvicorn.Server(private).run(sockets=sockets)


class FrontDoor:
    """Lets registered sites through to what sites need. On the loopback port it lets all through.

    Args:
        port: the public one.
    """

    def __init__(self, app: App, registry: Registry, port: int) -> None:
        self.app = app
        self.registry = registry
        self.port = port
        self._told: dict[str, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _port(scope) != self.port:
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            self._tell(scope, "asked for something else than HTTP")
        elif scope["path"] == ABOUT:
            about = {
                "time": now_utc().isoformat(),
                "polyclinic": VERSION,
                "flwr": version("flwr"),
            }
            await _answer(send, 200, about)
        elif not scope["path"].startswith(FLEET):
            self._tell(scope, f"asked for {scope['path']!r}, which is not for sites")
            await _answer(send, 404, {"message": "there is nothing here for sites"})
        else:
            await self._let_in(scope, receive, send)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[str, bytes] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.decode("latin-1"), value)  # of two, the one that Flower takes
        problem = self._refusal(headers)
        if problem:
            self._tell(scope, problem)
            await _answer(send, 401, {"code": 0, "message": problem})
            return
        length = headers.get("content-length", b"0")
        if not length.isdigit() or len(length) > 12 or int(length) > MOST_BODY:
            self._tell(
                scope, f"sent {length[:20].decode('latin-1')} bytes, {MOST_BODY} are allowed"
            )
            await _answer(send, 413, {"message": f"more than {MOST_BODY} bytes"})
            return
        got = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > MOST_BODY:  # of a body that did not say its length
                self._tell(scope, f"sent more than {MOST_BODY} bytes")
                return {"type": "http.disconnect"}
            return message

        await self.app(scope, counted, send)

    def _refusal(self, headers: MutableMapping[str, bytes]) -> str:
        """Why a request is not one of a registered site, by its headers alone; empty if it is.

        Before any body is read. Flower checks the time of the signature, and that the site speaks
        for its own node.
        """
        try:
            stated = headers[FLEET_HTTP_PUBLIC_KEY_HEADER.lower()]
            signature = headers[FLEET_HTTP_SIGNATURE_HEADER.lower()]
            timestamp = headers[TIMESTAMP_HEADER.lower()]
            key = load_pem_public_key(base64.b64decode(stated, validate=True))
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise ValueError("not an elliptic-curve key")
            line = public_line(key)
            signed = verify_signature(key, timestamp, base64.b64decode(signature, validate=True))
        except (KeyError, ValueError, TypeError, binascii.Error, UnsupportedAlgorithm):
            return "no key of a site in the request"
        if not signed:
            return "the request's signature is wrong"
        site = self.registry.sites().get(line)
        if site is None:
            return f"key {fingerprint(key)} is not registered: unknown, revoked or superseded"
        problem = site.problem()
        return f"the key of site {site.name} {problem}" if problem else ""

    def _tell(self, scope: Scope, what: str) -> None:
        """Log what a stranger did, seldom enough that it cannot fill the disk."""
        whom = (scope.get("client") or ("somebody", 0))[0]
        now = time.monotonic()
        if now - self._told.get(whom, float("-inf")) < QUIET_S:
            return
        if len(self._told) > 10_000:
            self._told.clear()
        self._told[whom] = now
        log.warning("turned away %s: %s", whom, what)


def _port(scope: Scope) -> int | None:
    """The port that a request came in at, as the operating system has it."""
    server = scope.get("server")
    return server[1] if server else None


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Patient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """On the public port, connections that are silent for too long are closed, and nobody has too
    many; the coordinator's own, on loopback, are left alone whatever strangers do.

    Args:
        public: the port's number; the others are uvicorn's.
    """

    _by_address: ClassVar[Counter[str]] = Counter()
    _told: ClassVar[float] = float("-inf")

    def __init__(self, *args: Any, public: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._public = public
        self._address = ""
        self._watch: asyncio.TimerHandle | None = None
        self._heard = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if transport.get_extra_info("sockname")[1] != self._public:
            return
        self._address = str((transport.get_extra_info("peername") or ("?",))[0])
        mine = self._by_address
        mine[self._address] += 1
        if mine.total() > MOST_CONNECTIONS or mine[self._address] > MOST_CONNECTIONS_EACH:
            if self.loop.time() - Patient._told > QUIET_S:
                Patient._told = self.loop.time()
                log.warning("too many connections, %d of %s", mine[self._address], self._address)
            transport.abort()
            return
        self._watch = self.loop.call_later(PATIENCE_S, self._look)

    def data_received(self, data: bytes) -> None:
        self._heard = self.loop.time()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._address:
            self._by_address[self._address] -= 1
            if not self._by_address[self._address]:
                del self._by_address[self._address]
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Close the connection if it is the other end that we wait for."""
        answering = self.cycle is not None and not (
            self.cycle.more_body or self.cycle.response_complete
        )
        silent = self.loop.time() - self._heard
        if not answering and silent >= PATIENCE_S:
            self.transport.abort()
            return
        self._watch = self.loop.call_later(max(PATIENCE_S - silent, 1.0), self._look)


def write_connection(home: Path, control: int, authority: Path) -> None:
    """The coordinator's own connection, for ``flwr run APP polyclinic``."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "polyclinic"\n\n[superlink.polyclinic]\n'
        f'address = "127.0.0.1:{control}"\nroot-certificates = {json.dumps(str(authority))}\n',
        encoding="utf-8",
    )


@contextmanager
def control_client(control: int, authority: Path) -> Iterator[ControlHttpClient]:
    """Speak to the SuperLink's control API, on loopback."""
    with ControlHttpClient.from_server_address(
        f"127.0.0.1:{control}",
        False,
        authority.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="polyclinic")],
    ) as client:
        yield client


def list_nodes(client: ControlHttpClient) -> list[Node]:
    """Every site that the SuperLink has or had."""
    found = client.ListNodes(ListNodesRequest()).nodes_info
    return [
        Node(
            node.node_id,
            node.name,
            _line(node.public_key),
            node.status,
            {"online": node.last_activated_at, "offline": node.last_deactivated_at}.get(
                node.status, node.unregistered_at or node.registered_at
            ),
        )
        for node in found
    ]


def _line(pem: bytes) -> str:
    key = load_pem_public_key(pem)
    assert isinstance(key, ec.EllipticCurvePublicKey)  # the SuperLink takes no other
    return public_line(key)


class Registrar:
    """Keeps the SuperLink's nodes those of the registry.

    A key that has expired stays registered, and is refused at the front door: it may be renewed.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._told: set[tuple[str, str]] = set()

    def keep_in_step(self, control: int, authority: Path) -> NoReturn:
        """Whenever the registry changes, for ever; also after what went wrong."""
        done: object = None
        while True:
            time.sleep(SYNC_S)
            sites = self.registry.sites()
            if sites == done:
                continue
            try:
                with control_client(control, authority) as client:
                    self.bring_in_step(client)
                done = sites
            except (httpx.HTTPError, OSError) as error:  # it starts, or is being stopped
                log.debug("the SuperLink could not be asked for its sites: %s", error)

    def bring_in_step(self, client: ControlHttpClient) -> None:
        """Register and unregister nodes until the SuperLink's are the registry's."""
        wanted = self.registry.sites()
        nodes = list_nodes(client)
        there = {node.public_key: node for node in nodes if node.status != "unregistered"}
        known = {node.public_key for node in nodes}
        for line, node in there.items():
            if line not in wanted or node.name != wanted[line].name:
                client.UnregisterNode(UnregisterNodeRequest(node_id=node.identity))
                log.warning("site %s: its key is no longer taken", node.name)
        for line, site in wanted.items():
            if line in there and there[line].name == site.name:
                continue
            if line in known:  # Flower takes no key twice
                if (site.name, line) not in self._told:
                    self._told.add((site.name, line))
                    log.error("site %s: its key was revoked once; it needs a new one", site.name)
                continue
            key = load_ssh_public_key(line.encode())
            assert isinstance(key, ec.EllipticCurvePublicKey)
            client.RegisterNode(
                RegisterNodeRequest(public_key=public_key_to_bytes(key), name=site.name)
            )
            log.info("site %s: registered, key %s", site.name, site.fingerprint)
