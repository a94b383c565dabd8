"""Decentralised learning through a relay: adapters go to neighbours, and nothing averages all of them.

In every round each client has a few random neighbours; the server passes their adapters on, already mixed.
``peer_numbers`` in the round's record counts the numbers that cross between peers, as a network without a server would
move them. What the relay moves is in the ledger: one adapter up and one down per client, whatever the neighbours.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank, Made
from fedalloy_adapters.layout import Layout
from strategies.framework import AlloyStrategy, Answer, Brief, Client, State, steps
from strategies.framework.options import require_range

LOCAL = "local"


@dataclass(frozen=True)
class GossipOptions:
    """How many neighbours there are."""

    neighbours: int = 2
    """Number of other clients that receive a client's adapter in a round."""

    def __post_init__(self) -> None:
        require_range("neighbours", self.neighbours, 1)


GossipT = TypeVar("GossipT", bound=GossipOptions)
"""Options that say how many neighbours there are."""


class Gossip(AlloyStrategy[GossipT]):
    """Every client has an adapter of its own, mixed with its neighbours' after each round.

    The adapters of all that took part in a round are mixed: ``x <- P x`` with the matrix of :meth:`mixing`. So are the
    scalars w of push-sum; a client's adapter is divided by its scalar before it is used (``z = x / w``). If the rows of
    P sum to one, the scalars stay at one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mixed = Bank(self.storage)  # x
        self.arrived = Bank(self.storage)  # x + what training moved
        self.push: dict[str, float] = {}  # w

    @abstractmethod
    def mixing(self, links: Tensor) -> Tensor:
        """The mixing matrix P ``[N, N]``: ``links[i, j]`` is 1 where j sends to i, and on the diagonal."""

    def links(self, drawn: Tensor) -> Tensor:
        """Who sends to whom, given the random links."""
        return drawn

    @property
    def turns(self) -> int:
        """How often adapters are mixed after a round."""
        return 1

    def part(self, layout: Layout) -> Layout:
        """What travels; here everything."""
        return layout

    def train(self, client: Client) -> list[steps.Step]:
        """How the client trains; here as in FedAvg."""
        return [steps.train(self.training, steps.mixture(LOCAL), [LOCAL])]

    def brief(self, round_: int, client: Client) -> Brief:
        """Install the client's mixed adapter, evaluate, train, send."""
        plan = [steps.initialise(LOCAL, self.seed), steps.evaluate(self.training, steps.mixture(LOCAL))]
        asked = self.part(client.layout)
        modules = [] if asked.digest == client.layout.digest else list(asked.modules)
        relative = client.id in self.mixed
        send = steps.send(self.training, LOCAL, modules=modules, relative_to_received=relative, comes_back=True)
        return Brief([*plan, *self.train(client), send], self._sent(client))

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Add the displacement of training to x, not to x / w."""
        found, weight = answer.adapters[LOCAL], self.push.get(client.id, 1.0)
        if weight != 1.0:
            start = answer.received[LOCAL].vector
            found = Adapter(found.layout, weight * start + (found.vector - start))
        self.arrived[client.id] = found

    def settle(self, round_: int) -> dict[str, Any]:
        """Mix among those that took part; all others stay as they are."""
        arrived = self.arrived.taken()
        names = sorted(arrived)
        if not names:
            return {"merged": 0}
        links = self.links(links_between(len(names), self.options.neighbours, f"{self.seed}:{round_}"))
        matrix = torch.linalg.matrix_power(self.mixing(links), self.turns)
        weights = matrix @ torch.tensor([self.push.get(name, 1.0) for name in names], dtype=torch.float64)
        for name, row, weight in zip(names, matrix, weights.tolist(), strict=True):
            (self.mixed[name],) = arrived.combine(names, row[None])
            self.push[name] = weight
        crossing = (int(links.sum()) - len(names)) * self.turns
        return {"merged": len(names), "peer_numbers": crossing * arrived.layout_of(names[0]).size}

    def deliver(self, client: Client) -> Brief:
        """The client's mixed adapter."""
        mix = steps.mixture(LOCAL)
        plan = [steps.initialise(LOCAL, self.seed), steps.save(mix), steps.evaluate(self.training, mix)]
        return Brief(plan, self._sent(client))

    def state(self) -> State:
        """The adapters, and the scalars."""
        state = State({}, {"push": dict(self.push)})
        state.keep("mixed", self.mixed)
        return state

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        layout = self.part(
            next(iter(self.clients.values())).layout
        )  # all clients share it, also those that have not rejoined yet
        self.push = {name: float(weight) for name, weight in state.values["push"].items()}
        self.mixed.clear()
        for name in self.push:
            self.mixed.put_row(name, layout, state.row(f"mixed/{name}"))

    def _sent(self, client: Client) -> Made | dict[str, Adapter]:
        if client.id not in self.mixed:
            return {}
        weight = self.push[client.id]
        return Made({LOCAL: lambda: _divided(self.mixed[client.id], weight)})


def links_between(count: int, neighbours: int, seed: str) -> Tensor:
    """Who sends to whom, ``[count, count]`` of 0 and 1: column j has ``neighbours`` random others, and j itself."""
    drawn, found = random.Random(seed), torch.eye(count, dtype=torch.float64)
    for sender in range(count):
        others = [index for index in range(count) if index != sender]
        found[drawn.sample(others, min(neighbours, len(others))), sender] = 1
    return found


def _divided(adapter: Adapter, weight: float) -> Adapter:
    return adapter if weight == 1.0 else replace(adapter, vector=(adapter.vector.double() / weight).float())
