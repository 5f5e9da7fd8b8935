"""A federation in one process: a Flower Grid that calls ClientApps directly.

Messages are real and pass through Flower's serialisation in both directions; only processes,
network and Ray are missing. tests/end_to_end/test_simulate.py uses the real runtime.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.node_pb2 import NodeInfo

Tamper = Callable[[int, Message], Message | None]


class MemoryGrid:
    """Calls each node's app when a message is pushed and returns the replies when they are pulled.

    Args:
        tamper: may change a partition's reply, or drop it by returning None.
    """

    def __init__(
        self,
        app: ClientApp,
        run_config: dict[str, bool | int | float | str],
        sites: int,
        tamper: Tamper = lambda partition, reply: reply,
    ) -> None:
        self.app = app
        self.run_config = run_config
        self.nodes = {1000 + partition: partition for partition in range(sites)}
        self.names: dict[int, str] = {}  # registered names by node, as in a deployment
        self.tamper = tamper
        self.run_id = secrets.randbits(31)
        self.sent: list[Message] = []
        self._replies: dict[str, Message] = {}

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, name=self.names.get(node, "")) for node in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        ids: list[str | None] = []
        for message in messages:
            if message.metadata.dst_node_id not in self.nodes:
                ids.append(None)  # as Flower does for an unknown node
                continue
            identity = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = identity
            self.sent.append(message)
            ids.append(identity)
            partition = self.nodes[message.metadata.dst_node_id]
            reply = self.tamper(partition, self._answer(partition, _through_wire(message)))
            if reply is not None:
                reply.metadata.__dict__["_reply_to_message_id"] = identity
                self._replies[identity] = _through_wire(reply)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def node_config(self, partition: int) -> dict[str, object]:
        return {"partition-id": partition, "num-partitions": len(self.nodes)}

    def _answer(self, partition: int, message: Message) -> Message:
        context = Context(
            run_id=self.run_id,
            node_id=1000 + partition,
            node_config=self.node_config(partition),
            state=RecordDict(),
            run_config=self.run_config,
        )
        try:
            return self.app(message, context)
        except Exception as error:  # as in Flower's runtime, the server gets an error reply
            return Message(Error(code=1, reason=repr(error)), reply_to=message)


def _through_wire(message: Message) -> Message:
    return message_from_proto(message_to_proto(message))
