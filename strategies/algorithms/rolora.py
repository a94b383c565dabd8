r"""RoLoRA: rounds train and average B and A in turn. Each average is exact, because the other factor is common.

Chen, Guo, Ju, Dalal, Zhu, Khisti, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS
2025 (arXiv 2502.01755; parts of it write A and B the other way round). Odd rounds train B, even rounds A; B = 0 at the
start would give A no gradient. A head is trained and averaged in every round.

A client that answered in the round before lacks only what that round averaged; all others are sent everything.
"""

from __future__ import annotations

from typing import Any

from strategies.families.fedavg import SLOT
from strategies.families.part_average import NOT_A, NOT_B, Part, PartAverage
from strategies.framework import About, Answer, Client, State, StrategyError, steps
from strategies.framework.options import NoOptions


class RoLoRA(PartAverage[NoOptions]):
    """FedAvg of B, then of A, then of B, ..."""

    name = "rolora"
    about = About(
        "rounds average B and A in turn",
        trains="B, A in turn, head",
        travels="P_B, P_A in turn, both ways",
        when="half of the bytes have to be enough; averages are exact",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settled = 0
        self.seen: dict[str, int] = {}  # the last round that each client is known to have carried out

    def shared(self, round_: int, client: Client) -> Part:
        """The factor that this round trains."""
        return Part(NOT_A if round_ % 2 else NOT_B)

    def wanted(self, round_: int, client: Client) -> Part:
        """What the last round averaged, for a client that took part in it; everything for others."""
        if self.settled and self.seen.get(client.id) == self.settled:
            return self.shared(self.settled, client)
        return Part()

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """Train the round's factor and the head; the other factor stays."""
        factors = self.shared(round_, client).factors
        return [steps.train(self.training, steps.mixture(SLOT), [SLOT], factors=factors)]

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Remember which clients are up to date.

        Raises:
            StrategyError: the client has lost its slots (its disk, for example) and trained on a start from the seed.
        """
        created = any(result.initialise.created for result in answer.report.results)
        if created and self.seen.pop(client.id, 0) == self.settled > 0:
            raise StrategyError(f"client {client.id!r} lost its slots; it is sent everything in the next round")
        super().absorb(round_, client, answer)
        self.seen[client.id] = round_

    def settle(self, round_: int) -> dict[str, Any]:
        """Average the round's factor."""
        self.settled = round_
        return super().settle(round_)

    def state(self) -> State:
        """The adapter, and the last round that each client has carried out."""
        found = super().state()
        return State(found.tensors, found.values | {"settled": self.settled, "seen": dict(self.seen)})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        super().load_state(state)
        self.settled, self.seen = int(state.values["settled"]), dict(state.values["seen"])
