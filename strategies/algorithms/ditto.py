r"""Ditto: FedAvg, and each client's own adapter, which is pulled towards the global one.

Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021:
:math:`v_k \leftarrow v_k - \eta(\nabla F_k(v_k) + \lambda(v_k - w^t))` with the received global w, in factor space. v
never leaves the client. ``lambda = 0`` is local training; a large lambda gives the global adapter. Local work is twice
FedAvg's. A client's own head is not pulled, because it was never averaged.

AdamW normalises the gradient, including the pull. So ``pull`` is not the paper's :math:`\lambda`: it says how
much the pull counts relative to the loss. ``optimizer = "sgd"`` with ``max-grad-norm = 0`` is the rule above.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto.fedalloy.v1 import plan_pb2
from strategies.families.fedavg import SLOT, Averaging
from strategies.framework import About, Client, steps
from strategies.framework.options import require_range

LOCAL = "local"


@dataclass(frozen=True)
class DittoOptions:
    """How far the client's own adapter may move from the global one."""

    pull: float = 0.1
    """Lambda, the strength of the pull towards the global adapter; usually one of 0.01, 0.1 and 1."""

    def __post_init__(self) -> None:
        require_range("pull", self.pull, 0)


class Ditto(Averaging[DittoOptions]):
    """One global adapter, and a pulled one per client."""

    name = "ditto"
    about = About(
        "an adapter of its own, pulled to FedAvg's",
        trains="both",
        when="clients differ, and robustness or fairness matters; twice FedAvg's steps",
    )

    def prepare(self, round_: int, client: Client) -> list[steps.Step]:
        """The client's own adapter, from the common start."""
        return [steps.initialise(LOCAL, self.seed)]

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """First the client's own adapter, pulled towards the received one; then the global adapter."""
        own = steps.train(self.training, steps.mixture(LOCAL), [LOCAL], proximal=(SLOT, self.options.pull))
        return [own, *super().train(round_, client)]

    def personal(self, client: Client) -> plan_pb2.Mixture:
        """The client's own adapter."""
        return steps.mixture(LOCAL)
