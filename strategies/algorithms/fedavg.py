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

from dataclasses import dataclass

from strategies.families.fedavg import Averaging
from strategies.families.robust import RULES
from strategies.framework import About
from strategies.framework.options import OptionError, require_choice


@dataclass(frozen=True)
class FedAvgOptions:
    """Where the average is taken."""

    space: str = "factor"
    """``"factor"``: A and B apart (FedIT); ``"delta"``: their products, exactly, then truncated to the common rank."""

    robust: str = "none"
    """Instead of the weighted mean of A and of B: ``"median"``, ``"trimmed"`` mean or ``"krum"``, which one client of
    at least three cannot take over; they do not look at example counts."""

    def __post_init__(self) -> None:
        require_choice("fedavg.robust", self.robust, RULES)
        if self.robust != "none" and self.space != "factor":
            raise OptionError(f"fedavg.robust = {self.robust!r} with fedavg.space = {self.space!r}, expected 'factor'")
        require_choice("fedavg.space", self.space, ("factor", "delta"))


class FedAvg(Averaging[FedAvgOptions]):
    """One adapter for all."""

    name = "fedavg"
    about = About(
        "one global adapter (FedIT; fedavg.space = delta averages deltas exactly and truncates)", group="reference"
    )

    @property
    def robust(self) -> str:
        """As the option says."""
        return self.options.robust

    @property
    def space(self) -> str:
        """As the option says."""
        return self.options.space
