"""Define the interface of Flower's Grid that the coordinator uses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo


class GridClient(Protocol):
    """The part of Flower's Grid that Polyclinic uses."""

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the connected nodes, with the names under which their keys are registered."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:
        """Send messages and return their ids; the id is None if the node is not connected."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to the given messages that have arrived."""
