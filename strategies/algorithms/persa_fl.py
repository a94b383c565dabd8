r"""PersA-FL: Per-FedAvg, or Moreau envelopes, with a server that does not wait for slow clients.

Toghani, Lee, Uribe, "PersA-FL: Personalized Asynchronous Federated Learning", 2022 (arXiv 2210.01176); only its
abstract was available, the rest is derived from what it builds on. A client works on the adapter :math:`w^{t - \tau}`
that it was sent; the server adds the client's displacement of it to the newest adapter,
:math:`w^{t+1} = w^t + \beta \Delta_i`. In each of several turns, the client moves it by

* ``envelope = "maml"``: Per-FedAvg's step (:mod:`strategies.algorithms.per_fedavg`);
* ``envelope = "moreau"``: :math:`w \leftarrow w - \nu (w - \tilde w)`, where :math:`\tilde w` has been trained with a
  pull :math:`\frac{\lambda}{2} \|\tilde w - w\|^2` to w (pFedMe), and is the client's model in the end.

A round ends with run-config's ``quorum``; a later answer counts in the round in which it arrives, times
:math:`(1 + \tau)^{-decay}` (FedAsync's polynomial; ``decay = 0`` is the paper's rule: staleness is only bounded) and by
its client's share of the examples that arrived. Without a ``quorum`` nobody is late: that is Per-FedAvg, or pFedMe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from strategies.algorithms.per_fedavg import ADAPTED, Adapting, PerFedAvgOptions
from strategies.families.fedavg import SLOT
from strategies.framework import About, Answer, Client, steps
from strategies.framework.options import require_choice, require_range


@dataclass(frozen=True)
class PersAFLOptions(PerFedAvgOptions):
    """How a client personalises, and how much a late answer counts."""

    envelope: str = "maml"
    """What makes a good global adapter: ``"maml"``: a few steps from it go far; ``"moreau"``: it is close to every
    client's own adapter."""
    pull: float = 0.1
    """Lambda, the strength of the pull of a client's own adapter towards the global one, with ``"moreau"``."""
    move: float = 0.5
    """Nu, how far a turn moves the global adapter towards the client's own, with ``"moreau"``."""
    rate: float = 1.0
    """Beta, the server's factor for clients' displacements."""
    decay: float = 0.5
    """How fast a late answer loses weight with each round of delay; 0: not at all."""
    staleness: int = 10
    """An answer that is more rounds late than this counts for nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("envelope", self.envelope, ("maml", "moreau"))
        require_range("pull", self.pull, 0)
        require_range("move", self.move, 0, 1)
        require_range("rate", self.rate, 0, 2)
        require_range("decay", self.decay, 0, 100)
        require_range("staleness", self.staleness, 1, 1000)


class PersAFL(Adapting[PersAFLOptions]):
    """One start for all clients, moved by each answer when it arrives."""

    name = "persa-fl"
    about = About(
        "as per-fedavg (or a copy pulled to it); late answers count, too, but less with each round of delay",
        when="clients differ in speed and a round should not wait (with quorum); else as per-fedavg",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stale: dict[str, float] = {}  # weights of answers to earlier rounds

    def turn(self, adapting: int, moving: int) -> list[steps.Step]:
        """Per-FedAvg's turn; or a move towards the client's own adapter."""
        if self.options.envelope == "maml":
            return super().turn(adapting, moving)
        nu = self.options.move
        moved = steps.mixture(SLOT, ADAPTED, coefficients=[1 - nu, nu])
        return [self.copied(ADAPTED, SLOT), *self.adapt(adapting + moving), steps.merge(SLOT, moved, space="factor")]

    def adapt(self, count: int) -> list[steps.Step]:
        """Plain steps; or steps with a pull towards the global adapter."""
        if self.options.envelope == "maml" or not count:
            return super().adapt(count)
        mix, pull = steps.mixture(ADAPTED), (SLOT, self.options.pull)
        return [steps.train(self.training, mix, [ADAPTED], steps=count, proximal=pull)]

    def late_weight(self, rounds: int) -> float:
        """A power of the rounds of delay, up to a bound."""
        return float((1 + rounds) ** -self.options.decay) if rounds <= self.options.staleness else 0.0

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the newest global adapter plus the client's displacement."""
        self._keep(client, answer, self.options.rate)

    def absorb_late(self, round_: int, client: Client, answer: Answer, weight: float) -> None:
        """The same, with a smaller displacement."""
        self._keep(client, answer, self.options.rate * weight)
        self.stale[client.id] = weight

    def settle(self, round_: int) -> dict[str, Any]:
        """Average; the record shows who was late, and with which weight."""
        stale, self.stale = self.stale, {}
        return super().settle(round_) | ({"late": stale} if stale else {})

    def _keep(self, client: Client, answer: Answer, rate: float) -> None:
        found, start = answer.adapters[SLOT], answer.received[SLOT]
        moved = self.part_of(client).vector + rate * (found.vector - start.vector)
        self.arrived[client.id] = replace(found, vector=moved)
