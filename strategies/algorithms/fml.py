r"""Federated mutual learning: a private and a shared adapter learn from the data and from each other.

Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu, "Federated Mutual Learning", 2020 (arXiv 2006.16765). The shared
model ("meme") is averaged, the private one never leaves the client:

.. math::
    L_{private} = \alpha L_{CE} + (1 - \alpha) KL(p_{shared} \| p_{private}), \quad
    L_{shared} = \beta L_{CE} + (1 - \beta) KL(p_{private} \| p_{shared})

The losses are divided by :math:`\alpha` and :math:`\beta`. This does not affect AdamW, but it does affect the clipping
of gradients. In the paper both are updated on every batch. Here they alternate ``turns`` times in a round, and each
learns from the other's latest state. Each makes ``local-steps`` steps in total: twice FedAvg's local work.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto.fedalloy.v1 import plan_pb2
from strategies.families.fedavg import SLOT, Averaging
from strategies.framework import About, Client, steps
from strategies.framework.options import OptionError, require_range

LOCAL = "local"


@dataclass(frozen=True)
class FMLOptions:
    """How much each adapter learns from the data and from the other."""

    alpha: float = 0.5
    """Share of the private adapter's loss that comes from the data; the rest comes from the shared one."""
    beta: float = 0.5
    """Share of the shared adapter's loss that comes from the data; the rest comes from the private one."""
    temperature: float = 1.0
    """Temperature of both softmaxes in the distance of the two predictions."""
    turns: int = 2
    """How often the two adapters take turns in a round."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) <= 1:
                raise OptionError(f"{name} = {getattr(self, name)}, expected above 0 and at most 1")
        require_range("temperature", self.temperature, 1e-3)
        require_range("turns", self.turns, 1)


class FML(Averaging[FMLOptions]):
    """One shared adapter, and a private one per client."""

    name = "fml"
    about = About(
        "a private adapter and a global one that teach each other",
        trains="both",
        when="clients want a model that never leaves, beside a shared one; twice FedAvg's steps",
    )

    def prepare(self, round_: int, client: Client) -> list[steps.Step]:
        """The private adapter, from the common start."""
        return [steps.initialise(LOCAL, self.seed)]

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """In turns: the private adapter from the shared one, the shared one from the private one."""
        total = self.local_steps(client)
        turns = min(self.options.turns, total)
        plan = []
        for turn in range(turns):
            count = total * (turn + 1) // turns - total * turn // turns
            for slot, teacher, weight in ((LOCAL, SLOT, self.options.alpha), (SLOT, LOCAL, self.options.beta)):
                step = steps.train(self.training, steps.mixture(slot), [slot], steps=count)
                if weight < 1:
                    weights = {task.name: (1 - weight) / weight for task in client.registration.tasks}
                    lesson = steps.mixture(teacher)
                    step = steps.distill(step, lesson, weights, temperature=self.options.temperature)
                plan.append(step)
        return plan

    def personal(self, client: Client) -> plan_pb2.Mixture:
        """The private adapter."""
        return steps.mixture(LOCAL)
