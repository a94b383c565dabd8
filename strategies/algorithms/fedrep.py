r"""FedRep and FedPer: all clients share one part of the adapter, and each has its own other part.

Collins, Hassani, Mokhtari, Shakkottai, "Exploiting Shared Representations for Personalized Federated Learning", ICML
2021: in each round the client's own part is trained first, with the shared part frozen, then the shared part with the
own part frozen; the shared part is averaged. ``joint = true`` is FedPer (Arivazhagan et al., 2019): both are trained
together.

``own_steps`` is the share of the local steps that goes to the own part; together both have as many steps as in FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.families.fedavg import SLOT
from strategies.families.own_part import OwnPart, OwnPartOptions
from strategies.framework import About, Client, steps


@dataclass(frozen=True)
class FedRepOptions(OwnPartOptions):
    """Which part is the client's own, and how it is trained."""

    joint: bool = False
    """Train both parts together (FedPer)."""


class FedRep(OwnPart[FedRepOptions]):
    """FedAvg of the representation."""

    name = "fedrep"
    about = About(
        "a global representation, its own head (or other modules)",
        trains="head, then the rest",
        travels="the rest up, the rest down",
        when="labels differ, but the features that matter in the data are the same",
    )

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """Own part, then shared part; or both together."""
        if self.options.joint:
            return [steps.train(self.training, steps.mixture(SLOT), [SLOT])]
        return super().train(round_, client)
