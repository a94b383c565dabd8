"""FedAvg of LoRA adapters (FedIT): one global adapter, averaged by example count.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, on LoRA
factors as in Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT), 2023.

With participants S and p_k = n_k / sum of n over S:

* ``fedavg.space = "factor"`` (FedIT): A = sum p_k A_k and B = sum p_k B_k. This is not the average of the deltas: they
  differ by sum p_k (B_k - B)(A_k - A).
* ``fedavg.space = "delta"``: the deltas are averaged exactly as a stack of ranks and truncated to the common rank
  (best approximation in Frobenius norm).
* ``fedavg.normalise``: FedNova (Wang, Liu, Liang, Joshi, Poor, "Tackling the Objective Inconsistency Problem in
  Heterogeneous Federated Optimization", NeurIPS 2020, with plain local optimisers). Where clients make different
  numbers of steps tau_k (``local-epochs``), FedAvg weighs a client by p_k tau_k. Here each update is divided by its
  steps: theta + tau sum p_k (theta_k - theta) / tau_k with tau = sum p_k tau_k. With equal steps it is FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import weighted_sum
from fedalloy_adapters.bank.store import Bank
from fedalloy_adapters.groups import average_groups
from strategies.families.fedavg import Averaging
from strategies.families.robust import RULES
from strategies.framework import About, Answer, Client
from strategies.framework.options import OptionError, require_choice, require_range


@dataclass(frozen=True)
class FedAvgOptions:
    """Where the average is taken."""

    space: str = "factor"
    """``"factor"``: average A and B separately (FedIT); ``"delta"``: average their products exactly, then truncate to
    the common rank."""

    robust: str = "none"
    """Replaces the weighted mean of A and of B: ``"median"``, ``"trimmed"`` mean or ``"krum"``. With at least three
    clients, a single one cannot control the result. These rules ignore example counts."""

    normalise: bool = False
    """Divide each client's update by its optimiser steps before averaging (FedNova): with ``local-epochs`` a client
    then counts by its share of the examples, not by that share times its steps. It needs ``space = "factor"`` and
    ``robust = "none"``."""

    late_weight: float = 0.0
    """With ``quorum``: weight of an answer that arrives one round late, relative to one in time; squared for two
    rounds, and so on. 0 ignores late answers."""

    def __post_init__(self) -> None:
        require_range("fedavg.late-weight", self.late_weight, 0, 1)
        if self.normalise and (self.space != "factor" or self.robust != "none"):
            raise OptionError("fedavg.normalise = true, expected fedavg.space = 'factor' and fedavg.robust = 'none'")
        require_choice("fedavg.robust", self.robust, RULES)
        if self.robust != "none" and self.space != "factor":
            raise OptionError(f"fedavg.robust = {self.robust!r} with fedavg.space = {self.space!r}, expected 'factor'")
        require_choice("fedavg.space", self.space, ("factor", "delta"))


class FedAvg(Averaging[FedAvgOptions]):
    """One adapter for all clients."""

    name = "fedavg"
    about = About(
        "one global adapter (FedIT; fedavg.space = delta averages deltas exactly and truncates)",
        group="reference",
        when="clients' data are alike, or you want one model for all",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: dict[str, int] = {}  # steps of each client in its last round

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Also remember how many steps the client was asked for."""
        super().absorb(round_, client, answer)
        self.steps[client.id] = self.local_steps(client)

    def average(self, adapters: Mapping[str, Adapter], examples: Mapping[str, int]) -> Adapter:
        """Average as the options say."""
        if not self.options.normalise:
            return super().average(adapters, examples)

        def over_owners(group: str, owners: Bank) -> Adapter:
            found = list(owners.values())
            shares = normalised([examples[name] for name in owners], [self.steps[name] for name in owners])
            before = self.global_model.part(found[0].layout)
            return weighted_sum([before, *found], [1 - sum(shares), *shares])

        return average_groups(self.global_model, adapters, over_owners)

    def late_weight(self, rounds: int) -> float:
        """The option's weight, once for each round of delay."""
        return self.options.late_weight**rounds

    @property
    def robust(self) -> str:
        """As the option says."""
        return self.options.robust

    @property
    def space(self) -> str:
        """As the option says."""
        return self.options.space


def normalised(examples: list[int], steps: list[int]) -> list[float]:
    """FedNova's factor for each client's update: ``p_k tau / tau_k``.

    >>> normalised([1, 1], [10, 10]), normalised([1, 3], [10, 30])
    ([0.5, 0.5], [0.625, 0.625])

    Args:
        examples: example counts, one per client.
        steps: optimiser steps that each client made.
    """
    shares = [count / sum(examples) for count in examples]
    effective = sum(share * count for share, count in zip(shares, steps, strict=True))
    return [share * effective / count for share, count in zip(shares, steps, strict=True)]
