"""Clients over Flower's grid: register them, hand out messages, take replies as they arrive.

Flower's own loop waits for everybody and polls every three seconds; this one polls shortly, yields each reply when it
comes, and turns errors, silence and lateness into named outcomes. A reply is matched by the message it answers,
because an error reply carries no sender.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from strategies.base import Client, client_from
from strategies.messages import BadAnswerError, read_registration, register_message

Say = Callable[[str], None]


class Watch(Protocol):
    """Is told just before and just after each message is pushed."""

    def pushing(self, client_id: str) -> None:
        """A message is about to be pushed."""

    def pushed(self, client_id: str, message: Message) -> None:
        """It has been pushed."""


class NotEnoughClientsError(RuntimeError):
    """Fewer clients than ``min-clients`` came, registered or answered."""


@dataclass(frozen=True)
class Reply:
    """What became of one message: the reply, or None when the time ran out."""

    client_id: str
    message: Message | None
    seconds: float


class Federation:
    """The clients of one run.

    Args:
        grid: Flower's.
        poll_interval: seconds between looks for replies.
        say: called with progress messages.
    """

    def __init__(self, grid: Grid, poll_interval: float, say: Say) -> None:
        self.grid = grid
        self.poll_interval = poll_interval
        self.say = say
        self.clients: dict[str, Client] = {}
        self.refused: dict[str, str] = {}

    def wait_for_nodes(self, minimum: int, timeout: float) -> list[NodeInfo]:
        """Nodes that are online, once there are ``minimum``; a message every few seconds while waiting.

        Raises:
            NotEnoughClientsError: the time ran out.
        """
        started = time.monotonic()
        next_word = started + 2
        while True:
            nodes = sorted(self.grid.get_nodes(), key=lambda node: node.node_id)
            if len(nodes) >= minimum:
                return nodes
            now = time.monotonic()
            if now - started > timeout:
                raise NotEnoughClientsError(
                    f"{len(nodes)} of at least {minimum} SuperNodes are online after {timeout:.0f} s "
                    "(startup-timeout); start the missing ones, or lower min-clients"
                )
            if now >= next_word:
                self.say(f"waiting for clients: {len(nodes)} of at least {minimum} SuperNodes online")
                next_word = now + 10
            time.sleep(max(self.poll_interval, 0.2))

    def register(self, minimum: int, timeout: float, watch: Watch) -> Iterator[Reply]:
        """Ask every online node who it is; yields the replies in order of arrival, by the name ``node <id>``.

        Clients that may take part are in ``clients`` afterwards; refusals (errors, bad registrations, an id that
        belongs to somebody else) in ``refused``.

        Raises:
            NotEnoughClientsError: fewer than ``minimum`` registered; names what went wrong.
        """
        deadline = time.monotonic() + timeout
        nodes = {node.node_id: node for node in self.wait_for_nodes(minimum, timeout)}
        messages = {f"node {node_id}": register_message(node_id, ttl=timeout) for node_id in nodes}
        for reply in self.exchange(messages, max(deadline - time.monotonic(), self.poll_interval), watch):
            yield reply
            if reply.message is None:
                self.refused[reply.client_id] = "did not answer in time"
                continue
            try:
                registration, layout = read_registration(reply.message)
                client = client_from(registration, layout, reply.message.metadata.src_node_id)
                self._require_own_id(client, nodes[client.node_id])
            except BadAnswerError as error:
                self.refused[reply.client_id] = str(error)
                self.say(f"refused: {error}")
                continue
            self.clients[client.id] = client
        if len(self.clients) < minimum:
            reasons = "; ".join(f"{who}: {why}" for who, why in self.refused.items())
            raise NotEnoughClientsError(f"{len(self.clients)} of at least {minimum} clients registered. {reasons}")

    def exchange(self, messages: Mapping[str, Message], timeout: float, watch: Watch) -> Iterator[Reply]:
        """Push one message per client and yield replies as they arrive; None for those that do not in ``timeout`` s."""
        started = time.monotonic()
        waiting: dict[str, str] = {}
        for client_id, message in messages.items():
            watch.pushing(client_id)
            for message_id in self.grid.push_messages([message]):
                waiting[message_id] = client_id
            watch.pushed(client_id, message)
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                client_id = waiting.pop(reply.metadata.reply_to_message_id, "")
                if client_id:
                    yield Reply(client_id, reply, time.monotonic() - started)
            if time.monotonic() - started > timeout:
                break
            if waiting:
                time.sleep(self.poll_interval)
        for client_id in waiting.values():
            yield Reply(client_id, None, time.monotonic() - started)

    def _require_own_id(self, client: Client, node: NodeInfo) -> None:
        """A node registered under a name with the SuperLink may use that id only; an id belongs to one node."""
        if node.name and node.name != client.id:
            raise BadAnswerError(
                f"node {node.node_id} claims client-id {client.id!r}, but its key is registered as {node.name!r}"
            )
        holder = self.clients.get(client.id)
        if holder is not None and holder.node_id != client.node_id:
            raise BadAnswerError(
                f"node {client.node_id} claims client-id {client.id!r}, which node {holder.node_id} holds already"
            )
