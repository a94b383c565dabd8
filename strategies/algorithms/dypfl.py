r"""DyPFL: a client personalises as long as that helps, and in the end gets the best of three models.

Ma, Lu, Li, Cui, "Personalizing or Not: Dynamically Personalized Federated Learning with Incentives", 2022
(arXiv 2208.06192). Only its abstract was available; the details are derived from it:

* Beside FedAvg's adapter every client has its own, pulled towards FedAvg's as in Ditto.
* The incentive: if a client's own adapter does worse than the global one on held-out examples, the client starts again
  from the global one. So no client is worse off for having personalised.
* At delivery a client takes the model that does best on held-out examples: the global adapter, its own, or the exact
  average of both deltas. The personalisation rate is the share of the round's clients that continued with their own.

Held-out examples are the validation examples. A client without any decides on its training examples, which favours its
own adapter. Local work is twice FedAvg's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proto.fedalloy.v1 import plan_pb2
from strategies.families.fedavg import SLOT, Averaging
from strategies.framework import About, Answer, Brief, Client, steps
from strategies.framework.options import require_range

LOCAL, MERGED, CHOSEN = "local", "merged", "chosen"


@dataclass(frozen=True)
class DyPFLOptions:
    """How a client's own adapter is trained."""

    pull: float = 0.1
    """Strength of the pull of a client's own adapter towards the global one; 0 means none."""

    def __post_init__(self) -> None:
        require_range("pull", self.pull, 0)


class DyPFL(Averaging[DyPFLOptions]):
    """One global adapter, one per client, and a choice."""

    name = "dypfl"
    about = About(
        "FedAvg's adapter, its own or their average: the best on held-out examples",
        trains="both",
        when="some clients gain by personalising and others do not; needs held-out examples; twice FedAvg's steps",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.personalising: dict[str, bool] = {}

    @property
    def learns_from(self) -> tuple[str, ...]:
        """Training and validation examples; the latter decide."""
        return ("train", "validation")

    def prepare(self, round_: int, client: Client) -> list[steps.Step]:
        """The client's own adapter, from the common start."""
        return [steps.initialise(LOCAL, self.seed)]

    def brief(self, round_: int, client: Client) -> Brief:
        """Continue with the client's own adapter or from the global one; evaluate, train both, send the global one."""
        plan = [
            *self.prepare(round_, client),
            self._choose(client, LOCAL, (LOCAL, SLOT)),
            steps.evaluate(self.training, steps.mixture(LOCAL)),
            steps.train(self.training, steps.mixture(LOCAL), [LOCAL], proximal=(SLOT, self.options.pull)),
            *self.train(round_, client),
            steps.send(self.training, SLOT),
        ]
        return Brief(plan, {SLOT: self.part_of(client)})

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the trained adapter, and whether the client personalises."""
        super().absorb(round_, client, answer)
        chosen = next(result.select.weights for result in answer.report.results if result.HasField("select"))
        self.personalising[client.id] = bool(chosen[0])

    def settle(self, round_: int) -> dict[str, Any]:
        """Average; the record shows the personalisation rate."""
        found, self.personalising = self.personalising, {}
        rate = {"personalisation_rate": round(sum(found.values()) / len(found), 6)} if found else {}
        return super().settle(round_) | rate

    def deliver(self, client: Client) -> Brief:
        """The best of the three models."""
        mix = self.personal(client)
        both = steps.mixture(SLOT, LOCAL, coefficients=[0.5, 0.5])
        plan = [
            *self.prepare(0, client),
            steps.merge(MERGED, both),
            self._choose(client, CHOSEN, (SLOT, LOCAL, MERGED)),
            steps.save(mix),
            steps.evaluate(self.training, mix),
        ]
        return Brief(plan, {SLOT: self.part_of(client)})

    def personal(self, client: Client) -> plan_pb2.Mixture:
        """The model that the client has chosen."""
        return steps.mixture(CHOSEN)

    def _choose(self, client: Client, target: str, slots: tuple[str, ...]) -> steps.Step:
        split = "validation" if client.held_out else "train"
        return steps.select(target, slots, "best", split=split)
