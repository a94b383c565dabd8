"""A whole federation in one process: Flower's Grid interface on one side, the real ClientApp on the other.

There is no network and no new process, but the messages, handlers, slots on disk and round loop are those of a
deployment. So strategies can be tried in seconds. Each message is answered when it is pulled. There is no wire to
measure.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from client_app.guard.noise import keep_secret

FIRST_NODE = 2
"""Node 1 is the SuperLink; the ledger does not record its answers as a client's."""
Tamper = Callable[[int, Message, Message | None], Message | None]


@functools.cache
def _keep_libraries() -> None:
    """Before a process has its first run: what there is was made by libraries, and stays.

    Clients collect garbage whenever one of them loads a model. If the collector looks at the libraries again each time,
    that takes more than half of the time of many small clients in one process.
    """
    import client_app.session  # noqa: F401 - these two with all that they import
    import server_app.run.loop  # noqa: F401

    gc.collect()
    gc.freeze()


class InProcessGrid(Grid):
    """A grid whose nodes are direct calls of the ClientApp.

    Args:
        clients: number of nodes; node ids start at ``FIRST_NODE``, partitions at 0.
        state_dir: where clients keep their slots.
        run_config: the clients' run-config.
        node_config: gives more node-config for the client with an index.
        tamper: may replace a reply, or drop it by returning None.
    """

    def __init__(
        self,
        clients: int,
        state_dir: Path,
        run_config: dict[str, Any],
        node_config: Callable[[int], dict[str, Any]] | None = None,
        tamper: Tamper | None = None,
    ) -> None:
        _keep_libraries()
        self.clients = clients
        self.state_dir = state_dir
        self.run_config = run_config
        self.node_config = node_config or (lambda index: {})
        self.tamper = tamper
        self.queue: dict[str, Message] = {}
        self.count = 0
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # as Flower does at a process start

    def context(self, node_id: int) -> Context:
        """The context that Flower would give to a node's ClientApp."""
        index = node_id - FIRST_NODE
        node: dict[str, Any] = {"partition-id": index, "num-partitions": self.clients, "state-dir": str(self.state_dir)}
        node["client.accept-keys"] = "all"  # the user who starts this also owns the clients
        node |= self.node_config(index)
        # One user owns both sides, so nothing must be hidden, and a run gives the same numbers again.
        keep_secret(Path(str(node["state-dir"])), str(node.get("client-id", f"client-{index}")), b"in one process")
        return Context(
            run_id=1,
            node_id=node_id,
            node_config=node,
            state=RecordDict(),
            run_config=self.run_config,
        )

    def set_run(self, run: Any) -> None:
        """Not used here."""
        raise NotImplementedError

    @property
    def run(self) -> Any:
        """Not used here."""
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not used here."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return range(FIRST_NODE, FIRST_NODE + self.clients)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All nodes."""
        return [NodeInfo(node_id=node_id) for node_id in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Number the messages, and keep them until their answers are pulled."""
        names = []
        for message in messages:
            self.count += 1
            name = f"message-{self.count}"
            message.metadata.__dict__["_message_id"] = name
            message.metadata.__dict__["_src_node_id"] = 0
            self.queue[name] = message
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer these messages now."""
        replies = []
        for name in list(message_ids):
            message = self.queue.pop(name, None)
            if message is None:
                continue
            reply: Message | None = self.answer(message)
            if self.tamper is not None:
                reply = self._tampered(self.tamper, message, reply)
            if reply is not None:
                replies.append(reply)
        return replies

    def _tampered(self, tamper: Tamper, message: Message, reply: Message | None) -> Message | None:
        try:
            return tamper(message.metadata.dst_node_id, message, reply)
        except Exception as error:  # a mistake of ours, which must not pass for an answer that cannot be read
            raise RuntimeError(f"tamper failed: {type(error).__name__}: {error}") from error

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull."""
        return self.pull_messages(list(self.push_messages(messages)))

    def answer(self, message: Message) -> Message:
        """The node's answer; an exception becomes an error reply, as in Flower's ClientApp process."""
        from client_app.app import app
        from client_app.guard.disclosure import ClientError

        node_id = message.metadata.dst_node_id
        try:
            return app(message, self.context(node_id))
        except ClientError as error:  # its message is in the log, which is this terminal
            return Message(Error(code=2, reason=f"{type(error)}:<'{error}'>"), reply_to=message)
