r"""FedFomo: a client is sent a few others' adapters and moves towards those that help on its validation data.

Zhang, Sapra, Fidler, Yeung, Alvarez, "Personalized Federated Learning with First Order Model Optimization", ICLR 2021:

.. math:: w_j \propto \max(0, \frac{L(\theta) - L(\theta_j)}{\|\theta_j - \theta\|}), \qquad
    \theta \leftarrow \theta + \sum_j w_j (\theta_j - \theta)

at the client, then local training. If no candidate is better, the client does not move. The server keeps affinities,
the sums of the w that each client has reported. It sends the ``candidates`` with the highest affinity, and replaces
each by a random one with probability ``explore``. So ``candidates`` times as much goes down as up. Clients without
validation data use their training data. If a client's labels are its own, it tries the others' adapters with its own
head.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedalloy_adapters.bank.store import Made
from strategies.families.peer_average import LOCAL, Peers
from strategies.framework import About, Answer, Brief, Client, State, steps
from strategies.framework.options import require_range


@dataclass(frozen=True)
class FedFomoOptions:
    """Whose adapters a client is sent."""

    candidates: int = 2
    """M, how many others' adapters a client is sent in a round."""
    explore: float = 0.3
    """Probability that a candidate is replaced by a random client."""

    def __post_init__(self) -> None:
        require_range("candidates", self.candidates, 1)
        require_range("explore", self.explore, 0, 1)


class FedFomo(Peers[FedFomoOptions]):
    """Other clients' adapters, weighed at the client."""

    name = "fedfomo"
    asks_later = ("select",)
    about = About(
        "its own adapter, moved towards others' that help on its validation data",
        travels="P up, M P down",
        when="clients have validation examples, and may see single other clients' adapters",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.affinity: dict[str, dict[str, float]] = {}
        self.asked: dict[str, list[str]] = {}

    @property
    def learns_from(self) -> tuple[str, ...]:
        """Others' adapters are chosen on validation examples."""
        return ("train", "validation")

    def weigh(self, names: list[str]) -> Tensor:
        """The affinities, for the record; zero for a client without any."""
        rows = [[self.affinity.get(name, {}).get(peer, 0.0) for peer in names] for name in names]
        found = torch.tensor(rows, dtype=torch.float64)
        return found / found.sum(dim=1, keepdim=True).clamp_min(1e-12)

    def brief(self, round_: int, client: Client) -> Brief:
        """Move towards the candidates that help, evaluate, train, send."""
        peers = self.asked[client.id] = self.candidates(round_, client)
        known = self.known
        slots = Made({f"peer-{index}": partial(known.__getitem__, peer) for index, peer in enumerate(peers)})
        split = "validation" if client.held_out else "train"
        mix = steps.mixture(LOCAL)
        plan = [
            *self.begin(),
            *(steps.copy(slot, LOCAL) for slot in slots),
            *([steps.select(LOCAL, list(slots), "improvement", split=split)] if slots else []),
            steps.evaluate(self.training, mix),
            steps.train(self.training, mix, [LOCAL]),
            self.send(),
        ]
        return Brief(plan, slots)

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Add the reported weights to the affinities."""
        super().absorb(round_, client, answer)
        for result in answer.report.results:
            if result.HasField("select"):
                row = self.affinity.setdefault(client.id, {})
                for peer, weight in zip(self.asked[client.id], result.select.weights, strict=True):
                    row[peer] = row.get(peer, 0.0) + weight

    def candidates(self, round_: int, client: Client) -> list[str]:
        """The clients whose adapters the client is sent; the same ones if the run is repeated or resumed."""
        row = self.affinity.get(client.id, {})
        left = sorted(name for name in self.known if name != client.id)
        drawn = random.Random(f"{self.seed}:{round_}:{client.id}")
        drawn.shuffle(left)  # among equals, names must not decide
        left.sort(key=lambda name: -row.get(name, 0.0))
        chosen = []
        for _ in range(min(self.options.candidates, len(left))):
            explores = drawn.random() < self.options.explore
            chosen.append(left.pop(drawn.randrange(len(left)) if explores else 0))
        return chosen

    def state(self) -> State:
        """Last uploads and affinities."""
        found = super().state()
        return State(found.tensors, found.values | {"affinity": {k: dict(row) for k, row in self.affinity.items()}})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        self.affinity = {name: dict(row) for name, row in state.values["affinity"].items()}
        super().load_state(state)
