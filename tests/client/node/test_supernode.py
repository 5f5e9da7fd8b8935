"""The release guard around Flower's SuperNode: which releases it lets run.

tests/deployment/test_deployment.py tests the same with real processes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supernode import start_client_internal as internal

from polyclinic.client.node import supernode
from polyclinic.client.node.supernode import (
    INSERT_MESSAGE,
    PULL_ARGUMENTS,
    PULL_MESSAGE,
    ReleaseGuard,
    read_contact,
)
from polyclinic.client.policy.approvals import Approvals
from polyclinic.configs import VERSION, same_minor, wire
from polyclinic.configs.schema.site import CoordinatorConfig, SiteConfig
from tests.factories import app, packed


def test_flower_message_hooks_match_the_release_guard() -> None:
    """Fails when a new Flower version changes the functions that client/node/supernode.py wraps."""
    takes_in = inspect.signature(getattr(internal, PULL_MESSAGE)).parameters
    assert set(PULL_ARGUMENTS) <= set(takes_in)
    assert list(inspect.signature(getattr(internal, INSERT_MESSAGE)).parameters) == [
        *("msg", "state", "store")
    ]
    loop = inspect.getsource(internal.start_client_internal)
    assert f"run_id = {PULL_MESSAGE}(" in loop
    for name in PULL_ARGUMENTS:
        assert f"{name}=" in loop  # keyword arguments, as the guard expects
    body = inspect.getsource(getattr(internal, PULL_MESSAGE))
    assert body.index("get_fab(run_info.fab_hash, run_id)") < body.index("state.store_fab(fab)")
    assert body.index("get_run(run_id)") < body.index("get_fab(run_info.fab_hash, run_id)")
    assert body.index("get_fab(") < body.index("state.create_task(")
    others = inspect.getsource(internal).count("get_fab(")
    assert others == body.count("get_fab(")  # a packed app is fetched nowhere else


class Node:
    """Flower's side: one message with its run and packed app, and the outcome."""

    def __init__(self, content: bytes, task_type: str = TaskType.SERVER_APP) -> None:
        self.content = content
        self.hash = hashlib.sha256(content).hexdigest()
        self.task_type = task_type
        self.known: dict[int, SimpleNamespace] = {}
        self.ran: list[bytes] = []
        self.replies: list[Message] = []

    def take_in(self, **given) -> int | None:
        """Take in a message as Flower's function does, without the network."""
        found = given["receive"]()
        if found is None:
            return None
        run_id = found[0].metadata.run_id
        if given["state"].get_run(run_id) is None:
            run = given["get_run"](run_id)
            fab = given["get_fab"](run.fab_hash, run_id)
            self.known[run_id] = run
            self.content_here = fab.content
        self.ran.append(self.content_here)
        return run_id

    def pull(self, guard: ReleaseGuard, monkeypatch: pytest.MonkeyPatch, nothing: bool = False):
        message = Message(RecordDict(), dst_node_id=1, message_type=wire.TRAIN)
        message.metadata.__dict__["_message_id"] = "m"
        run = SimpleNamespace(fab_hash=self.hash, primary_task_type=self.task_type)
        monkeypatch.setattr(
            internal, INSERT_MESSAGE, lambda msg, state, store: self.replies.append(msg)
        )
        return guard.wrap(self.take_in)(
            state=SimpleNamespace(get_run=self.known.get),
            object_store=None,
            receive=lambda: None if nothing else (message, None),
            get_run=lambda run_id: run,
            get_fab=lambda fab_hash, run_id: Fab(fab_hash, self.content, {}),
        )


@pytest.fixture
def guard(tmp_path: Path, flower_identity: None) -> ReleaseGuard:
    return ReleaseGuard(Approvals(tmp_path), tmp_path / "contact.json", "fl.example.org:9092")


def test_guard_runs_only_an_approved_release(guard, monkeypatch) -> None:
    node = Node(packed(app()))
    assert node.pull(guard, monkeypatch) is not None
    assert node.ran == []
    (reply,) = node.replies
    assert reply.error.code == ErrorCode.INVALID_FAB
    assert reply.error.reason.startswith(wire.UNAPPROVED)
    decision = guard.approvals.approve(node.content)
    assert decision.digest in reply.error.reason
    node.pull(guard, monkeypatch)
    assert node.ran == [node.content]
    without_gate = Node(packed(app(client__gate="pass\n")))
    without_gate.pull(guard, monkeypatch)
    assert without_gate.ran == []


def test_guard_blocks_a_withdrawn_release(guard, monkeypatch) -> None:
    node = Node(packed(app()))
    decision = guard.approvals.approve(node.content)
    node.pull(guard, monkeypatch)
    guard.approvals.withdraw(decision.digest)
    node.pull(guard, monkeypatch)
    assert len(node.ran) == 1
    assert decision.digest in node.replies[0].error.reason


def test_guard_refuses_another_minor_version_with_reason(guard, monkeypatch) -> None:
    content = packed({**app(), "pyproject.toml": '[project]\nversion = "9.8.7"\n'})
    guard.approvals.approve(content)
    node = Node(content)
    node.pull(guard, monkeypatch)
    assert node.ran == []
    assert f"its version is 9.8.7, this site has {VERSION}" in node.replies[0].error.reason
    assert same_minor("0.1.0", "0.1.7")
    assert not same_minor("0.1.0", "0.2.0")


def test_guard_refuses_content_with_wrong_hash(guard, monkeypatch) -> None:
    node = Node(packed(app()))
    guard.approvals.approve(node.content)
    node.hash = "0" * 64
    node.pull(guard, monkeypatch)
    assert node.ran == []
    assert "its content does not match its hash" in node.replies[0].error.reason


def test_guard_refuses_agents_and_invalid_releases(guard, monkeypatch) -> None:
    agent = Node(packed(app()), TaskType.AGENT_APP)
    guard.approvals.approve(agent.content)
    agent.pull(guard, monkeypatch)
    rubbish = Node(b"rubbish")
    rubbish.pull(guard, monkeypatch)
    assert agent.ran == rubbish.ran == []
    assert "this site runs no agents" in agent.replies[0].error.reason
    assert "expected a packed app" in rubbish.replies[0].error.reason


def test_guard_with_damaged_decisions_runs_nothing(guard, monkeypatch) -> None:
    node = Node(packed(app()))
    guard.approvals.approve(node.content)
    guard.approvals.log.write_text("rubbish")
    node.pull(guard, monkeypatch)
    assert node.ran == []
    assert "is damaged" in node.replies[0].error.reason


def test_guard_records_contact_with_the_coordinator(guard, monkeypatch) -> None:
    node = Node(packed(app()))
    digest = guard.approvals.approve(node.content).digest
    assert read_contact(guard.contact) is None
    assert node.pull(guard, monkeypatch, nothing=True) is None
    contact = read_contact(guard.contact)
    assert (contact.server, contact.working, contact.release) == ("fl.example.org:9092", False, "")
    node.pull(guard, monkeypatch)
    contact = read_contact(guard.contact)
    assert (contact.working, contact.release) == (True, digest)
    node.pull(guard, monkeypatch, nothing=True)
    contact = read_contact(guard.contact)
    assert (contact.working, contact.release) == (False, digest)
    guard.contact.write_text(json.dumps({"no": "contact"}))
    assert read_contact(guard.contact) is None


def test_flower_exit_reason_is_logged_and_process_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ends() -> None:
        raise SystemExit("Port in server address 127.0.0.1:9098 is already in use.")

    def left(status: int) -> None:
        raise KeyboardInterrupt(status)

    monkeypatch.setattr(supernode, "flower_supernode", ends)
    monkeypatch.setattr(supernode.os, "_exit", left)
    monkeypatch.setattr(supernode.logging, "shutdown", lambda: None)
    monkeypatch.setattr(supernode.sys, "argv", ["polyclinic"])
    monkeypatch.setattr(internal, PULL_MESSAGE, getattr(internal, PULL_MESSAGE))
    for name in ("FLWR_HOME", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    server = CoordinatorConfig(address="fl.example.org", port=9092)
    site = SiteConfig(name="a", data_root=tmp_path, state=tmp_path, server=server)
    with caplog.at_level("ERROR", "flwr"), pytest.raises(KeyboardInterrupt, match="1"):
        supernode.start_supernode(tmp_path / "site.yaml", site, "127.0.0.1:9098")
    assert "127.0.0.1:9098 is already in use" in caplog.text
