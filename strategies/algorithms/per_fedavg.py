r"""Per-FedAvg: a global adapter that becomes a good personal one by a few steps on the client's own data.

Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning
Approach", NeurIPS 2020, in its first-order form (FO): with the received w, in each of several turns

.. math:: \tilde w = w - \alpha \nabla F(w; D), \qquad w \leftarrow w - \beta \nabla F(\tilde w; D')

on batches D and D'. The client's model is :math:`\tilde w`, fine-tuned from the last w. Local work is FedAvg's:
``local-steps`` are divided among the turns, and in each turn among the two lines. Several steps may stand for each
gradient (one in the paper): the second line adds the displacement of the steps that start at :math:`\tilde w`. With
``optimizer = "sgd"`` and ``max-grad-norm = 0`` it is the paper's rule; AdamW divides each step by the gradient's size.
Reptile (Nichol, Achiam, Schulman, 2018) would move w to where all steps end: with a server rate of one that is FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from proto.fedalloy.v1 import plan_pb2
from strategies.families.fedavg import SLOT, Averaging
from strategies.framework import About, Brief, Client, steps
from strategies.framework.options import require_range

ADAPTED, AHEAD = "adapted", "ahead"


@dataclass(frozen=True)
class PerFedAvgOptions:
    """How a round's local steps are divided."""

    turns: int = 5
    """How many times in a round the client adapts and then moves the global adapter; at most half of
    ``local-steps``."""

    def __post_init__(self) -> None:
        require_range("turns", self.turns, 1, 1000)


TurnsT = TypeVar("TurnsT", bound=PerFedAvgOptions)
"""Options that say how many turns there are."""


class Adapting(Averaging[TurnsT]):
    """One start for all clients, and a few steps by each client on its own data."""

    def brief(self, round_: int, client: Client) -> Brief:
        """Evaluate the received global adapter; adapt and move it, turn by turn; send it."""
        plan = [steps.evaluate(self.training, steps.mixture(SLOT))]
        for share in self.shares(self.local_steps(client)):
            plan += self.turn(*share)
        return Brief([*plan, steps.send(self.training, SLOT)], {SLOT: self.part_of(client)})

    def deliver(self, client: Client) -> Brief:
        """Adapt once more, with the steps of a turn."""
        mix = self.personal(client)
        count = self.shares(self.local_steps(client))[0][0]
        plan = [self.copied(ADAPTED, SLOT), *self.adapt(count), steps.save(mix), steps.evaluate(self.training, mix)]
        return Brief(plan, {SLOT: self.part_of(client)})

    def personal(self, client: Client) -> plan_pb2.Mixture:
        """The adapted adapter."""
        return steps.mixture(ADAPTED)

    def turn(self, adapting: int, moving: int) -> list[steps.Step]:
        """One turn, with these numbers of steps of either kind."""
        return [self.copied(ADAPTED, SLOT), *self.adapt(adapting), *self._move(moving)]

    def shares(self, total: int) -> list[tuple[int, int]]:
        """Divide steps among turns, and each turn's steps among the two kinds; a single step is of the second kind."""
        turns = max(1, min(self.options.turns, total // 2))
        counts = [total * (turn + 1) // turns - total * turn // turns for turn in range(turns)]
        return [(count // 2, count - count // 2) for count in counts]

    def adapt(self, count: int) -> list[steps.Step]:
        """Steps that train the client's own adapter, which starts as a copy of the global one."""
        return [steps.train(self.training, steps.mixture(ADAPTED), [ADAPTED], steps=count)] if count else []

    def _move(self, count: int) -> list[steps.Step]:
        """Move the global adapter by the displacement of the steps that start at the adapted one."""
        ahead = steps.train(self.training, steps.mixture(AHEAD), [AHEAD], steps=count)
        moved = steps.mixture(SLOT, AHEAD, ADAPTED, coefficients=[1.0, 1.0, -1.0])
        return [self.copied(AHEAD, ADAPTED), ahead, steps.merge(SLOT, moved, space="factor")]

    def copied(self, slot: str, source: str) -> steps.Step:
        """A copy made by a merge step: copy steps at the start of a plan run before the global adapter is installed."""
        return steps.merge(slot, steps.mixture(source), space="factor")


class PerFedAvg(Adapting[PerFedAvgOptions]):
    """FedAvg of such starts."""

    name = "per-fedavg"
    about = About(
        "FedAvg's adapter, trained so that a few steps on its own data go far",
        when="new clients with few examples should start well; FedAvg's steps, and a few at delivery",
    )
