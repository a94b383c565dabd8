"""The bridge to Flower: every strategy is also a genuine Flower ``Strategy``.

Our own ServerApp runs a strategy by its contract, because Flower's loop can neither resume nor take answers as they
arrive. Flower's loop runs the same class, by ``strategy.start(grid, initial_arrays=ArrayRecord(), ...)``. There a
round also delivers. For the client, each delivery gets a round number of its own: a second plan with the number of the
round would start from the slots before that round, and discard its training.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log as log  # for strategies, which import nothing of Flower themselves
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedalloy_adapters.bank.store import Storage
from strategies.framework.answers import answer_from, read_client
from strategies.framework.contract import Contract, OptionsT
from strategies.framework.dispatch import Dispatch, register_message
from strategies.framework.exchange import Answer, BadAnswerError, Brief, Client, StrategyError
from strategies.framework.holdings import Holdings
from strategies.framework.limits import within_round
from strategies.framework.training import Training

_INFO, _WARNING = 20, 30
_REGISTRATION_SECONDS = 300.0


class AlloyStrategy(Contract[OptionsT], Strategy):
    """Base of all strategies: the contract, run by Flower."""

    def __init__(
        self,
        options: OptionsT | None = None,
        training: Training | None = None,
        seed: int = 0,
        rounds: int = 0,
        storage: Storage | None = None,
    ) -> None:
        super().__init__(options, training, seed, rounds, storage)
        self._pending: list[tuple[Message, Client, Dispatch]] = []
        self._holdings = Holdings(self.storage)
        self._flower_key = secrets.token_bytes(32)
        self._flower_run = f"flower-{secrets.token_hex(8)}"  # a folder at the clients that no earlier run has used

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Register clients in the first round, then send each client one message with its own plan and adapters."""
        if not self.clients:
            self._enrol_all(grid)
        briefs = {client: self.brief(server_round, client) for client in self.clients.values()}
        return self._messages(briefs, 2 * server_round - 1, server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Absorb good answers, name bad ones in the log, settle."""
        self._absorb_all(server_round, replies, absorb=True)
        self.settle(server_round)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Deliver every client its personal model as it is after this round."""
        briefs = {client: self.deliver(client) for client in self.clients.values()}
        return self._messages(briefs, 2 * server_round, self.rounds + 1)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean and worst client accuracy of the personal models (of tasks that have an accuracy)."""
        personal = [answer.metrics["personal"] for answer in self._absorb_all(server_round, replies, absorb=False)]
        scores = [metrics["accuracy"] for metrics in personal if "accuracy" in metrics]
        if not scores:
            return None
        return MetricRecord({"mean-accuracy": sum(scores) / len(scores), "worst-accuracy": min(scores)})

    def summary(self) -> None:
        """Log the options."""
        log(_INFO, "\t├──> FedAlloy strategy %r: %s", self.name, self.options)

    def _enrol_all(self, grid: Grid) -> None:
        """Register every node; one that cannot take part is named in the log and left out."""
        asked = {node: register_message(node, _REGISTRATION_SECONDS) for node in sorted(grid.get_node_ids())}
        replies = {
            reply.metadata.reply_to_message_id: reply
            for reply in grid.send_and_receive(list(asked.values()), timeout=_REGISTRATION_SECONDS)
        }
        found: dict[str, Client] = {}
        for node, message in asked.items():
            try:
                if message.metadata.message_id not in replies:
                    raise BadAnswerError(f"node {node} did not answer in {_REGISTRATION_SECONDS:.0f} s")
                client = read_client(replies[message.metadata.message_id], node, self.limits)
                holder = found.setdefault(client.id, client)
                if holder.node_id != node:
                    raise BadAnswerError(
                        f"node {node} claims client-id {holder.id!r}, which node {holder.node_id} holds already"
                    )
            except BadAnswerError as error:
                log(_WARNING, "refused: %s", error)
        for _, refused in self.take_in(found.values()):
            if refused is not None:
                log(_WARNING, "refused: %s", refused)
        if not self.clients:
            raise StrategyError(
                f"no client registered; {len(asked)} nodes are online (the log says why they are refused)"
            )

    def _messages(self, briefs: Mapping[Client, Brief], round_: int, train_round: int) -> list[Message]:
        self._pending = []
        self._holdings.tidy()
        for client, brief in briefs.items():
            dispatch = self.dispatch(
                *(round_, client, brief, self._flower_run, self._flower_key),
                holding=self._holdings.of(client.id),
                train_round=train_round,
            )
            self._pending.append((dispatch.message(client.node_id), client, dispatch))
        return [message for message, _, _ in self._pending]

    def _absorb_all(self, round_: int, replies: Iterable[Message], *, absorb: bool) -> list[Answer]:
        # By the message that is answered (the grid numbers messages when it sends them): errors carry no sender.
        asked = {message.metadata.message_id: (client, dispatch) for message, client, dispatch in self._pending}
        answers: dict[str, Answer] = {}
        for reply in replies:
            if reply.metadata.reply_to_message_id not in asked:
                continue
            client, dispatch = asked.pop(reply.metadata.reply_to_message_id)
            try:
                answers[client.id] = answer_from(dispatch, reply, self.limits)
                self._holdings.answered(client.id)
            except BadAnswerError as error:
                self._holdings.forget(client.id)  # it is sent everything whole the next time
                log(_WARNING, "%s", error)
        answers = within_round(self.limits, answers)
        for client_id, answer in answers.items() if absorb else ():
            self.absorb(round_, self.clients[client_id], answer)
        for client, _ in asked.values():
            self._holdings.forget(client.id)
            log(_WARNING, "client %r did not answer in time", client.id)
        return list(answers.values())
