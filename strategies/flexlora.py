r"""FlexLoRA: deltas are averaged exactly; each client gets the best approximation at its own rank.

Bai, Chen, Qian, Yao, Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024. With :math:`\Delta = \sum_k p_k s_k B_k A_k = U S V^T`, a client of rank r gets
:math:`B = U_r S_r / s, A = V_r^T`. The SVD is that of a small core (:func:`adapters.algebra.truncate`). Clients'
ranks and scalings may differ; between rounds the delta is kept at the highest rank that a client has, which loses
nothing that any of them could be sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapters.adapter import Adapter
from adapters.algebra import stack, truncate
from adapters.layout import Layout
from strategies.base import Brief, Client, State
from strategies.fedavg import SLOT, FedAvg


@dataclass(frozen=True)
class FlexLoRAOptions:
    """No options of its own."""


class FlexLoRA(FedAvg):
    """FedAvg in delta space, at any ranks."""

    name = "flexlora"
    Options = FlexLoRAOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.averaged = False

    def compatible(self, first: Layout, second: Layout) -> bool:
        """Ranks and scalings may differ."""
        return first.difference(second, any_rank=True) is None and first.modules == second.modules

    def enrol(self, client: Client) -> None:
        """The highest ranks are the federation's."""
        super().enrol(client)
        ranks = {module: max(r, client.layout.ranks[module]) for module, r in self.global_model.layout.ranks.items()}
        if ranks != self.global_model.layout.ranks:
            self.model = truncate(self.global_model, self.global_model.layout.with_ranks(ranks))

    def brief(self, round_: int, client: Client) -> Brief:
        """FedAvg's, at the client's rank."""
        return Brief(super().brief(round_, client).steps, {SLOT: self.at_rank_of(client)})

    def deliver(self, client: Client) -> Brief:
        """FedAvg's, at the client's rank."""
        return Brief(super().deliver(client).steps, {SLOT: self.at_rank_of(client)})

    def average(self, adapters: Sequence[Adapter], examples: Sequence[int]) -> Adapter:
        """The exact average of the deltas, truncated to the highest rank of a client."""
        self.averaged = True
        total = sum(examples)
        return truncate(stack(adapters, [n / total for n in examples]), self.global_model.layout, balanced=False)

    def at_rank_of(self, client: Client) -> Adapter:
        """What the client is sent: before anything is averaged, the usual start."""
        if not self.averaged:
            return Adapter.initial(client.layout, self.seed)
        return truncate(self.global_model, client.layout, balanced=False)

    def state(self) -> State:
        """The adapter, and at which ranks it is."""
        return State(super().state().tensors, {"averaged": self.averaged, "ranks": self.global_model.layout.ranks})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before, and may have higher ranks than were saved."""
        self.averaged = bool(state.values["averaged"])
        layout, ranks = self.global_model.layout, state.values["ranks"]
        saved = Adapter(layout if ranks == layout.ranks else layout.with_ranks(ranks), state.tensors["model"])
        if ranks == layout.ranks:
            self.model = saved
        elif self.averaged:
            self.model = truncate(saved, layout, balanced=False)
