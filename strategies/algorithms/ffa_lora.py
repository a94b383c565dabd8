r"""FFA-LoRA: A is drawn from the seed and frozen, B is trained and averaged, which averages the deltas exactly.

Sun, Li, Li, Ding, "Improving LoRA in Privacy-preserving Federated Learning" (FFA-LoRA), ICLR 2024:
:math:`\sum_k p_k B_k A = \bar B A`. Half the traffic of FedAvg. B usually wants a larger learning rate than A and B
together.
"""

from __future__ import annotations

from strategies.families.fedavg import SLOT
from strategies.families.part_average import NOT_A, Part, PartAverage
from strategies.framework import About, Client, steps
from strategies.framework.options import NoOptions


class FFALoRA(PartAverage[NoOptions]):
    """FedAvg of B."""

    name = "ffa-lora"
    about = About(
        "one global B; A is drawn from the seed",
        trains="B, head",
        travels="P_B up, P_B down",
        when="half of the bytes have to be enough; averages of B are exact; suits differential privacy",
    )

    def shared(self, round_: int, client: Client) -> Part:
        """B and the head."""
        return Part(NOT_A)

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """Train B and the head; A stays as it is."""
        return [steps.train(self.training, steps.mixture(SLOT), [SLOT], factors=NOT_A)]
