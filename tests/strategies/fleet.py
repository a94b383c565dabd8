"""The harness for a strategy's tests: three nodes without a model, played round by round over real messages.

fleet = Fleet("fedprox", mu=0.1)
record = fleet.play()                  # a round: brief, train, absorb, settle
fleet.play(deaf="ben")                 # ben's answer is lost
fleet["ada"].slots["global"]           # what a client holds
fleet.deliver()["ada"]                 # its personal adapter
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor, Layout
from strategies import STRATEGIES, AlloyStrategy
from strategies.framework.answers import answer_from
from strategies.framework.exchange import Answer, Brief, Client
from tests.strategies.conftest import FakeGrid, FakeNode, client_of, layout_of

LAYOUT = layout_of()
NAMES = ("ada", "ben", "cyd")
COUNTS = (10, 30, 20)
SHARES = [count / sum(COUNTS) for count in COUNTS]


def dense(adapter: Adapter, module: str) -> Tensor:
    """A module's delta in float64."""
    scaling = adapter.layout.scalings[module]
    return scaling * adapter[module, Factor.B].double() @ adapter[module, Factor.A].double()


class Fleet:
    """A strategy and its nodes, which carry out its plans.

    Args:
        name: the strategy's.
        layouts: the nodes' adapters, one for each of ``NAMES``.
        options: the strategy's.
    """

    def __init__(self, name: str, layouts: list[Layout] | None = None, **options: Any) -> None:
        kind = STRATEGIES[name]
        self.strategy: AlloyStrategy = kind(kind.Options(**options), seed=3)
        self.nodes = [
            FakeNode(who, layout, count)
            for who, count, layout in zip(NAMES, COUNTS, layouts or [LAYOUT] * 3, strict=True)
        ]
        for index, node in enumerate(self.nodes):
            self.strategy.enrol(client_of(node.name, node.layout, node.examples, node_id=index + 1))
        self.grid = FakeGrid(self.nodes)
        self.round_ = 0

    def __getitem__(self, name: str) -> FakeNode:
        """A client's node: its ``slots``, the ``plans`` that it carried out, the adapter that it ``saved``."""
        return next(node for node in self.nodes if node.name == name)

    def brief(self, name: str) -> Brief:
        """What the client would be sent next."""
        return self.strategy.brief(self.round_ + 1, self.strategy.clients[name])

    def play(self, deaf: str = "", only: tuple[str, ...] = NAMES) -> dict[str, Any]:
        """One round of those in ``only``; the answer of ``deaf`` is lost. What the round's record shows."""
        self.round_ += 1
        return play_round(self.strategy, self.grid, self.round_, deaf, only)

    def deliver(self) -> dict[str, Adapter]:
        """The delivery; what every node saved as its personal adapter."""
        self.round_ += 1
        briefs = {client: self.strategy.deliver(client) for client in self.strategy.clients.values()}
        exchange(self.strategy, self.grid, self.round_, briefs)
        return {node.name: node.saved for node in self.nodes if node.saved is not None}


def play_round(
    strategy: AlloyStrategy, grid: Grid, round_: int, deaf: str = "", only: Collection[str] | None = None
) -> dict[str, Any]:
    """One round of an enrolled strategy: brief, exchange, absorb, settle."""
    asked = [client for client in strategy.clients.values() if only is None or client.id in only]
    briefs = {client: strategy.brief(round_, client) for client in asked}
    for client, answer in exchange(strategy, grid, round_, briefs):
        if client.id != deaf:
            strategy.absorb(round_, client, answer)
    return strategy.settle(round_)


def exchange(
    strategy: AlloyStrategy, grid: Grid, round_: int, briefs: Mapping[Client, Brief]
) -> list[tuple[Client, Answer]]:
    """Send each client its brief as a real message, and read the real answers."""
    found = []
    for client, brief in briefs.items():
        dispatch = strategy.dispatch(round_, client, brief, "fleet", b"")
        (reply,) = grid.send_and_receive([dispatch.message(client.node_id)])
        found.append((client, answer_from(dispatch, reply, strategy.limits)))
    return found


def sent(brief: Brief) -> dict[str, int]:
    """How many numbers a brief sends, by slot."""
    return {slot: adapter.layout.size for slot, adapter in brief.adapters.items()}


def size(*factors: Factor) -> int:
    """How many numbers these factors have in ``LAYOUT``."""
    return LAYOUT.select(factors).size


def trained(fleet: Fleet, name: str) -> dict[str, Tensor]:
    """The deltas of a client's model as its training left it, by module."""
    node = fleet[name]
    slots = {term.slot for step in node.plans[-1].steps if step.HasField("train") for term in step.train.mixture.terms}
    return {m: sum((dense(node.slots[s], m) for s in slots), torch.zeros(5, 6)) for m in LAYOUT.lora_modules}
