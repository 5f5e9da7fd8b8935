"""Run Flower's SuperLink on loopback, with a public port that only registered sites can use.

Flower 1.41 serves three APIs on one port: for sites (``/v1/fleet``), for starting and stopping runs
(``/v1/control``) and for server apps (``/v1/runtime``). The last two authenticate nobody. Here the
SuperLink listens on loopback, for the coordinator only. A second, public port leads to the same
program through ``SiteAuthMiddleware``, which admits registered sites and only to the API for sites.
Whoever can log in on the coordinator's machine, or into its container, acts as the coordinator.

Together with ``site_auth``, this is the only module that depends on internals of Flower's
SuperLink: how it starts uvicorn, its hook for middleware, its client of the control API.
tests/server/deployment/test_site_auth.py fails when a new version of Flower changes them.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import httpx
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware

from polyclinic.configs.security.credentials import public_line
from polyclinic.server.deployment.registry import Registry
from polyclinic.server.deployment.site_auth import IdleTimeout, SiteAuthMiddleware
from polyclinic.server.deployment.superexec import supervise_superexec

log = logging.getLogger("flwr.polyclinic")

SYNC_S = 2.0  # seconds between two checks of the registry for changes


@dataclass(frozen=True)
class Endpoints:
    """Addresses at which the SuperLink listens, and the sites that may connect."""

    host: str  # address of the public port
    port: int  # public port, for sites
    control: int  # port on loopback, for the coordinator
    health: str  # address of the health service, such as 127.0.0.1:9099
    registry: Registry


@dataclass(frozen=True)
class Credentials:
    """Certificates and key of the coordinator's kit."""

    authority: Path  # certificate of the authority
    certificate: Path  # the server's certificate
    key: Path  # the server's private key


@dataclass(frozen=True)
class Node:
    """A site as the SuperLink knows it."""

    identity: int  # Flower's node id
    name: str  # name of the site
    public_key: str  # one line, as OpenSSH writes it
    status: str  # registered, online, offline or unregistered
    since: str  # time of the last change of status, UTC, ISO 8601; empty if unknown


def start_superlink(endpoints: Endpoints, files: Credentials, state: Path) -> NoReturn:
    """Run the SuperLink until it is stopped, and keep its sites in step with the registry.

    Args:
        endpoints: addresses and registered sites.
        files: certificates and key.
        state: folder of the database and the logs. It becomes the working directory, so that
            relative run folders are in it, too.
    """
    os.environ.setdefault("FLWR_HOME", str(state / "flwr"))
    os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.chdir(state)
    (state / "logs").mkdir(exist_ok=True)
    write_connection(Path(os.environ["FLWR_HOME"]), endpoints.control, files.authority)
    sys.argv = [
        "flower-superlink",
        *("--ssl-certfile", str(files.certificate), "--ssl-keyfile", str(files.key)),
        *("--ssl-ca-certfile", str(files.authority), "--enable-supernode-auth"),
        *("--database", str(state / "state.db"), "--isolation", "process"),
        *("--host", "127.0.0.1", "--port", str(endpoints.control)),
        *("--health-server-address", endpoints.health, "--disable-runtime-dependency-installation"),
        *("--log-file", str(state / "logs" / "superlink.log")),
        *("--log-rotation-interval-hours", "24", "--log-rotation-backup-count", "30"),
    ]
    extensions.get_middleware = lambda: (
        Middleware(SiteAuthMiddleware, registry=endpoints.registry, port=endpoints.port),
    )
    uvicorn.run = lambda app, **options: _serve(app, endpoints, options)
    supervise_superexec(endpoints.control, files.authority)
    registrar = Registrar(endpoints.registry)
    threading.Thread(
        target=registrar.sync_forever, args=(endpoints.control, files.authority), daemon=True
    ).start()
    flower_superlink()
    sys.exit(0)


def _serve(app: Any, endpoints: Endpoints, options: dict[str, Any]) -> None:  # noqa: ANN401
    """Serve the application on two ports, in place of ``uvicorn.run``, which Flower calls."""
    server, sockets = _server(app, endpoints, options)
    log.info("sites can connect to %s:%d", endpoints.host, endpoints.port)
    server.run(sockets=sockets)


def _server(
    app: Any,  # noqa: ANN401
    endpoints: Endpoints,
    options: dict[str, Any],
) -> tuple[uvicorn.Server, list[socket.socket]]:
    """Bind the private and the public port, and create one server for both."""
    http = partial(IdleTimeout, public=endpoints.port)
    options = {**options, "proxy_headers": False, "http": http, "ws": "none"}
    private = uvicorn.Config(app, **options)
    public = uvicorn.Config(app, **{**options, "host": endpoints.host, "port": endpoints.port})
    return uvicorn.Server(private), [private.bind_socket(), public.bind_socket()]


def write_connection(home: Path, control: int, authority: Path) -> None:
    """Write Flower's configuration of the coordinator's own connection.

    ``flwr run APP polyclinic`` uses it.

    Args:
        home: Flower's home folder (FLWR_HOME).
        control: control port on loopback.
        authority: file with the authority's certificate.
    """
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "polyclinic"\n\n[superlink.polyclinic]\n'
        f'address = "127.0.0.1:{control}"\nroot-certificates = {json.dumps(str(authority))}\n',
        encoding="utf-8",
    )


@contextmanager
def control_client(control: int, authority: Path) -> Iterator[ControlHttpClient]:
    """Connect to the SuperLink's control API on loopback.

    Args:
        control: control port.
        authority: file with the authority's certificate.
    """
    with ControlHttpClient.from_server_address(
        f"127.0.0.1:{control}",
        False,
        authority.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="polyclinic")],
    ) as client:
        yield client


def list_nodes(client: ControlHttpClient) -> list[Node]:
    """List all sites that the SuperLink knows, including unregistered ones."""
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
    """Convert a public key from PEM to one line, as OpenSSH writes it."""
    key = load_pem_public_key(pem)
    assert isinstance(key, ec.EllipticCurvePublicKey)  # the SuperLink accepts no other kind
    return public_line(key)


class Registrar:
    """Registers and unregisters nodes of the SuperLink as sites join and leave the registry.

    Expired keys stay registered, because they may be renewed. ``SiteAuthMiddleware`` refuses them.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._reported: set[tuple[str, str]] = set()  # revoked keys that were logged, by site name

    def sync_forever(self, control: int, authority: Path) -> NoReturn:
        """Apply every change of the registry to the SuperLink, and try again after errors.

        Args:
            control: control port of the SuperLink.
            authority: file with the authority's certificate.
        """
        done: object = None  # the sites that were applied last
        while True:
            time.sleep(SYNC_S)
            sites = self.registry.sites()
            if sites == done:
                continue
            try:
                with control_client(control, authority) as client:
                    self.bring_in_step(client)
                done = sites
            except (httpx.HTTPError, OSError) as error:  # the SuperLink is starting or stopping
                log.debug("cannot synchronise sites with the SuperLink: %s", error)

    def bring_in_step(self, client: ControlHttpClient) -> None:
        """Register and unregister nodes so that the SuperLink has the sites of the registry."""
        wanted = self.registry.sites()
        nodes = list_nodes(client)
        there = {node.public_key: node for node in nodes if node.status != "unregistered"}
        known = {node.public_key for node in nodes}
        for line, node in there.items():
            if line not in wanted or node.name != wanted[line].name:
                client.UnregisterNode(UnregisterNodeRequest(node_id=node.identity))
                log.warning("site %s: its key is no longer accepted", node.name)
        for line, site in wanted.items():
            if line in there and there[line].name == site.name:
                continue
            if line in known:  # Flower never registers a key again
                if (site.name, line) not in self._reported:
                    self._reported.add((site.name, line))
                    log.error(
                        "site %s: its key was revoked before and cannot be used again; create a "
                        "new one",
                        site.name,
                    )
                continue
            key = load_ssh_public_key(line.encode())
            assert isinstance(key, ec.EllipticCurvePublicKey)
            client.RegisterNode(
                RegisterNodeRequest(public_key=public_key_to_bytes(key), name=site.name)
            )
            log.info("site %s: registered, key %s", site.name, site.fingerprint)
