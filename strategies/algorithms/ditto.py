r"""Ditto: FedAvg, and beside it an adapter of the client's own that is pulled to the global one.

Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021:
:math:`v_k \leftarrow v_k - \eta(\nabla F_k(v_k) + \lambda(v_k - w^t))` with the received global w, in factor space. v
never leaves the client. ``lambda = 0`` is local training; a large one gives the global adapter. Twice FedAvg's local
work. A head that is the client's own is not pulled: it was never averaged.

With AdamW the pull is a part of the gradient that is normalised, so ``pull`` is not the paper's :math:`\lambda`, but
says how much the pull counts beside the loss. ``optimizer = "sgd"`` with ``max-grad-norm = 0`` is the rule above.
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
    """How far the own adapter may go."""

    pull: float = 0.1
    """Lambda, the strength of the pull to the global adapter; usually one of 0.01, 0.1 and 1."""

    def __post_init__(self) -> None:
        require_range("pull", self.pull, 0)


class Ditto(Averaging[DittoOptions]):
    """One global adapter, and a pulled one per client."""

    name = "ditto"
    about = About("an adapter of its own, pulled to FedAvg's", trains="both")

    def prepare(self, round_: int, client: Client) -> list[steps.Step]:
        """The client's own, from the common start."""
        return [steps.initialise(LOCAL, self.seed)]

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """First the client's own: the pull is to what was received."""
        own = steps.train(self.training, steps.mixture(LOCAL), [LOCAL], proximal=(SLOT, self.options.pull))
        return [own, *super().train(round_, client)]

    def personal(self, client: Client) -> plan_pb2.Mixture:
        """The client's own."""
        return steps.mixture(LOCAL)
