r"""FedEM: every client's data are a mixture of C distributions, and each distribution has a global adapter.

Marfoq, Neglia, Bellet, Kameni, Vidal, "Federated Multi-Task Learning under a Mixture of Distributions", NeurIPS
2021. At client k

.. math::
    q_{sc} \propto \pi_{kc} e^{-\ell(h_c(x_s), y_s)}, \qquad \pi_{kc} = mean_s q_{sc}

adapter c is trained with example weights :math:`q_{sc}`, the server averages each adapter by example counts (as the
authors' code does, not by :math:`\pi`), and the client predicts :math:`\sum_c \pi_{kc} softmax(logits_c)`. :math:`\pi`
never leaves it. Traffic and local work are C times FedAvg's. Adapters start from different A; otherwise they would stay
equal. The personal model is an ensemble: C adapters and their shares on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import About, AlloyStrategy, Answer, Brief, Client, State, round_record, steps
from strategies.framework.options import require_range

SHARES = "shares"


@dataclass(frozen=True)
class FedEMOptions:
    """How many adapters there are."""

    learners: int = 2
    """C, the number of global adapters."""

    def __post_init__(self) -> None:
        require_range("learners", self.learners, 1)


LearnersT = TypeVar("LearnersT", bound=FedEMOptions)
"""Options that say how many adapters there are."""


class Learners(AlloyStrategy[LearnersT]):
    """C global adapters; a client's model is an ensemble of all of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slots = [f"learner-{index}" for index in range(self.options.learners)]
        self.models: dict[str, Adapter] = {}
        self.arrived: dict[str, Bank] = {slot: Bank(self.storage) for slot in self.slots}

    def enrol(self, client: Client) -> None:
        """The first client's layout is the federation's."""
        super().enrol(client)
        if not self.models:
            self.models = {slot: Adapter.initial(client.layout, self.seed + i) for i, slot in enumerate(self.slots)}

    def brief(self, round_: int, client: Client) -> Brief:
        """Attribute the examples to adapters, evaluate the ensemble, train each adapter on its share, send all."""
        plan = [self.divide(), steps.evaluate(self.training, self._model())]
        for slot in self.slots:
            plan.append(steps.train(self.training, steps.mixture(slot), [slot], attributed_to=slot))
        return Brief([*plan, *(steps.send(self.training, slot) for slot in self.slots)], self.models)

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the trained adapters."""
        for slot in self.slots:
            self.arrived[slot][client.id] = answer.adapters[slot]

    def settle(self, round_: int) -> dict[str, Any]:
        """Average each adapter; one to which no example belongs stays."""
        arrived = {slot: bank.taken() for slot, bank in self.arrived.items()}
        for slot, bank in arrived.items():
            counts = {name: self.weight_of(slot, self.clients[name]) for name in bank}
            if sum(counts.values()) > 0:
                self.models[slot] = bank.mean(counts)
        return {round_record.MERGED: len(arrived[self.slots[0]])}

    def deliver(self, client: Client) -> Brief:
        """The ensemble, with shares from the last averages."""
        plan = [self.divide(), steps.save(self._model())]
        return Brief([*plan, steps.evaluate(self.training, self._model())], self.models)

    def divide(self) -> steps.Step:
        """The step that divides a client's examples among the adapters."""
        return steps.attribute(self.slots, SHARES)

    def weight_of(self, slot: str, client: Client) -> float:
        """A client's weight in an adapter's average: its examples."""
        return client.examples

    def state(self) -> State:
        """The adapters."""
        return State({slot: model.vector for slot, model in self.models.items()})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        self.models = {slot: Adapter(model.layout, state.tensors[slot]) for slot, model in self.models.items()}

    def _model(self) -> plan_pb2.Mixture:
        return steps.ensemble(self.slots, SHARES)


class FedEM(Learners[FedEMOptions]):
    """Shares that are a client's own, the same for all its examples."""

    name = "fedem"
    about = About(
        "C global adapters, their predictions averaged by shares of its own",
        trains="A, B, head of each",
        travels="C P up, C P down",
        when="every client's data are a mixture of a few kinds; C times FedAvg's steps; an ensemble has to be served",
    )
