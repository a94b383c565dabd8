r"""FedReMa: every client's head is averaged with those of its most relevant peers, the rest with everybody's.

Liang, Zhan, Liu, Zhang, Tan, Chen, "FedReMa: Improving Personalized Federated Learning via Leveraging the Most
Relevant Clients", ECAI 2024 (arXiv 2411.01825). Only its abstract was available; the details are derived here:

* Relevance is the similarity of the logits of two classifiers that see the same features z. For standard normal z,
  :math:`E[(W_i z + b_i)^T (W_j z + b_j)] = \langle W_i, W_j \rangle + b_i^T b_j`: the cosine of the heads as vectors.
* Maximum difference segmentation sorts a client's similarities and cuts at the largest difference of two neighbours.
* The critical co-learning period is the first ``co-learning-rounds`` rounds. Later, a client's peers are those that
  were relevant in more than half of these rounds (the record of peers). Averages are weighted by examples; a client is
  also its own peer.

Without a head, whole adapters are compared and averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedalloy_adapters.adapter import stack_vectors
from fedalloy_adapters.bank.store import Made
from strategies.families.peer_average import LOCAL, Peers
from strategies.framework import About, Brief, Client, State
from strategies.framework.options import require_range


@dataclass(frozen=True)
class FedReMaOptions:
    """When clients stop looking for peers."""

    co_learning_rounds: int = 0
    """Rounds after which the record decides a client's peers; 0 means half of the run's rounds."""

    def __post_init__(self) -> None:
        require_range("co-learning-rounds", self.co_learning_rounds, 0)


def most_relevant(similarity: Tensor) -> Tensor:
    """Maximum difference segmentation: the relevant clients of each row, ``[N, N]`` bool; each row includes itself.

    >>> most_relevant(torch.tensor([[1.0, 0.9, 0.2], [0.9, 1.0, 0.8], [0.2, 0.8, 1.0]])).tolist()
    [[True, True, False], [True, True, False], [False, True, True]]
    """
    count = len(similarity)
    values, order = similarity.clone().fill_diagonal_(-torch.inf).sort(dim=1, descending=True, stable=True)
    peers = torch.full((count, 1), count - 1)
    if count > 2:
        peers = (values[:, : count - 2] - values[:, 1 : count - 1]).argmax(dim=1, keepdim=True) + 1
    own = torch.eye(count, dtype=torch.bool)
    return own.scatter(1, order, torch.arange(count) < peers) | own


class FedReMa(Peers[FedReMaOptions]):
    """The average of all clients, with a head averaged over the most relevant ones."""

    name = "fedrema"
    about = About(
        "the average of all, with the head of its most relevant peers",
        when="heads show whose labels are alike; the server keeps every client's last adapter",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.round_ = 0
        self.record: dict[str, dict[str, int]] = {}  # rounds in which a peer was relevant for a client

    def weigh(self, names: list[str]) -> Tensor:
        """The weight of each client's head in every other client's head."""
        counts = self.examples(names)
        if self.round_ <= (self.options.co_learning_rounds or (self.rounds + 1) // 2 or self.round_):
            layout = self.uploads.common_layout(names)
            heads = self.uploads.parts(layout.select(modules=layout.head_modules))
            unit = normalize(stack_vectors(heads[name] for name in names).double())
            chosen = most_relevant(unit @ unit.T)
        else:
            chosen = torch.tensor([[self._was_relevant(peer, name) for peer in names] for name in names])
        weights = chosen * counts
        return weights / weights.sum(dim=1, keepdim=True)

    def settle(self, round_: int) -> dict[str, Any]:
        """Weigh, and remember who was relevant."""
        self.round_ = round_
        found = super().settle(round_)
        for name, row in self.weights.items():
            seen = self.record.setdefault(name, {})
            seen.update({peer: seen.get(peer, 0) + 1 for peer, weight in row.items() if weight})
        return found

    def combined(self, slot: str, client: Client) -> Made | None:
        """The average of all, with the head averaged over the client's peers."""
        peers, known = super().combined(slot, client), self.known
        if peers is None:
            return None
        counts = dict(zip(known, self.examples(list(known)).tolist(), strict=True))
        heads = client.layout.head_modules
        return Made({slot: lambda: known.mean(counts).with_part(peers[slot].select(modules=heads))})

    def deliver(self, client: Client) -> Brief:
        """The averages themselves."""
        return Brief(super().deliver(client).steps, self.combined(LOCAL, client) or {})

    def state(self) -> State:
        """Last uploads, and the record."""
        found = super().state()
        found.values |= {"round": self.round_, "record": self.record}
        return found

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        self.round_ = int(state.values["round"])
        self.record = {name: dict(seen) for name, seen in state.values["record"].items()}
        super().load_state(state)

    def _was_relevant(self, peer: str, name: str) -> bool:
        seen = self.record.get(name, {})
        return peer == name or 2 * seen.get(peer, 0) > seen.get(name, 0)
