r"""FedSA-LoRA: both factors are trained, A is averaged, B and the head stay at the client.

Guo, Zeng, Wang, Fan, Wang, Qu, "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025: A
learns general knowledge, B the client's. The head stays local as in the authors' configuration for GLUE. A client that
is not sampled keeps its B; a new one starts at B = 0. A is averaged by example counts, which is ours. Delivery combines
the last average of A with a B that was trained with the A before it, as the next round would.
"""

from __future__ import annotations

from fedalloy_adapters.layout import Factor
from strategies.families.part_average import Part, PartAverage
from strategies.framework import About, Client
from strategies.framework.options import NoOptions


class FedSALoRA(PartAverage[NoOptions]):
    """FedAvg of A."""

    name = "fedsa-lora"
    about = About(
        "one global A, its own B and head",
        travels="A up, A down",
        when="half of the bytes have to be enough; B is the client's own",
    )

    def shared(self, round_: int, client: Client) -> Part:
        """A."""
        return Part((Factor.A,))
