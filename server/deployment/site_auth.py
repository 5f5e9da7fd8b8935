"""Authenticate sites on the public port, and limit the connections of strangers.

``SiteAuthMiddleware`` lets only requests that are signed with a registered key through to the paths
for sites. ``IdleTimeout`` closes connections to the public port that are too slow or too many. The
SuperLink in ``superlink.py`` uses both. tests/server/deployment/test_site_auth.py fails when a new
version of Flower changes the headers or signatures that this module relies on.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.metadata import version
from typing import Any, ClassVar

import httptools
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import verify_signature
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from polyclinic.configs import VERSION
from polyclinic.configs.diagnostics.network import ABOUT
from polyclinic.configs.security.credentials import fingerprint, now_utc, public_line
from polyclinic.server.deployment.registry import Registry

log = logging.getLogger("flwr.polyclinic")

FLEET = "/v1/fleet/"  # beginning of the paths for sites
MAX_BODY = 64_000_000  # maximum bytes of a body; Flower splits arrays into pieces of 5 MB
MAX_HEAD = 64_000  # maximum bytes of a request besides its body: head, chunk sizes, trailers
PIECE = 8192  # bytes that are passed to the HTTP parser at a time
HEAD_S = 30.0  # seconds in which a request's head must be complete
PATIENCE_S = 30.0  # longest silence of the other end, in seconds
MAX_CONNECTIONS = 1000  # maximum open connections to the public port
MAX_CONNECTIONS_EACH = 200  # maximum per address; behind a proxy all sites have the same one
QUIET_S = 30.0  # seconds between two log lines about the same address

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class SiteAuthMiddleware:
    """Middleware that lets only registered sites through, and only to the paths for sites.

    Requests to another port than the public one (the loopback port) are not checked.

    Args:
        app: the application behind the middleware.
        registry: registered sites.
        port: number of the public port.
    """

    def __init__(self, app: App, registry: Registry, port: int) -> None:
        self.app = app
        self.registry = registry
        self.port = port
        self._logged: dict[str, float] = {}  # time of the last log line, by address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _port(scope) != self.port:
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            self._log_refused(scope, "it does not use HTTP")
        elif scope["path"] == ABOUT:
            about = {
                "time": now_utc().isoformat(),
                "polyclinic": VERSION,
                "flwr": version("flwr"),
            }
            await _answer(send, 200, about)
        elif not scope["path"].startswith(FLEET):
            self._log_refused(scope, f"the path {scope['path']!r} is not available to sites")
            await _answer(send, 404, {"message": "this path is not available to sites"})
        else:
            await self._authenticate(scope, receive, send)

    async def _authenticate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to the application if a registered site signed it, or refuse it."""
        headers: dict[str, bytes] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.decode("latin-1"), value)  # Flower uses the first of several
        problem = self._refusal(headers)
        if problem:
            self._log_refused(scope, problem)
            await _answer(send, 401, {"code": 0, "message": problem})
            return
        length = headers.get("content-length", b"0")
        if not length.isdigit() or len(length) > 12 or int(length) > MAX_BODY:
            self._log_refused(
                scope,
                f"expected a body of at most {MAX_BODY} bytes, got {length[:20].decode('latin-1')}",
            )
            await _answer(send, 413, {"message": f"expected at most {MAX_BODY} bytes"})
            return
        got = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > MAX_BODY:  # possible in a request without content-length
                self._log_refused(scope, f"expected a body of at most {MAX_BODY} bytes, got more")
                return {"type": "http.disconnect"}
            return message

        await self.app(scope, counted, send)

    def _refusal(self, headers: MutableMapping[str, bytes]) -> str:
        """Return why the headers are not those of a registered site; empty if they are.

        This is checked before the body is read. Flower checks the time of the signature, and that a
        site uses only its own node.
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
            return "the request has no valid key of a site"
        if not signed:
            return "the request's signature is invalid"
        site = self.registry.sites().get(line)
        if site is None:
            return f"key {fingerprint(key)} is not registered: unknown, revoked or superseded"
        problem = site.problem()
        return f"the key of site {site.name} {problem}" if problem else ""

    def _log_refused(self, scope: Scope, reason: str) -> None:
        """Log a refused request, rarely enough that strangers cannot fill the disk."""
        address = (scope.get("client") or ("unknown address", 0))[0]
        now = time.monotonic()
        if now - self._logged.get(address, float("-inf")) < QUIET_S:
            return
        if len(self._logged) > 10_000:
            self._logged.clear()
        self._logged[address] = now
        log.warning("refused a request from %s: %s", address, reason)


def _port(scope: Scope) -> int | None:
    """Return the local port at which a request arrived, as the operating system reports it."""
    server = scope.get("server")
    return server[1] if server else None


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    """Send a JSON response and close the connection."""
    body = json.dumps(content).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class IdleTimeout(HttpToolsProtocol):
    """HTTP protocol with limits on the number, speed and head size of connections.

    The limits apply to the public port only, so that strangers cannot block the coordinator's own
    connections on loopback. Upgrades to other protocols (WebSocket, h2c, CONNECT) are refused on
    both ports.

    Args:
        public: number of the public port. All other arguments are uvicorn's.
    """

    _open: ClassVar[set[IdleTimeout]] = set()  # open connections to the public port
    _logged: ClassVar[dict[str, float]] = {}  # time of the last log line, by kind of message

    def __init__(self, *args: Any, public: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._public = public
        self._address = ""
        self._limited = False
        self._watch: asyncio.TimerHandle | None = None
        self._last_received = self.loop.time()
        self._head_began: float | None = self._last_received  # None: no head is being received
        self._in_body = False  # whether a request's head is complete and its body is not
        self._overhead = 0  # bytes of the current request besides its body

    def connection_made(  # type: ignore[override]  # uvicorn also narrows the type
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        self._address = str((transport.get_extra_info("peername") or ("?",))[0])
        self._limited = transport.get_extra_info("sockname")[1] == self._public
        if not self._limited:
            return
        if self._too_many():
            self._warn("too many connections: refused one from %s")
            transport.abort()
            return
        self._open.add(self)
        self._watch = self.loop.call_later(min(PATIENCE_S, HEAD_S), self._check_timeouts)

    def _too_many(self) -> bool:
        """Return whether the limit on open connections, per address or in all, is reached."""
        of_address = {c for c in self._open if c._address == self._address}
        return self._full(of_address, MAX_CONNECTIONS_EACH) or self._full(
            self._open, MAX_CONNECTIONS
        )

    def _full(self, connections: set[IdleTimeout], most: int) -> bool:
        """Return whether the limit is reached, after dropping connections that are closing."""
        if len(connections) < most:
            return False
        closing = {c for c in connections if c.transport.is_closing()}
        for connection in closing:
            connection.transport.abort()
        left = connections - closing
        self._open.difference_update(closing)
        return len(left) >= most

    def data_received(self, data: bytes) -> None:
        """Parse received data in small pieces, and stop at the first that exceeds a limit.

        Replaces uvicorn's method, which parses everything at once and logs each malformed request.
        """
        self._unset_keepalive_if_required()
        self._last_received = self.loop.time()
        if self._head_began is None and not self._in_body:
            self._head_began = self._last_received
        rest = memoryview(data)
        while rest and not self.transport.is_closing():
            size = self._next_size()
            if size <= 0:
                self._warn(
                    f"closed a connection from %s: expected at most {MAX_HEAD} bytes besides the "
                    "body, got more"
                )
                self.transport.abort()
                return
            piece, rest = rest[:size], rest[size:]
            self._overhead += len(piece)
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserError:
                self._warn("refused a malformed request or a change of protocol from %s")
                self.send_400_response("Invalid HTTP request received.")
                return
            self._overhead = max(self._overhead, 0)  # negative if a request ended in this piece

    def _next_size(self) -> int:
        """Return how many bytes to parse next; 0 or less if the request is at its limit."""
        left = MAX_HEAD - self._overhead
        if not self._limited or (self._in_body and left >= 0):
            return PIECE
        return min(PIECE, left)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_began is None:  # the previous request ended in the same piece
            self._head_began = self._last_received

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            raise ValueError("upgrades are refused")  # httptools makes an HttpParserError of it
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
        if self._head_began is not None:  # the head of the next request had to wait
            self._head_began = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self)
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def _check_timeouts(self) -> None:
        """Close the connection if the other end takes too long."""
        answering = self.cycle is not None and not (
            self.cycle.more_body or self.cycle.response_complete
        )
        now = self.loop.time()
        silent = now - self._last_received
        head = 0.0 if self._head_began is None else now - self._head_began
        if not answering and (silent >= PATIENCE_S or head >= HEAD_S):
            self._warn("closed a connection from %s: too slow")
            self.transport.abort()
            return
        left = min(PATIENCE_S - silent, HEAD_S - head)
        self._watch = self.loop.call_later(max(left, 1.0), self._check_timeouts)

    def _warn(self, message: str) -> None:
        """Log a message with this connection's address, rarely for each kind of message."""
        now = time.monotonic()
        if now - self._logged.get(message, float("-inf")) >= QUIET_S:
            self._logged[message] = now
            log.warning(message, self._address)
