r"""FedALT: each client's own adapter is never overwritten; a frozen "rest of world" adapter works beside it.

Bian, Wang, Zhang, Xu, "FedALT: Federated Fine-Tuning through Adaptive Local Training with Rest-of-World LoRA", AAAI
2026 (arXiv 2503.11880): :math:`A^R_k = \frac{1}{K-1} \sum_{m \neq k} A^L_m`, the same for B, and a mixer that stays
at the client,
:math:`y = W_0 x + \alpha(x) \Delta_L x + (1 - \alpha(x)) \Delta_R x`.

``mixer = "token"``, the authors' (their layers' ``lora_route``): :math:`\alpha` is the sigmoid of a projection of the
module's input at each token, which is their softmax over two; theirs starts at random, here at one half. ``"input"``:
that projection averaged over an example's tokens; ``"scalar"``: a number for each module. The paper has no head; here
the head is mixed like the rest, by its own number. If a client's labels are its own, no other client has its head,
and that side of the mixture is the base model's. For a client that did not answer, its last known upload is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.families.gates import gate_scale, require_gate_rate
from strategies.families.peer_average import LOCAL, Peers
from strategies.framework import About, Brief, Client, steps
from strategies.framework.options import require_choice

REST, GATES = "rest", "gates"


@dataclass(frozen=True)
class FedALTOptions:
    """How the two adapters are mixed."""

    mixer: str = "token"
    """``"token"``: by the module's input, for each token; ``"input"``: by its mean, for each example; ``"scalar"``: one
    learned share for each module.
    """
    gate_rate: float = 0.0
    """Learning rate of the mixer; 0 means 0.1 for ``"scalar"`` and ``learning-rate`` for the others."""

    def __post_init__(self) -> None:
        require_gate_rate(self.gate_rate)
        require_choice("mixer", self.mixer, ("token", "input", "scalar"))


class FedALT(Peers[FedALTOptions]):
    """The mean of the others' adapters, mixed in by a gate."""

    name = "fedalt"
    about = About(
        "its own adapter and the mean of the others', gated by the input",
        trains="own, gates",
        when="other clients' knowledge helps for some inputs and harms for others",
    )

    def weigh(self, names: list[str]) -> Tensor:
        """Equal weights for all others; zero for a client that is alone."""
        others = 1 - torch.eye(len(names), dtype=torch.float64)
        return others / max(len(names) - 1, 1)

    def brief(self, round_: int, client: Client) -> Brief:
        """Install the others' mean, evaluate the mixture, train the client's adapter and the mixer, send the former."""
        mix = steps.gated(LOCAL, REST, GATES)
        rest = self.combined(REST, client)
        plan = [
            *self._slots(),
            steps.evaluate(self.training, mix),
            steps.train(
                self.training,
                mix,
                [LOCAL, GATES],
                rate_scales=gate_scale(self.training, self.options.mixer, self.options.gate_rate),
            ),
            self.send(),
        ]
        return Brief(plan, rest or {})

    def deliver(self, client: Client) -> Brief:
        """The mixture with the mean of the others' last adapters."""
        mix = steps.gated(LOCAL, REST, GATES)
        rest = self.combined(REST, client)
        plan = [*self._slots(), steps.save(mix), steps.evaluate(self.training, mix)]
        return Brief(plan, rest or {})

    def _slots(self) -> list[steps.Step]:
        """Steps that create the slots; the others' mean is zero until something is known of them."""
        gates = steps.initialise_gates(GATES, self.options.mixer)
        return [*self.begin(), steps.initialise(REST, self.seed), gates]
