r"""IFCA: the server has C models; every client trains the one that fits its data best.

Ghosh, Chung, Yin, Ramchandran, "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020. Each client
is sent all :math:`\theta_1 .. \theta_C`, takes :math:`\arg\min_j F_k(\theta_j)`, trains it and returns it; the server
averages per cluster by example counts. A cluster that nobody chose stays as it is. C times as much goes down as up.

All start at the base model, where every model has the same loss. So the first round is FedAvg's, and its uploads are
divided by k-means (factor space) into the first clusters (in the paper: C starts drawn at random). A client chooses by
its training loss, as in the paper; a model that the client has trained often has a low loss whatever its cluster, so a
choice hardly changes once adapters fit their clients' examples. If a client's labels are its own, candidates are
compared with its own head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank
from strategies.algorithms.fedmerge_weights import cluster
from strategies.framework import About, AlloyStrategy, Answer, Brief, Client, State, round_record, steps
from strategies.framework.options import require_range

MODEL = "model"


@dataclass(frozen=True)
class IFCAOptions:
    """How many adapters there are."""

    clusters: int = 2
    """C, the number of global adapters."""

    def __post_init__(self) -> None:
        require_range("clusters", self.clusters, 1)


class IFCA(AlloyStrategy[IFCAOptions]):
    """C global adapters; each client chooses one."""

    name = "ifca"
    about = About(
        "the one of C global adapters that fits its data best",
        travels="P up, C P down",
        when="clients fall into C groups; C forward passes over a client's examples in each round",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.models: list[Adapter] = []  # one before the first round has settled
        self.arrived = Bank(self.storage)
        self.chosen: dict[str, int] = {}  # of the answers that have arrived

    def enrol(self, client: Client) -> None:
        """The first client's layout is the federation's."""
        super().enrol(client)
        if not self.models:
            self.models = [Adapter.initial(client.layout, self.seed)]

    def brief(self, round_: int, client: Client) -> Brief:
        """Choose, evaluate, train, send."""
        mix = steps.mixture(MODEL)
        plan = [
            *self._candidate_heads(),
            self._choose(),
            steps.evaluate(self.training, mix),
            steps.train(self.training, mix, [MODEL]),
            steps.send(self.training, MODEL, relative_to_received=False, comes_back=True),
        ]
        return Brief(plan, self._candidates())

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the trained adapter and the client's choice."""
        weights = next(result.select.weights for result in answer.report.results if result.HasField("select"))
        chosen = max(range(len(weights)), key=lambda index: weights[index])
        self.arrived[client.id], self.chosen[client.id] = answer.adapters[MODEL], chosen

    def settle(self, round_: int) -> dict[str, Any]:
        """Average each cluster; the first time, find them."""
        arrived, chosen = self.arrived.taken(), dict(sorted(self.chosen.items()))
        self.chosen = {}
        names = list(arrived)
        if names and len(self.models) < self.options.clusters:
            _, logits = cluster(arrived.rows(), self.options.clusters, 1.0, self.seed)
            chosen = dict(zip(names, logits.argmax(dim=1).tolist(), strict=True))
            self.models = self.models * self.options.clusters
        self.models = [
            self._averaged(j, arrived, [n for n in names if chosen[n] == j]) for j in range(len(self.models))
        ]
        sizes = [sum(index == j for index in chosen.values()) for j in range(len(self.models))]
        return {round_record.MERGED: len(names), "clusters": chosen, "sizes": sizes}

    def deliver(self, client: Client) -> Brief:
        """The model that fits best."""
        mix = steps.mixture(MODEL)
        plan = [*self._candidate_heads(), self._choose(), steps.save(mix), steps.evaluate(self.training, mix)]
        return Brief(plan, self._candidates())

    def state(self) -> State:
        """The models."""
        return State({f"model/{index}": model.vector for index, model in enumerate(self.models)}, {})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        layout = self.models[0].layout
        self.models = [Adapter(layout, state.tensors[f"model/{index}"]) for index in range(len(state.tensors))]

    def _averaged(self, index: int, arrived: Bank, members: list[str]) -> Adapter:
        if not members:
            return self.models[index]
        counts = [self.clients[name].examples for name in members]
        weights = torch.tensor([[count / sum(counts) for count in counts]], dtype=torch.float64)
        return arrived.combine(members, weights)[0]

    def _candidate_heads(self) -> list[steps.Step]:
        """Steps that give every candidate the client's own head, if its labels are its own."""
        copies = [steps.copy(slot, MODEL) for slot in self._candidates()]
        return [steps.initialise(MODEL, self.seed), *copies]

    def _choose(self) -> steps.Step:
        return steps.select(MODEL, list(self._candidates()), "best", split="train")

    def _candidates(self) -> dict[str, Adapter]:
        return {f"candidate-{index}": model for index, model in enumerate(self.models)}
