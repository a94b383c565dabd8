r"""APFL: the client's model is a mixture of the global adapter and its own, with a learned coefficient.

Deng, Kamani, Mahdavi, "Adaptive Personalized Federated Learning", 2020 (arXiv 2003.13461):
:math:`\bar v = \alpha v + (1 - \alpha) w`; w is trained alone and averaged, v is trained inside :math:`\bar v` with w
frozen, :math:`\alpha` by the gradient of the same loss.

Here the *deltas* are mixed: a mixture of factors would have cross terms. ``adaptive = true``: each module has one
coefficient, the sigmoid of a gate. It starts at one half and is trained together with v at its own learning rate
(:mod:`strategies.families.gates`). (The paper has one coefficient for the whole model, clipped to [0, 1].) ``false``:
``alpha`` stays fixed. v is trained beside the received w, which is frozen meanwhile; in the paper both move in every
step.
Local work is twice FedAvg's.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto.fedalloy.v1 import plan_pb2
from strategies.families.fedavg import SLOT, Averaging
from strategies.families.gates import gate_scale, require_gate_rate
from strategies.framework import About, Client, steps
from strategies.framework.options import require_range

LOCAL, GATES = "local", "gates"


@dataclass(frozen=True)
class APFLOptions:
    """How much of the client's model is its own."""

    adaptive: bool = True
    """Learn the share (one gate for each module); ``false``: it stays ``alpha``."""
    alpha: float = 0.5
    """The client's own share if it is not adaptive, from 0 (FedAvg's adapter) to 1 (its own)."""
    gate_rate: float = 0.0
    """Learning rate of the share if it is adaptive; 0 means 0.1."""

    def __post_init__(self) -> None:
        require_range("alpha", self.alpha, 0, 1)
        require_gate_rate(self.gate_rate)


class APFL(Averaging[APFLOptions]):
    """One global adapter, and a mixture per client."""

    name = "apfl"
    about = About(
        "a learned mixture of FedAvg's adapter and its own",
        trains="both, gates",
        when="nobody knows how far a client is from the others; twice FedAvg's steps",
    )

    def prepare(self, round_: int, client: Client) -> list[steps.Step]:
        """The client's own adapter and gates."""
        gates = [steps.initialise_gates(GATES, "scalar")] if self.options.adaptive else []
        return [steps.initialise(LOCAL, self.seed), *gates]

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """First the client's own adapter, in the mixture with the received global one; then the global one alone."""
        trained = [LOCAL, GATES] if self.options.adaptive else [LOCAL]
        rates = gate_scale(self.training, "scalar", self.options.gate_rate) if self.options.adaptive else None
        own = steps.train(self.training, self.personal(client), trained, rate_scales=rates)
        return [own, *super().train(round_, client)]

    def personal(self, client: Client) -> plan_pb2.Mixture:
        """The mixture of both adapters."""
        if self.options.adaptive:
            return steps.gated(LOCAL, SLOT, GATES)
        return steps.mixture(LOCAL, SLOT, coefficients=[self.options.alpha, 1 - self.options.alpha])
