r"""FedRep and FedPer: one part of the adapter is everybody's, the other the client's own.

Collins, Hassani, Mokhtari, Shakkottai, "Exploiting Shared Representations for Personalized Federated Learning", ICML
2021: in each round first the own part is trained with the shared one frozen, then the shared one with the own one
frozen; the shared one is averaged. ``joint = true`` is FedPer (Arivazhagan et al., 2019): both are trained together.

The own part is the head (``own = "head"``), or the modules that comma-separated patterns match
(``"*.layer.3.*,*head"``). ``own_steps`` is the share of the local steps that goes to the own part; together both have
as many as in FedAvg.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from fedalloy_adapters.layout import Layout
from strategies.families.fedavg import SLOT
from strategies.families.part_average import Part, PartAverage
from strategies.framework import About, Client, StrategyError, steps
from strategies.framework.options import require_range


@dataclass(frozen=True)
class FedRepOptions:
    """What is the client's own, and how it is trained."""

    own: str = "head"
    """The client's own part: ``"head"``, or comma-separated patterns of module names (``"*.layer.3.*,*head"``)."""
    own_steps: float = 0.5
    """Share of the local steps that goes to the own part."""
    joint: bool = False
    """Train both parts together (FedPer)."""

    def __post_init__(self) -> None:
        require_range("own-steps", self.own_steps, 0, 1)


class FedRep(PartAverage[FedRepOptions]):
    """FedAvg of the representation."""

    name = "fedrep"
    about = About(
        "a global representation, its own head (or other modules)",
        trains="head, then the rest",
        travels="the rest up, the rest down",
    )

    def enrol(self, client: Client) -> None:
        """Both parts must be there."""
        self._own(client.layout)
        super().enrol(client)

    def shared(self, round_: int, client: Client) -> Part:
        """Everything that is not the client's own."""
        own = self._own(client.layout)
        return Part(modules=[module for module in client.layout.modules if module not in own])

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """Own part, then shared part; or both."""
        mix, total = steps.mixture(SLOT), self.local_steps(client)
        if self.options.joint:
            return [steps.train(self.training, mix, [SLOT])]
        first = round(self.options.own_steps * total)
        if 0 < self.options.own_steps < 1 < total:  # both get some
            first = min(max(first, 1), total - 1)
        parts = ((self._own(client.layout), first), (self.shared(round_, client).modules, total - first))
        return [steps.train(self.training, mix, [SLOT], modules=part, steps=n) for part, n in parts if n]

    def _own(self, layout: Layout) -> list[str]:
        if self.options.own == "head":
            found = list(layout.head_modules)
        else:
            patterns = [pattern.strip() for pattern in self.options.own.split(",")]
            found = [m for m in layout.modules if any(fnmatch.fnmatchcase(m, pattern) for pattern in patterns)]
        if not 0 < len(found) < len(layout.modules):
            raise StrategyError(
                f"fedrep.own = {self.options.own!r} selects {len(found)} of {len(layout.modules)} modules, expected "
                f"some and not all of {', '.join(layout.modules)}"
            )
        return found
