r"""FedProx: FedAvg with a pull towards the received adapter during local training.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020. The local
objective is :math:`F_k(\theta) + \mu/2 \|\theta - \theta^t\|^2` over what is trained (A, B, head), in factor space: it
depends on how a delta is split into A and B. ``mu = 0`` is FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.families.fedavg import SLOT, Averaging
from strategies.framework import About, Client, steps
from strategies.framework.options import require_range


@dataclass(frozen=True)
class FedProxOptions:
    """How strong the pull is."""

    mu: float = 0.01
    """Strength of the pull towards the received adapter; usually one of 0.001, 0.01 and 0.1."""

    def __post_init__(self) -> None:
        require_range("mu", self.mu, 0)


class FedProx(Averaging[FedProxOptions]):
    """FedAvg with a pull towards the received adapter."""

    name = "fedprox"
    about = About(
        "FedAvg's adapter; local training is pulled towards it",
        when="clients make many or unequal steps in a round",
    )

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """Local training with the pull."""
        return [steps.train(self.training, steps.mixture(SLOT), [SLOT], proximal=(SLOT, self.options.mu))]
