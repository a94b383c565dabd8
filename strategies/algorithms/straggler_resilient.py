r"""Straggler-resilient personalised learning: a common representation, trained by the fastest clients first.

Tziotis, Shen, Pedarsani, Hassani, Mokhtari, "Straggler-Resilient Personalized Federated Learning", TMLR 2023: FedRep (a
shared representation, own heads) in which the first rounds ask only the clients that answer soonest. Early rounds are
far from the optimum, and there the examples of a few clients are enough. As accuracy grows the cohort doubles, until
all take part. A round takes as long as its slowest participant, so only the last rounds wait for slow clients.

The first cohort is the share ``first`` of the clients; it doubles every round (in the paper when the loss has fallen to
the cohort's statistical accuracy, which is not known here). Speeds are those of the answers so far. Clients that were
never asked get the representation at delivery, and fit a head to it in ``local-steps`` steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strategies.families.own_part import OwnPart, OwnPartOptions
from strategies.framework import About, Answer, Brief, Client, State
from strategies.framework.options import require_range


@dataclass(frozen=True)
class StragglerResilientOptions(OwnPartOptions):
    """Which part is the client's own, and which clients begin."""

    first: float = 0.5
    """Share of the clients in the first round's cohort."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("first", self.first, 0, 1)


class StragglerResilient(OwnPart[StragglerResilientOptions]):
    """FedRep whose cohorts grow."""

    name = "straggler-resilient"
    about = About(
        "a global representation, begun by the fastest clients; its own head (or other modules)",
        trains="head, then the rest",
        travels="the rest up, the rest down, for the fastest at first",
        when="labels differ, and some clients are much slower than others",
    )
    participants = "fastest"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trained: set[str] = set()

    def fraction(self, configured: float) -> float:
        """The first cohort's share."""
        return self.options.first

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the part, and remember who has a trained head."""
        super().absorb(round_, client, answer)
        self.trained.add(client.id)

    def deliver(self, client: Client) -> Brief:
        """FedRep's delivery; a client that was never asked fits its own part first."""
        brief = super().deliver(client)
        if client.id in self.trained:
            return brief
        start = self.prepare(0, client)
        return Brief(
            [*start, *self.train_own(client, self.local_steps(client)), *brief.steps[len(start) :]], brief.adapters
        )

    def state(self) -> State:
        """The representation, and who has trained."""
        found = super().state()
        return State(found.tensors, found.values | {"trained": sorted(self.trained)})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        super().load_state(state)
        self.trained = set(state.values["trained"])
