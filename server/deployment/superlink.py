"""Flower's SuperLink behind a front door: sites reach what sites need, and nothing else.

Flower 1.41 serves three things on one port: what sites ask (``/v1/fleet``), what starts and stops
runs (``/v1/control``) and what server apps ask (``/v1/runtime``); the last two ask nobody who they
are. Here the SuperLink listens on loopback, for the coordinator alone, and a second, public port
leads to the same program through ``SiteAuthMiddleware``, which lets registered sites in and knows
no other path. Whoever may log in on the coordinator's machine, or into its container, is the
coordinator.

This is the one module that touches internals of Flower's SuperLink: how it starts uvicorn, its hook
for middleware, its client for the control API. tests/server/deployment/test_front_door.py fails
when a new Flower moves any of it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import httptools
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
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from polyclinic.configs import VERSION
from polyclinic.configs.diagnostics.network import ABOUT
from polyclinic.configs.security.credentials import fingerprint, now_utc, public_line
from polyclinic.server.deployment.registry import Registry
from polyclinic.server.deployment.superexec import supervise_superexec

log = logging.getLogger("flwr.polyclinic")

FLEET = "/v1/fleet/"
MOST_BODY = 64_000_000  # bytes; Flower cuts arrays into pieces of 5 MB
MOST_HEAD = 64_000  # bytes of a request that are not its body: its head, chunk sizes, trailers
PIECE = 8192  # bytes that the HTTP parser gets at once
HEAD_S = 30.0  # for a request's whole head
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
class Endpoints:
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


def start_superlink(doors: Endpoints, files: Credentials, state: Path) -> NoReturn:
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
        Middleware(SiteAuthMiddleware, registry=doors.registry, port=doors.port),
    )
    uvicorn.run = lambda app, **options: _serve(app, doors, options)
    supervise_superexec(doors.control, files.authority)
    registrar = Registrar(doors.registry)
    threading.Thread(
        target=registrar.sync_forever, args=(doors.control, files.authority), daemon=True
    ).start()
    flower_superlink()
    sys.exit(0)


def _serve(app: Any, doors: Endpoints, options: dict[str, Any]) -> None:  # noqa: ANN401
    """Flower's ``uvicorn.run``, on two ports."""
    server, sockets = _server(app, doors, options)
    log.info("sites come in at %s:%d", doors.host, doors.port)
    server.run(sockets=sockets)


def _server(
    app: Any,  # noqa: ANN401
    doors: Endpoints,
    options: dict[str, Any],
) -> tuple[uvicorn.Server, list[socket.socket]]:
    """Bind the private and the public port, and make the one server of both."""
    http = partial(IdleTimeout, public=doors.port)
    options = {**options, "proxy_headers": False, "http": http, "ws": "none"}
    private = uvicorn.Config(app, **options)
    public = uvicorn.Config(app, **{**options, "host": doors.host, "port": doors.port})
    return uvicorn.Server(private), [private.bind_socket(), public.bind_socket()]


class SiteAuthMiddleware:
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


class IdleTimeout(HttpToolsProtocol):
    """Close connections to the public port that are too many, too slow or have too large a head.

    The loopback port has none of these limits, so that strangers cannot keep the coordinator from
    it. Neither port changes the protocol (WebSocket, h2c, CONNECT).

    Args:
        public: number of the public port; the other arguments are uvicorn's.
    """

    _open: ClassVar[set[IdleTimeout]] = set()  # connections to the public port
    _logged: ClassVar[dict[str, float]] = {}  # by kind of message: when it was last logged

    def __init__(self, *args: Any, public: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._public = public
        self._address = ""
        self._limited = False
        self._watch: asyncio.TimerHandle | None = None
        self._heard = self.loop.time()
        self._head_began: float | None = self._heard  # None: no head is being received
        self._in_body = False  # between a request's head and its end
        self._overhead = 0  # bytes of the current request that are not its body

    def connection_made(  # type: ignore[override]  # as uvicorn does
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        self._address = str((transport.get_extra_info("peername") or ("?",))[0])
        self._limited = transport.get_extra_info("sockname")[1] == self._public
        if not self._limited:
            return
        if self._too_many():
            self._warn("too many connections, the last from %s")
            transport.abort()
            return
        self._open.add(self)
        self._watch = self.loop.call_later(min(PATIENCE_S, HEAD_S), self._look)

    def _too_many(self) -> bool:
        of_address = {c for c in self._open if c._address == self._address}
        return self._full(of_address, MOST_CONNECTIONS_EACH) or self._full(
            self._open, MOST_CONNECTIONS
        )

    def _full(self, connections: set[IdleTimeout], most: int) -> bool:
        """Count open connections; where they seem too many, drop those that are closing first."""
        if len(connections) < most:
            return False
        closing = {c for c in connections if c.transport.is_closing()}
        for connection in closing:
            connection.transport.abort()
        left = connections - closing
        self._open.difference_update(closing)
        return len(left) >= most

    def data_received(self, data: bytes) -> None:
        """Parse what came in small pieces, and stop at the first that breaks a limit.

        Replaces uvicorn's method, which parses all at once and logs each malformed request.
        """
        self._unset_keepalive_if_required()
        self._heard = self.loop.time()
        if self._head_began is None and not self._in_body:
            self._head_began = self._heard
        rest = memoryview(data)
        while rest and not self.transport.is_closing():
            size = self._next_size()
            if size <= 0:
                self._warn(f"closed a connection of %s: a head of more than {MOST_HEAD} bytes")
                self.transport.abort()
                return
            piece, rest = rest[:size], rest[size:]
            self._overhead += len(piece)
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserError:
                self._warn("a malformed request, or one that changes the protocol, from %s")
                self.send_400_response("Invalid HTTP request received.")
                return
            self._overhead = max(self._overhead, 0)  # a request may have ended in this piece

    def _next_size(self) -> int:
        """How many bytes to parse next; none if the request has all that is allowed."""
        left = MOST_HEAD - self._overhead
        if not self._limited or (self._in_body and left >= 0):
            return PIECE
        return min(PIECE, left)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_began is None:  # in the piece in which the last request ended
            self._head_began = self._heard

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            raise ValueError("the protocol is not changed")  # httptools' HttpParserError
        super().on_headers_complete()
        self._head_began = None
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        self._overhead -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False
        self._overhead = 0

    def on_response_complete(self) -> None:
        if self._head_began is not None:  # of the next request, which had to wait
            self._head_began = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self)
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Close the connection if it is the other end that we wait for."""
        answering = self.cycle is not None and not (
            self.cycle.more_body or self.cycle.response_complete
        )
        now = self.loop.time()
        silent = now - self._heard
        head = 0.0 if self._head_began is None else now - self._head_began
        if not answering and (silent >= PATIENCE_S or head >= HEAD_S):
            self._warn("closed a connection of %s: too slow")
            self.transport.abort()
            return
        left = min(PATIENCE_S - silent, HEAD_S - head)
        self._watch = self.loop.call_later(max(left, 1.0), self._look)

    def _warn(self, message: str) -> None:
        """Log a message about this connection's address, each kind once in a while."""
        now = time.monotonic()
        if now - self._logged.get(message, float("-inf")) >= QUIET_S:
            self._logged[message] = now
            log.warning(message, self._address)


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

    def sync_forever(self, control: int, authority: Path) -> NoReturn:
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
