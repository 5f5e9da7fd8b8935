"""Flower's SuperNode, with what a coordinator cannot switch off: only approved releases run.

This is the one module that touches internals of Flower's SuperNode (1.41): its function that takes
one message in is given a ``get_fab`` that asks ``client.policy.approvals`` first. An app that is
not approved is neither unpacked nor run; the message is answered with an error that says so.
tests/client/node/test_supernode.py fails when a new Flower moves any of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
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
from polyclinic.configs import VERSION, wire
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.schema.site import CoordinatorConfig, SiteConfig
from polyclinic.configs.security.credentials import now_utc, read_private_key
from polyclinic.configs.security.release import open_release

log = logging.getLogger("flwr.polyclinic")  # beside Flower's own lines

TAKES_IN = "_pull_and_store_message"
PUTS_BACK = "_insert_message"
ASKED_FOR = "receive", "get_run", "get_fab", "state", "object_store"

CONTACT = "contact.json"
CONTACT_S = 10.0  # between two notes that the coordinator was heard
KNOCK_S = 30.0  # heartbeat that a knock promises; it leaves at once


class Unapproved(Exception):
    """A release that this site has not approved. The message says which."""


@dataclass(frozen=True)
class Contact:
    """When the coordinator was last heard, and what this site does for it."""

    since: str  # the connection's start, UTC
    last: str
    server: str
    release: str = ""  # of the last message
    working: bool = False  # on a message; nothing more is asked for until it is answered


def start_supernode(site_file: Path, site: SiteConfig, health: str | None) -> NoReturn:
    """Connect a site, and do what it is asked for until it is stopped.

    Args:
        health: address of the gRPC health service; none if absent.

    Raises:
        SystemExit: with a status that is not 0 if the connection cannot be made or is lost for
            good; whatever started this starts it again.
    """
    server = site.server
    assert server is not None
    place = _place(server)
    sys.argv = [
        "flower-supernode",
        *("--root-certificates", str(server.ca)),
        *("--superlink", place),
        *("--auth-supernode-private-key", str(server.key)),
        *("--node-config", f'site-config="{site_file.resolve()}"'),
        *("--host", "127.0.0.1", "--port", str(_free_port())),
        *(("--health-server-address", health) if health else ()),
    ]
    os.environ.setdefault("FLWR_HOME", str(site.state / "flwr"))
    os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    gate = ReleaseGuard(Approvals(site.state), site.state / CONTACT, place)
    setattr(internal, TAKES_IN, gate.wrap(getattr(internal, TAKES_IN)))
    status = 1
    try:
        flower_supernode()
        log.error("the connection to the coordinator was lost")
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 1
        if isinstance(ending.code, str):  # as where an address is taken
            log.error(ending.code)
    # Flower's threads would keep the process alive, deaf and looking healthy
    logging.shutdown()
    os._exit(status)


def probe_registration(server: CoordinatorConfig) -> str:
    """Ask the coordinator's SuperLink whether it takes this site's key, and leave again.

    Returns:
        Why it does not; empty if it does.

    Raises:
        OSError: if it cannot be reached.
    """
    key = read_private_key(server.key)
    public = public_key_to_bytes(key.public_key())
    try:
        with FleetHttpClient.from_server_address(
            _place(server),
            False,
            server.ca.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        ) as client:
            node = client.ActivateNode(
                ActivateNodeRequest(public_key=public, heartbeat_interval=KNOCK_S)
            )
            client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))
    except httpx.HTTPStatusError as error:
        said = FlowerError.from_json(error.response.text)
        return str(said.message if said else error.response.text[:200])
    except httpx.TransportError as error:
        raise OSError(str(error)) from None
    return ""


class ReleaseGuard:
    """Stands between Flower and the code that a coordinator ships.

    Args:
        contact: file for the sign of life.
    """

    def __init__(self, approvals: Approvals, contact: Path, server: str) -> None:
        self.approvals = approvals
        self.contact = contact
        self.server = server
        self._since = now_utc().isoformat(timespec="seconds")
        self._noted = float("-inf")
        self._working = False
        self._releases: dict[str, str] = {}  # Flower's hash of a packed app: the release's digest

    def wrap(self, take_in: Callable[..., int | None]) -> Callable[..., int | None]:
        """Flower's function that takes one message in, with the check inside."""

        def guarded(**given: Any) -> int | None:  # noqa: ANN401
            state, receive = given["state"], given["receive"]
            get_run, get_fab = given["get_run"], given["get_fab"]
            taken: list[Message] = []

            def receive_and_note() -> Any:  # noqa: ANN401
                found = receive()
                self.record_contact(working=found is not None)
                if found is not None:
                    taken.append(found[0])
                    run = state.get_run(found[0].metadata.run_id)
                    if run is not None:  # it may have been withdrawn since its first message
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
                    raise Unapproved(f"{wire.UNAPPROVED}: its content is not what its hash says")
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
                (message,) = taken
                reply = Message(Error(ErrorCode.INVALID_FAB, str(error)), reply_to=message)
                getattr(internal, PUTS_BACK)(reply, state, given["object_store"])
                return int(message.metadata.run_id)

        return guarded

    def check_content(self, content: bytes) -> str:
        """See that a packed app may run here; its digest.

        Raises:
            Unapproved: if not.
        """
        try:
            release = open_release(content)
        except ConfigError as error:
            raise Unapproved(f"{wire.UNAPPROVED}: {error}") from None
        self.check(release.digest)
        if not same_minor(release.version, VERSION):
            raise Unapproved(
                f"{wire.UNAPPROVED}: it is of version {release.version}, what is installed here of "
                f"{VERSION}; the coordinator and this site must agree in the first two numbers, so "
                "one of them has to be upgraded"
            )
        return release.digest

    def check(self, digest: str) -> None:
        """See that a release is approved, as the file of decisions is now."""
        try:
            approved = self.approvals.approved()
        except ConfigError as error:
            raise Unapproved(f"{wire.UNAPPROVED}: {error}") from None
        if digest not in approved:
            raise Unapproved(
                f"{wire.UNAPPROVED}: this site has not approved release {digest}; polyclinic site "
                "approve shows and approves one"
            )

    def record_contact(self, working: bool, release: str = "") -> None:
        """Note that the coordinator answered, seldom while there is nothing to do.

        Args:
            release: of the message, once it is known; the last one's before.
        """
        now = time.monotonic()
        if not working and not self._working and now - self._noted < CONTACT_S:
            return
        self._working, self._noted = working, now
        last = read_contact(self.contact)
        release = release or (last.release if last else "")
        time_now = now_utc().isoformat(timespec="seconds")
        contact = Contact(self._since, time_now, self.server, release, working)
        part = self.contact.with_suffix(".part")
        try:
            part.write_text(json.dumps(vars(contact)), encoding="utf-8")
            part.replace(self.contact)
        except OSError as error:  # a full disk does not end the site, which will look unwell
            log.warning("%s: cannot be written: %s", self.contact, error.strerror)


def read_contact(path: Path) -> Contact | None:
    """What was last noted of the coordinator; None if nothing was, or the note is damaged."""
    try:
        return Contact(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def same_minor(one: str, other: str) -> bool:
    """Whether two versions are the same in their first two numbers."""
    return one.split(".")[:2] == other.split(".")[:2]


def _place(server: CoordinatorConfig) -> str:
    host = f"[{server.address}]" if ":" in server.address else server.address
    return f"{host}:{server.port}"


def _free_port() -> int:
    """For the SuperNode's own app processes, on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
