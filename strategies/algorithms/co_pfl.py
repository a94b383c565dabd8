r"""CO-PFL: a shared representation, averaged by what clients contribute, and each client's own part.

Xing, Dong, Fan, Zeng, Leung, Deen, Hu, "CO-PFL: Contribution-Oriented Personalized Federated Learning for Heterogeneous
Networks", 2025 (arXiv 2510.20219). Only its abstract and a summary were available; the formulas are derived from them:

* gradient score :math:`g_k = 1 - \cos(\Delta_k, \sum_{j \ne k} \Delta_j)`, from 0 to 2: how new the direction of the
  client's update is;
* data score :math:`d_k`: the mean training loss, which tells how far its predictions are from its labels;
* the client's weight is :math:`\lambda g_k / \sum g + (1 - \lambda) d_k / \sum d`.

A loss counts for at most twice the clients' median: no client gains weight by reporting a large one. In the paper,
masks at the client decide for each number whether it is personal. Here ``own`` names the personal part, as in FedRep,
and ``optimizer-state`` decides about the optimiser's moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter, stack_vectors
from fedalloy_adapters.bank.store import Bank
from strategies.families.own_part import OwnPart, OwnPartOptions
from strategies.framework import About, Answer, Client
from strategies.framework.options import require_range


@dataclass(frozen=True)
class COPFLOptions(OwnPartOptions):
    """Which part is the client's own, and how contributions are measured."""

    direction_share: float = 0.5
    """Lambda, the share of a weight that comes from the direction of the update; the rest comes from the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("direction-share", self.direction_share, 0, 1)


def contributions(updates: Tensor, losses: Tensor, direction_share: float) -> Tensor:
    """Weights ``[N]``, which sum to one, from updates ``[N, P]`` and mean training losses ``[N]``.

    >>> contributions(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.ones(3), 1.0).tolist()[2] > 0.5
    True
    """
    updates = updates.double()
    others = updates.sum(dim=0) - updates
    novelty = 1 - torch.cosine_similarity(updates, others, dim=1, eps=1e-12)
    losses = losses.double().clamp(min=0).minimum(2 * losses.double().median())
    return direction_share * _shares(novelty) + (1 - direction_share) * _shares(losses)


def _shares(scores: Tensor) -> Tensor:
    total = scores.sum()
    return scores / total if total > 1e-12 else torch.full_like(scores, 1 / len(scores))


class COPFL(OwnPart[COPFLOptions]):
    """FedRep with weights by contribution."""

    name = "co-pfl"
    about = About(
        "a global representation, averaged by contribution; its own head (or other modules)",
        trains="head, then the rest",
        travels="the rest up, the rest down",
        when="labels differ, and some clients' data are worth more to the others",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: dict[str, float] = {}
        self.counted: dict[str, float] = {}

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the shared part, and the mean loss over the training steps."""
        super().absorb(round_, client, answer)
        found = [result.train for result in answer.report.results if result.HasField("train")]
        total = sum(result.steps for result in found)
        self.losses[client.id] = sum(result.steps * result.mean_loss for result in found) / max(total, 1)

    def settle(self, round_: int) -> dict[str, Any]:
        """Average. The record shows each client's weight."""
        self.counted = {}
        record = super().settle(round_)
        self.losses = {}
        return record | ({"weights": {name: round(w, 6) for name, w in self.counted.items()}} if self.counted else {})

    def average(self, adapters: Mapping[str, Adapter], examples: Mapping[str, int]) -> Adapter:
        """Average by contribution."""
        names = list(adapters)
        before = self.global_model.part(adapters[names[0]].layout).vector
        updates = stack_vectors(adapters[name] for name in names) - before
        losses = torch.tensor([self.losses.get(name, 0.0) for name in names])
        weights = contributions(updates, losses, self.options.direction_share)
        self.counted = dict(zip(names, weights.tolist(), strict=True))
        return self.global_model.with_part(Bank.of(adapters).mean(self.counted))
