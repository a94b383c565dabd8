r"""DyPFL: a client personalises as long as it gains by it, and is delivered the best of three models.

Ma, Lu, Li, Cui, "Personalizing or Not: Dynamically Personalized Federated Learning with Incentives", 2022
(arXiv 2208.06192). Its abstract was at hand; how its parts work is derived from it:

* Beside FedAvg's adapter every client has one of its own, pulled to FedAvg's as Ditto's is.
* The incentive: a client whose own adapter does worse than the global one on held-out examples does not go on with it,
  but starts again from the global one. So nobody is worse off for having personalised.
* At delivery a client takes what does best on held-out examples: the global adapter, its own, or the exact average of
  both deltas. The personalisation rate is the share of the round's clients that went on with their own.

Held-out are the validation examples; a client without any decides on its training examples, which favours its own
adapter. Twice FedAvg's local work.
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
    """How the own adapter is trained."""

    pull: float = 0.1
    """Strength of the pull of the own adapter to the global one; 0: none."""

    def __post_init__(self) -> None:
        require_range("pull", self.pull, 0)


class DyPFL(Averaging[DyPFLOptions]):
    """One global adapter, one per client, and a choice."""

    name = "dypfl"
    about = About("the best on held-out examples of FedAvg's adapter, its own and their average", trains="both")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.personalising: dict[str, bool] = {}

    @property
    def learns_from(self) -> tuple[str, ...]:
        """Validation examples decide."""
        return ("train", "validation")

    def prepare(self, round_: int, client: Client) -> list[steps.Step]:
        """The client's own, from the common start."""
        return [steps.initialise(LOCAL, self.seed)]

    def brief(self, round_: int, client: Client) -> Brief:
        """Go on with the own adapter, or from the global one; evaluate, train both, send the global one."""
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
        """The best of three."""
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
        """What the client has chosen."""
        return steps.mixture(CHOSEN)

    def _choose(self, client: Client, target: str, slots: tuple[str, ...]) -> steps.Step:
        split = "validation" if client.held_out else "train"
        return steps.select(target, slots, "best", split=split)
