"""The participants of a run: reads registrations, keeps ids for their owners, enrols newcomers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from flwr.app import Message
from flwr.common.logger import log
from flwr.proto.node_pb2 import NodeInfo

from fedalloy_adapters.words import one_line
from proto.fedalloy.v1 import report_pb2
from server_app.run.clients.rehearsal import why_not_for_private_clients
from server_app.run.messages.exchange import NODE_UNAVAILABLE
from server_app.run.messages.reasons import SILENT, reason_of
from server_app.run.resume import SavedClient
from server_app.run.run_directory import RunDirectory
from strategies import AlloyStrategy
from strategies.framework.answers import claimed_id, read_client
from strategies.framework.exchange import MAX_REASON, BadAnswerError, Client
from strategies.framework.training import settings_words

INFO, WARNING = 20, 30


class Enrolment:
    """The clients of one run by id, and those that were refused; ``site_mode`` is the option."""

    def __init__(self, strategy: AlloyStrategy[Any], directory: RunDirectory, site_mode: str = "allowed") -> None:
        self.strategy = strategy
        self.site_mode = site_mode
        self.directory = directory
        self.clients: dict[str, Client] = {}
        """Clients that the strategy has enrolled."""
        self.newcomers: dict[str, Client] = {}
        """Clients that have registered since the last enrolment of newcomers."""
        self.refused: dict[str, str] = {}
        """Reasons of refusals by client id; if the id is not known, by the name of the client's key or by node."""
        self.away: dict[str, str] = {}
        """Nodes that went away while they were asked to register, and how that showed; they are absent, not refused."""
        self.names: dict[str, str] = {}
        """The name under which the SuperLink knows the key of each client's node; empty if it has none."""
        self._labels: dict[int, str] = {}
        self._said: set[str] = set()
        self._lends: dict[str, bool] = {}  # each owner's last word
        self._not_private: dict[bytes, str] = {}  # by layout, why clients under differential privacy cannot take part
        self.keys: dict[str, bytes] = {}
        """The public key of each id's owner."""

    def welcome(self, who: str, node: NodeInfo, answer: Message | None, online: Collection[int]) -> Client | None:
        """Read a registration: a newcomer, or a client that is back at another node; None if there is neither.

        Args:
            who: the node's name in refusals.
            node: the node that was asked.
            answer: the registration; None if none came in time.
            online: ids of the nodes that are online.
        """
        claimed = ""
        if answer is not None and answer.has_error() and answer.error.code == NODE_UNAVAILABLE:
            self.away[node.name or who] = reason_of(answer.error)
            log(WARNING, "absent: %s: %s", node.name or who, self.away[node.name or who])
            return None
        try:
            if answer is None:
                raise BadAnswerError(SILENT)
            if answer.has_error():
                raise BadAnswerError(reason_of(answer.error))
            claimed = claimed_id(answer)
            admitted = self._admit(read_client(answer, node.node_id, self.strategy.limits), node, online)
        except BadAnswerError as error:
            held = {*self.clients, *self.newcomers}
            label = node.name or (claimed if claimed and claimed not in held else who)
            self._labels[node.node_id] = label
            self._refuse(label, str(error))
            return None
        self.forgive(node.node_id)
        self.refused.pop(admitted.id, None)
        for name in (admitted.id, node.name, who):
            self.away.pop(name, None)
        self.names[admitted.id] = node.name
        return admitted

    def lends(self, client: Client) -> bool:
        """Whether newcomers may be given this client's adapter: its owner's last word."""
        return self._lends.get(client.id, client.registration.lends_adapter)

    def node_of(self, label: str) -> dict[str, str]:
        """The node that is refused under this label, as a record has it; empty if it is not known."""
        return next(({"node": str(node)} for node, name in self._labels.items() if name == label), {})

    def forgive(self, node_id: int) -> None:
        """Forget why the node was refused; it registers again."""
        self.refused.pop(self._labels.pop(node_id, ""), None)

    def restore(self, saved: Iterable[SavedClient]) -> None:
        """Enrol a resumed run's clients in their original order, whether they are back or not."""
        for known in saved:
            came = self.newcomers.pop(known.client.id, None)
            if came is not None and came.layout.digest != known.client.layout.digest:
                difference = known.client.layout.describe_difference(came.layout)
                self._refuse(came.id, f"client {came.id!r} came back with {difference}")
                came = None
            client = replace(known.client, node_id=came.node_id if came is not None else 0)
            self.strategy.enrol(client)
            self.clients[client.id] = client

    def enrol_newcomers(self) -> None:
        """Enrol newcomers in order of votes and id, not of arrival; their registrations are kept for a resumed run."""
        newcomers = [client for client in self.newcomers.values() if self._is_private_enough(client)]
        self.newcomers.clear()
        for client, refused in self.strategy.take_in(newcomers):
            if client.examples < client.claimed:
                log(WARNING, "%s counts for %d examples, not %d", client.id, client.examples, client.claimed)
            if refused is not None:
                self._refuse(client.id, refused)
                self.keys.pop(client.id, None)  # a refused client does not keep the id from its owner
                continue
            self.directory.save_registration(client.id, client.registration_kept())
            self.clients[client.id] = client
            said = settings_words(self.strategy.training, client.kinds, client.layout)
            if said and said not in self._said:
                self._said.add(said)
                log(INFO, "%s", said)

    def why_refused(self) -> str:
        """The refused clients with reasons, in one line."""
        return "; ".join(f"{who}: {why}" for who, why in self.refused.items())

    def why_missing(self) -> str:
        """The clients that were refused or went away, with reasons, in one line."""
        return "; ".join(f"{who}: {why}" for who, why in {**self.away, **self.refused}.items())

    def _admit(self, client: Client, node: NodeInfo, online: Collection[int]) -> Client:
        """Check a client's id: a node that the SuperLink knows by name may use only that id; an id belongs to one node.

        Without keys a restarted node is a new node: it gets its id back when the old one is gone.
        """
        if node.name and node.name != client.id:
            raise BadAnswerError(
                f"node {node.node_id} claims client-id {client.id!r}, but its key is registered as {node.name!r}"
            )
        installed = client.registration.trainer == report_pb2.TRAINER_MODE_INSTALLED
        if self.site_mode != "allowed" and installed != (self.site_mode == "required"):
            whose = "its owner has installed" if installed else "the run brings"
            raise BadAnswerError(
                f"client {client.id!r} has a trainer that {whose}, but site-mode is {self.site_mode!r}"
            )
        holder = self.clients.get(client.id) or self.newcomers.get(client.id)
        key = self.keys.get(client.id) or node.public_key
        moved = holder is not None and holder.node_id != client.node_id
        if key != node.public_key or (holder is not None and moved and holder.node_id in online):
            held = f"node {holder.node_id}" if holder is not None else "a node with another key"
            raise BadAnswerError(f"node {client.node_id} claims client-id {client.id!r}, which {held} holds already")
        self.keys[client.id] = node.public_key
        self._lends[client.id] = client.registration.lends_adapter
        if client.id not in self.clients:
            self.newcomers[client.id] = client
            return client
        known = self.clients[client.id]
        if known.layout.digest != client.layout.digest:
            difference = known.layout.describe_difference(client.layout)
            raise BadAnswerError(f"client {client.id!r} came back with {difference}")
        self.clients[client.id] = replace(known, node_id=client.node_id)
        return self.clients[client.id]

    def _is_private_enough(self, client: Client) -> bool:
        """Refuse a client whose privacy budget the strategy would spend before asking for what is not private."""
        if not client.registration.HasField("privacy"):
            return True
        layout = client.layout.digest
        if layout not in self._not_private:
            self._not_private[layout] = why_not_for_private_clients(self.strategy, client)
        if why := self._not_private[layout]:
            self._refuse(client.id, why)
            self.keys.pop(client.id, None)
        return not why

    def _refuse(self, client_id: str, reason: str) -> None:
        self.refused[client_id] = one_line(reason, MAX_REASON)
        log(WARNING, "refused: %s: %s", client_id, self.refused[client_id])
