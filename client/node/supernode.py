"""Run Flower's SuperNode so that only approved releases run; a coordinator cannot disable this.

This is the only module that depends on internals of Flower's SuperNode (1.41). Flower's function
that receives a message is given a ``get_fab`` that checks ``client.policy.approvals`` first. An app
that is not approved is neither unpacked nor run, and the message is answered with an error.
tests/client/node/test_supernode.py fails if a new version of Flower changes these internals.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode import start_client_internal as internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from polyclinic.client.policy.approvals import Approvals
from polyclinic.configs import VERSION, same_minor, wire
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.files import write_atomically
from polyclinic.configs.ports import free_port
from polyclinic.configs.schema.site import CoordinatorConfig, SiteConfig
from polyclinic.configs.security.credentials import now_utc, read_private_key
from polyclinic.configs.security.release import open_release

log = logging.getLogger("flwr.polyclinic")  # a child of Flower's logger, to share its output

PULL_MESSAGE = "_pull_and_store_message"
INSERT_MESSAGE = "_insert_message"
PULL_ARGUMENTS = "receive", "get_run", "get_fab", "state", "object_store"

CONTACT = "contact.json"
CONTACT_S = 10.0  # shortest time between two updates of an idle site's contact file
PROBE_S = 30.0  # heartbeat interval of the registration probe, which disconnects at once


class Unapproved(Exception):
    """A release is not approved at this site. The message names it and the reason."""


@dataclass(frozen=True)
class Contact:
    """The last contact with the coordinator and the site's activity."""

    since: str  # start of the connection, UTC, ISO 8601
    last: str  # last contact, UTC, ISO 8601
    server: str  # address and port of the coordinator
    release: str = ""  # digest of the last message's release; empty: no message yet
    working: bool = False  # whether a message is being processed; there is no contact meanwhile


def start_supernode(site_file: Path, site: SiteConfig, health: str | None) -> NoReturn:
    """Connect a site to its coordinator and process messages until stopped.

    The process ends with a status other than 0 if the connection cannot be established or is lost
    permanently, so that a service manager can restart it.

    Args:
        site_file: the site's ``site.yaml``.
        site: its contents.
        health: address of the gRPC health service; None: no health service.
    """
    server = site.server
    assert server is not None
    address = _address(server)
    sys.argv = [
        "flower-supernode",
        *("--root-certificates", str(server.ca)),
        *("--superlink", address),
        *("--auth-supernode-private-key", str(server.key)),
        *("--node-config", f'site-config="{site_file.resolve()}"'),
        *("--host", "127.0.0.1", "--port", str(free_port())),
        *(("--health-server-address", health) if health else ()),
    ]
    os.environ.setdefault("FLWR_HOME", str(site.state / "flwr"))
    os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    guard = ReleaseGuard(Approvals(site.state), site.state / CONTACT, address)
    setattr(internal, PULL_MESSAGE, guard.wrap(getattr(internal, PULL_MESSAGE)))
    status = 1
    try:
        flower_supernode()
        log.error("the connection to the coordinator was lost")
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 1
        if isinstance(ending.code, str):  # for example if an address is already in use
            log.error(ending.code)
    # Flower's threads would keep the process alive, which would look healthy without a connection
    logging.shutdown()
    os._exit(status)


def probe_registration(server: CoordinatorConfig) -> str:
    """Check that the coordinator's SuperLink accepts the site's key, and disconnect again.

    Returns:
        The reason if the key is refused, otherwise an empty string.

    Raises:
        OSError: if the coordinator cannot be reached.
    """
    key = read_private_key(server.key)
    public = public_key_to_bytes(key.public_key())
    try:
        with FleetHttpClient.from_server_address(
            _address(server),
            False,
            server.ca.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        ) as client:
            node = client.ActivateNode(
                ActivateNodeRequest(public_key=public, heartbeat_interval=PROBE_S)
            )
            client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
    except httpx.HTTPStatusError as error:
        said = FlowerError.from_json(error.response.text)
        return str(said.message if said else error.response.text[:200])
    except httpx.TransportError as error:
        raise OSError(str(error)) from None
    return ""


class ReleaseGuard:
    """Checks each release before Flower unpacks it, and records contact with the coordinator.

    Args:
        approvals: the site's approvals.
        contact: file to record the last contact in.
        server: address and port of the coordinator.
    """

    def __init__(self, approvals: Approvals, contact: Path, server: str) -> None:
        self.approvals = approvals
        self.contact = contact
        self.server = server
        self._since = now_utc().isoformat(timespec="seconds")
        self._noted = float("-inf")
        self._working = False
        self._releases: dict[str, str] = {}  # release digest by Flower's hash of the packed app

    def wrap(self, take_in: Callable[..., int | None]) -> Callable[..., int | None]:
        """Add the release check to Flower's function that receives a message."""

        def guarded(**given: Any) -> int | None:  # noqa: ANN401
            state, receive = given["state"], given["receive"]
            get_run, get_fab = given["get_run"], given["get_fab"]
            received: list[Message] = []

            def receive_and_note() -> Any:  # noqa: ANN401
                found = receive()
                self.record_contact(working=found is not None)
                if found is not None:
                    received.append(found[0])
                    run = state.get_run(found[0].metadata.run_id)
                    if run is not None:  # its release may have been withdrawn since
                        self.check(self._releases[run.fab_hash])
                        self.record_contact(working=True, release=self._releases[run.fab_hash])
                return found

            def get_run_of_clients(run_id: int) -> Any:  # noqa: ANN401
                run = get_run(run_id)
                if run.primary_task_type == TaskType.AGENT_APP:
                    raise Unapproved(f"{wire.UNAPPROVED}: this site runs no agents")
                return run

            def get_approved_fab(fab_hash: str, run_id: int) -> Fab:
                fab: Fab = get_fab(fab_hash, run_id)
                if hashlib.sha256(fab.content).hexdigest() != fab_hash:
                    raise Unapproved(f"{wire.UNAPPROVED}: its content does not match its hash")
                self._releases[fab_hash] = self.check_content(fab.content)
                self.record_contact(working=True, release=self._releases[fab_hash])
                return fab

            try:
                checked = {
                    "receive": receive_and_note,
                    "get_run": get_run_of_clients,
                    "get_fab": get_approved_fab,
                }
                return take_in(**{**given, **checked})
            except Unapproved as error:
                log.error("%s", error)
                (message,) = received
                reply = Message(Error(ErrorCode.INVALID_FAB, str(error)), reply_to=message)
                getattr(internal, INSERT_MESSAGE)(reply, state, given["object_store"])
                return int(message.metadata.run_id)

        return guarded

    def check_content(self, content: bytes) -> str:
        """Check that a packed app may run at this site and return its digest.

        Raises:
            Unapproved: if the app is invalid, not approved or of an incompatible version.
        """
        try:
            release = open_release(content)
        except ConfigError as error:
            raise Unapproved(f"{wire.UNAPPROVED}: {error}") from None
        self.check(release.digest)
        if not same_minor(release.version, VERSION):
            raise Unapproved(
                f"{wire.UNAPPROVED}: its version is {release.version}, this site has {VERSION}; "
                "major and minor versions of coordinator and site must be equal, so one of them "
                "has to be upgraded"
            )
        return release.digest

    def check(self, digest: str) -> None:
        """Check that a release is approved at this moment.

        Raises:
            Unapproved: if it is not, or if the list of approvals is damaged.
        """
        try:
            approved = self.approvals.approved()
        except ConfigError as error:
            raise Unapproved(f"{wire.UNAPPROVED}: {error}") from None
        if digest not in approved:
            raise Unapproved(
                f"{wire.UNAPPROVED}: this site has not approved release {digest}; to review and "
                "approve it, run polyclinic site approve"
            )

    def record_contact(self, working: bool, release: str = "") -> None:
        """Record contact with the coordinator; at most every ``CONTACT_S`` while idle.

        Args:
            working: whether a message is being processed.
            release: digest of the message's release; empty: keep the recorded one.
        """
        now = time.monotonic()
        if not working and not self._working and now - self._noted < CONTACT_S:
            return
        self._working, self._noted = working, now
        last = read_contact(self.contact)
        release = release or (last.release if last else "")
        time_now = now_utc().isoformat(timespec="seconds")
        contact = Contact(self._since, time_now, self.server, release, working)
        try:
            write_atomically(self.contact, json.dumps(vars(contact)).encode(), durable=False)
        except OSError as error:  # with a full disk, the site keeps running but looks unhealthy
            log.warning("%s: cannot be written: %s", self.contact, error.strerror)


def read_contact(path: Path) -> Contact | None:
    """Read the recorded contact; return None if there is none or the file is damaged."""
    try:
        return Contact(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _address(server: CoordinatorConfig) -> str:
    host = f"[{server.address}]" if ":" in server.address else server.address
    return f"{host}:{server.port}"
