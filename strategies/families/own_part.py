"""FedAvg of the representation: all clients share one part of the adapter, and each has its own other part.

The own part is the head (``own = "head"``), or the modules that comma-separated patterns match
(``"*.layer.3.*,*head"``). Variants say how the two are trained and what becomes of the shared one.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TypeVar

from fedalloy_adapters.layout import Layout
from strategies.families.fedavg import SLOT
from strategies.families.part_average import Part, PartAverage
from strategies.framework import Client, StrategyError, steps
from strategies.framework.options import require_range


@dataclass(frozen=True)
class OwnPartOptions:
    """Which part is the client's own, and how long it is trained."""

    own: str = "head"
    """The client's own part: ``"head"``, or comma-separated patterns of module names (``"*.layer.3.*,*head"``)."""
    own_steps: float = 0.5
    """Share of the local steps that goes to the own part."""

    def __post_init__(self) -> None:
        require_range("own-steps", self.own_steps, 0, 1)


OwnT = TypeVar("OwnT", bound=OwnPartOptions)
"""Options that say what is the client's own."""


class OwnPart(PartAverage[OwnT]):
    """A shared part that is averaged, and an own part that never travels."""

    def enrol(self, client: Client) -> None:
        """Both parts must be there."""
        self.own_modules(client.layout)
        super().enrol(client)

    def shared(self, round_: int, client: Client) -> Part:
        """Everything that is not the client's own."""
        own = self.own_modules(client.layout)
        return Part(modules=[module for module in client.layout.modules if module not in own])

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """The own part with the shared one frozen, then the shared part with the own one frozen."""
        own, shared = self.divided_steps(client)
        return [*self.train_own(client, own), *self.train_shared(client, shared)]

    def train_own(self, client: Client, count: int) -> list[steps.Step]:
        """Train the own part for ``count`` steps."""
        own = self.own_modules(client.layout)
        return [steps.train(self.training, steps.mixture(SLOT), [SLOT], modules=own, steps=count)] if count else []

    def train_shared(self, client: Client, count: int, pull: tuple[str, float] | None = None) -> list[steps.Step]:
        """Train the shared part for ``count`` steps; ``pull`` is a slot to pull towards, and the pull's strength."""
        if not count:
            return []
        part = self.shared(0, client).modules
        return [steps.train(self.training, steps.mixture(SLOT), [SLOT], modules=part, steps=count, proximal=pull)]

    def divided_steps(self, client: Client) -> tuple[int, int]:
        """A round's local steps for the own and the shared part; both get some if the share is between 0 and 1."""
        total, share = self.local_steps(client), self.options.own_steps
        first = round(share * total)
        if 0 < share < 1 < total:
            first = min(max(first, 1), total - 1)
        return first, total - first

    def own_modules(self, layout: Layout) -> list[str]:
        """Names of the modules that are the client's own.

        Raises:
            StrategyError: these are all modules, or none.
        """
        if self.options.own == "head":
            found = list(layout.head_modules)
        else:
            patterns = [pattern.strip() for pattern in self.options.own.split(",")]
            found = [m for m in layout.modules if any(fnmatch.fnmatchcase(m, pattern) for pattern in patterns)]
        if not 0 < len(found) < len(layout.modules):
            raise StrategyError(
                f"{self.name}.own = {self.options.own!r} selects {len(found)} of {len(layout.modules)} modules, "
                f"expected some and not all of {', '.join(layout.modules)}"
            )
        return found
