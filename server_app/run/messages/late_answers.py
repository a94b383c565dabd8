"""Answers that a round did not wait for: they count in the next one with the weight that the strategy gives them.

If the strategy gives them no weight, nothing is kept. An answer is used once, in the round in which it arrives, unless
its client has also answered that round. Answers on their way when a run is killed are lost.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flwr.app import Message

from fedalloy_adapters.bank.store import Bank
from strategies.framework.answers import answer_from
from strategies.framework.dispatch import Dispatch
from strategies.framework.exchange import Answer, BadAnswerError, Client
from strategies.framework.flower import AlloyStrategy


class LateAnswers:
    """The requests to clients that did not answer in time, and the answers that have come since."""

    def __init__(self, strategy: AlloyStrategy[Any]) -> None:
        self.strategy = strategy
        self._asked: dict[str, tuple[int, Dispatch]] = {}
        self._here: dict[str, tuple[int, Answer]] = {}

    def expect(self, round_: int, client_id: str, dispatch: Dispatch) -> None:
        """Expect a late answer of a client that did not answer in time."""
        if self.strategy.late_weight(1) > 0:
            self._asked[client_id] = (round_, dispatch)

    def take(self, client_id: str, reply: Message) -> bool:
        """Keep a reply if it is a late answer that can be used; returns whether it is."""
        round_, dispatch = self._asked.get(client_id, (0, None))
        if dispatch is None or client_id not in self.strategy.clients:
            return False
        try:
            answer = answer_from(dispatch, reply, self.strategy.limits)
        except BadAnswerError:  # an error, or the answer to an even earlier round
            return False
        del self._asked[client_id]
        held = Bank(self.strategy.storage)
        held.update(answer.adapters)
        self._here[client_id] = (round_, replace(answer, adapters=held))
        return True

    def due(self, round_: int, answered: set[str]) -> dict[str, tuple[Client, Answer, float]]:
        """Answers that have arrived, with their weights, by client, except for clients that answered this round."""
        here, self._here = dict(sorted(self._here.items())), {}
        found = {}
        for client_id, (asked, answer) in here.items():
            weight = self.strategy.late_weight(round_ - asked)
            if client_id not in answered and weight > 0:
                found[client_id] = (self.strategy.clients[client_id], answer, weight)
        return found
