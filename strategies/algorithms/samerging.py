r"""SAMerging: coefficients of a merge are learnt from the merged models' outputs, on examples without labels.

Dalili, Mahdavi, "Model Merging via Multi-Teacher Knowledge Distillation", 2025 (arXiv 2512.21288); its abstract and a
summary were available. With experts :math:`\tau_t` and a coefficient for each expert and module, the merge
:math:`\theta_\lambda = \theta_0 + \sum_t \lambda_t \tau_t` minimises

.. math:: \sum_t \alpha_t \, E_x KL(p_t(x) \| p_{\theta_\lambda}(x))

by sharpness-aware steps over :math:`\lambda`. Here every client makes a merge of its own: the experts are its adapter
and its nearest peers' (:mod:`strategies.families.nearest_peers`), x are its own training examples without their labels,
and :math:`\alpha` is how well each expert explains its held-out examples (in the paper every expert teaches on its own
task's examples, which here belong to other clients). On one set of examples the sum is, up to a constant,
:math:`KL(\sum_t \alpha_t p_t \| p_{\theta_\lambda})`: the ensemble is the teacher. So this is FedPAE's ensemble, made
into one adapter. :math:`\lambda = sigmoid(g)` lies between 0 and 1 and starts at 0.5 (the paper has no such bound).
Merges are exact; ranks add up.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto.fedalloy.v1 import plan_pb2
from strategies.families.gates import gate_scale, require_gate_rate
from strategies.families.nearest_peers import SHARES, NearestPeers, NearestPeersOptions
from strategies.framework import About, Client, steps
from strategies.framework.options import require_range


@dataclass(frozen=True)
class SAMergingOptions(NearestPeersOptions):
    """Whose adapters a client merges, and how the coefficients are learnt."""

    rho: float = 0.05
    """Radius of the sharpness-aware steps (the default of SAM's authors); 0 means plain steps."""
    gate_rate: float = 0.0
    """Learning rate of the coefficients' logits; 0 means 0.1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("rho", self.rho, 0)
        require_gate_rate(self.gate_rate)


class SAMerging(NearestPeers[SAMergingOptions]):
    """Local training, then a merge of peers' adapters that learns from them."""

    name = "samerging"
    asks_later = ("attribute", "distill")
    about = About(
        "its own merge of its and its peers' adapters, coefficients learnt from the adapters' predictions",
        trains="A, B, head; coefficients",
        travels="P up, M P down, once",
        when="there is one exchange, and one adapter to serve; needs held-out examples; twice the steps at delivery",
    )

    def model(self, slots: list[str]) -> plan_pb2.Mixture:
        """A sum with a learned coefficient for each slot and module."""
        return steps.each_gated({slot: _gates_of(slot) for slot in slots})

    def learn(self, client: Client, slots: list[str]) -> list[steps.Step]:
        """Start the coefficients at one half, and train them towards the ensemble's predictions."""
        gates = [_gates_of(slot) for slot in slots]
        step = steps.train(
            self.training,
            self.model(slots),
            gates,
            steps=self.local_steps(client),
            rate_scales=gate_scale(self.training, "scalar", self.options.gate_rate),
            sharpness_radius=self.options.rho,
        )
        weights = {task.name: 1.0 for task in client.registration.tasks}
        taught = steps.distill(step, steps.ensemble(slots, SHARES), weights, label_weight=0.0)
        return [*(steps.initialise_gates(gate, "scalar") for gate in gates), taught]


def _gates_of(slot: str) -> str:
    return f"gates-{slot}"
