"""FedAvg of LoRA adapters (FedIT): one global adapter, averaged by example count.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, on LoRA
factors as in Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT), 2023.

With participants S and p_k = n_k / sum of n over S:

* ``fedavg.space = "factor"`` (FedIT): A = sum p_k A_k and B = sum p_k B_k. Not the average of the deltas: it differs
  from it by sum p_k (B_k - B)(A_k - A).
* ``fedavg.space = "delta"``: the deltas are averaged exactly as a stack of ranks and truncated to the common rank
  (best approximation in Frobenius norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from adapters.adapter import Adapter
from adapters.algebra import stack, truncate, weighted_sum
from proto.fedalloy.v1 import plan_pb2
from strategies import steps
from strategies.base import AlloyStrategy, Answer, Brief, Client, State
from strategies.options import require_choice

SLOT = "global"


@dataclass(frozen=True)
class FedAvgOptions:
    """``space``: where the average is taken, ``"factor"`` (FedIT) or ``"delta"`` (exact, then truncated)."""

    space: str = "factor"

    def __post_init__(self) -> None:
        require_choice("fedavg.space", self.space, ("factor", "delta"))


def average(adapters: Sequence[Adapter], examples: Sequence[int], space: str = "factor") -> Adapter:
    """Average of adapters of one layout, weighted by example counts, in that layout.

    Raises:
        LayoutError: the layouts differ.
    """
    total = sum(examples)
    weights = [count / total for count in examples]
    if space == "factor":
        return weighted_sum(adapters, weights)
    return truncate(stack(adapters, weights), adapters[0].layout)


class FedAvg(AlloyStrategy):
    """One adapter for all.

    Variants override what a client prepares (:meth:`prepare`), how it trains (:meth:`train`), which model is its own
    (:meth:`personal`) and how uploads are averaged (:meth:`average`).
    """

    name = "fedavg"
    Options: ClassVar[type[Any]] = FedAvgOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model: Adapter | None = None
        self.arrived: dict[str, tuple[Adapter, int]] = {}

    def enrol(self, client: Client) -> None:
        """The first client's layout is the federation's."""
        super().enrol(client)
        if self.model is None:
            self.model = Adapter.initial(client.layout, self.seed)

    def brief(self, round_: int, client: Client) -> Brief:
        """Install the global adapter, evaluate the client's model, train, send the global adapter back."""
        plan = [
            *self.prepare(round_, client),
            steps.evaluate(self.training, self.personal(client)),
            *self.train(round_, client),
            steps.send(self.training, SLOT),
        ]
        return Brief(plan, {SLOT: self.global_model})

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the trained adapter until the round settles."""
        self.arrived[client.id] = (answer.adapters[SLOT], client.examples)

    def settle(self, round_: int) -> dict[str, Any]:
        """Average; without answers the model stays."""
        arrived = [self.arrived[name] for name in sorted(self.arrived)]  # not in order of arrival: sums are not exact
        self.arrived = {}
        if arrived:
            adapters, examples = zip(*arrived, strict=True)
            self.model = self.average(adapters, examples)
        return {"merged": len(arrived)}

    def deliver(self, client: Client) -> Brief:
        """The global adapter, and what the client has made of it where that is more."""
        mix = self.personal(client)
        plan = [*self.prepare(0, client), steps.save(mix), steps.evaluate(self.training, mix)]
        return Brief(plan, {SLOT: self.global_model})

    def prepare(self, round_: int, client: Client) -> list[steps.Step]:
        """Steps before the adapter is installed; round 0 is the delivery."""
        return []

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """Steps that train the global adapter, and others where there are some."""
        return [steps.train(self.training, steps.mixture(SLOT), [SLOT])]

    def personal(self, client: Client) -> plan_pb2.Mixture:
        """The client's model: here the global adapter is everybody's."""
        return steps.mixture(SLOT)

    def average(self, adapters: Sequence[Adapter], examples: Sequence[int]) -> Adapter:
        """What becomes of the round's uploads; variants without the option average factors."""
        return average(adapters, examples, getattr(self.options, "space", "factor"))

    def state(self) -> State:
        """The global adapter's numbers."""
        return State({"model": self.global_model.vector})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        self.model = Adapter(self.global_model.layout, state.tensors["model"])

    @property
    def global_model(self) -> Adapter:
        """The global adapter, of which :attr:`model` is None before the first client."""
        if self.model is None:
            raise RuntimeError("no client is enrolled yet")
        return self.model
