r"""FlexLoRA: deltas are averaged exactly; each client gets the best approximation at its own rank.

Bai, Chen, Qian, Yao, Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024. With :math:`\Delta = \sum_k p_k s_k B_k A_k = U S V^T`, a client of rank r gets
:math:`B = U_r S_r / s, A = V_r^T`. The SVD is that of a small core (:func:`fedalloy_adapters.algebra.truncate`).
Clients' ranks and scalings may differ; between rounds the delta is kept at the clients' highest rank, so no client
loses anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import stack, truncate
from fedalloy_adapters.bank.store import Bank
from fedalloy_adapters.layout import Layout
from proto.fedalloy.v1 import adapter_pb2
from strategies.families.by_modules import by_modules
from strategies.families.fedavg import Averaging
from strategies.framework import About, AlloyStrategy, Client, State
from strategies.framework.options import NoOptions


class FlexLoRA(Averaging[NoOptions]):
    """FedAvg in delta space, with any ranks."""

    name = "flexlora"
    about = About(
        "the best approximation of the exact average at its own rank",
        when="ranks differ between clients; merges are exact before they are cut",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.averaged = False

    def compatible(self, first: Layout, second: Layout) -> bool:
        """Ranks and scalings may differ."""
        return first.difference(second, any_rank=True) is None and first.modules == second.modules

    def difference(self, first: Layout, second: Layout) -> str:
        """The first difference other than ranks and scalings."""
        return first.difference(second, any_rank=True) or first.describe_difference(second)

    def enrol(self, client: Client) -> None:
        """The federation has the highest rank of any client."""
        AlloyStrategy.enrol(self, client)  # FedAvg's own makes a union of groups
        if self.model is None:
            self.model = Adapter.initial(client.layout, self.seed)
        ranks = {module: max(r, client.layout.ranks[module]) for module, r in self.global_model.layout.ranks.items()}
        if ranks != self.global_model.layout.ranks:
            self.model = truncate(self.global_model, self.global_model.layout.with_ranks(ranks))

    def average(self, adapters: Mapping[str, Adapter], examples: Mapping[str, int]) -> Adapter:
        """The exact average of the deltas, truncated to the highest rank of a client."""
        self.averaged = True
        total = sum(examples.values())
        shares = [count / total for count in examples.values()]
        whole = self.global_model.layout

        def merge(parts: list[Adapter]) -> Adapter:
            return truncate(stack(parts, shares), whole.select((), parts[0].layout.modules), balanced=False)

        return by_modules(Bank.of(adapters), merge, whole.folded)

    def part_of(self, client: Client) -> Adapter:
        """What the client is sent; before the first average it is the common start."""
        if not self.averaged:
            return Adapter.initial(client.layout, self.seed)
        return truncate(self.global_model, client.layout, balanced=False)

    def state(self) -> State:
        """The adapter with its layout, and whether it already is an average."""
        found = super().state()
        return State(found.tensors, found.values | {"averaged": self.averaged})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before, and may have higher ranks than were saved."""
        self.averaged = bool(state.values["averaged"])
        layout = self.global_model.layout
        saved = Layout.from_proto(adapter_pb2.Layout.FromString(bytes.fromhex(state.values["layout"])))
        model = Adapter(saved, state.tensors["model"])
        if saved.digest == layout.digest:
            self.model = model
        elif self.averaged:
            self.model = truncate(model, layout, balanced=False)
