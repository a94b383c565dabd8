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
from typing import Any

from adapters.adapter import Adapter
from adapters.algebra import stack, truncate, weighted_sum
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
    """One adapter for all."""

    name = "fedavg"
    Options = FedAvgOptions
    options: FedAvgOptions

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
        """Install the global adapter, evaluate it, train it, send it back."""
        mix = steps.mixture(SLOT)
        return Brief(
            [
                steps.evaluate(self.training, mix),
                steps.train(self.training, mix, [SLOT]),
                steps.send(self.training, SLOT),
            ],
            {SLOT: self._model},
        )

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the trained adapter until the round settles."""
        self.arrived[client.id] = (answer.adapters[SLOT], client.examples)

    def settle(self, round_: int) -> dict[str, Any]:
        """Average; without answers the model stays."""
        arrived = [self.arrived[name] for name in sorted(self.arrived)]  # not in order of arrival: sums are not exact
        self.arrived = {}
        if arrived:
            adapters, examples = zip(*arrived, strict=True)
            self.model = average(adapters, examples, self.options.space)
        return {"merged": len(arrived)}

    def deliver(self, client: Client) -> Brief:
        """The global adapter is everybody's."""
        mix = steps.mixture(SLOT)
        return Brief([steps.save(mix), steps.evaluate(self.training, mix)], {SLOT: self._model})

    def state(self) -> State:
        """The global adapter's numbers."""
        return State({"model": self._model.vector})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        self.model = Adapter(self._model.layout, state.tensors["model"])

    @property
    def _model(self) -> Adapter:
        if self.model is None:
            raise RuntimeError("no client is enrolled yet")
        return self.model
