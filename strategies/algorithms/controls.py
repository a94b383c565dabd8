"""Controls: what merging has to beat. They are in every comparison, whatever it compares.

* ``fedavg-head``: FedAvg, and at the end each client re-fits the head on its own data. Shows how much of a personal
  model is nothing but its labels.
* ``fedavg-tuned``: FedAvg in the first half of the rounds, then each client trains on from the global adapter, alone:
  as many local steps in all as FedAvg has.
* ``local-all``: local training on training and validation examples together, with as many steps as ``local``. A
  strategy may choose weights, models or gates on validation examples (``learns_from``); what that is
  worth as training data is what it has to beat.
* ``local-twice``: the exact average of two local runs of the same client, which differ in the order of batches only.
  What an average of adapters gains without anybody else's data; twice the local work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proto.fedalloy.v1 import plan_pb2
from strategies.algorithms.local import Local
from strategies.families.fedavg import SLOT, Averaging
from strategies.framework import About, Answer, Brief, Client, State, steps
from strategies.framework.options import require_range

TWINS = ("first", "second")


@dataclass(frozen=True)
class FedAvgHeadOptions:
    """How long heads are re-fitted."""

    steps: int = 0
    """Steps on the head at the end; 0: as many as in a round."""

    def __post_init__(self) -> None:
        require_range("steps", self.steps, 0, 2**31 - 1)


class FedAvgHead(Averaging[FedAvgHeadOptions]):
    """FedAvg with heads re-fitted at the end."""

    name = "fedavg-head"
    about = About("FedAvg's adapter, with the head re-fitted on its own data at the end", group="control")

    def deliver(self, client: Client) -> Brief:
        """The global adapter with the client's head; plain FedAvg where no head is averaged to begin with."""
        brief = super().deliver(client)
        if not self._head(client):
            return brief
        count = self.options.steps or self.local_steps(client)
        fit = steps.train(self.training, self.personal(client), [SLOT], modules=self._head(client), steps=count)
        return Brief([fit, *brief.steps], brief.adapters)

    def _head(self, client: Client) -> list[str]:
        return list(client.layout.head_modules)


@dataclass(frozen=True)
class FedAvgTunedOptions:
    """When clients go on alone."""

    federated_rounds: int = 0
    """Rounds of FedAvg; 0: half of them."""

    def __post_init__(self) -> None:
        require_range("federated-rounds", self.federated_rounds, 0)


class FedAvgTuned(Averaging[FedAvgTunedOptions]):
    """FedAvg, then everybody alone."""

    name = "fedavg-tuned"
    about = About(
        "FedAvg's adapter, then trained on alone", travels="P up, P down in half of the rounds", group="control"
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tuning: set[str] = set()  # clients that train on alone

    def needs_everyone(self, round_: int) -> bool:
        """Rounds alone cost no bytes."""
        return not self._is_federated(round_)

    def brief(self, round_: int, client: Client) -> Brief:
        """FedAvg's; later nothing is sent up, and nothing down once the client has begun."""
        brief = super().brief(round_, client)
        if self._is_federated(round_):
            return brief
        plan = [step for step in brief.steps if not step.HasField("send")]
        return Brief(plan, {} if client.id in self.tuning else brief.adapters)

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Remember who trains alone."""
        if self._is_federated(round_):
            super().absorb(round_, client, answer)
        else:
            self.tuning.add(client.id)

    def deliver(self, client: Client) -> Brief:
        """What the client has made of the global adapter."""
        brief = super().deliver(client)
        return Brief(brief.steps, {} if client.id in self.tuning else brief.adapters)

    def state(self) -> State:
        """The global adapter, and who trains alone."""
        found = super().state()
        return State(found.tensors, found.values | {"tuning": sorted(self.tuning)})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        super().load_state(state)
        self.tuning = set(state.values["tuning"])

    def _is_federated(self, round_: int) -> bool:
        return round_ <= (self.options.federated_rounds or max(1, self.rounds // 2))


class LocalAll(Local):
    """Local training on all that a client has but its test examples."""

    name = "local-all"
    about = About(
        "its own adapter, trained on its validation examples, too; nothing shared", travels="0", group="control"
    )

    @property
    def learns_from(self) -> tuple[str, ...]:
        """Both."""
        return ("train", "validation")

    def split(self, client: Client) -> str:
        """Both, where there are both."""
        return "train+validation" if client.held_out else "train"


class LocalTwice(Local):
    """Two local runs, averaged."""

    name = "local-twice"
    about = About("the exact average of two local runs of its own", trains="both", travels="0", group="control")

    def brief(self, round_: int, client: Client) -> Brief:
        """Evaluate the average of both, train each on."""
        plan = [steps.initialise(slot, self.seed, keep_existing=round_ > 1) for slot in TWINS]
        plan.append(steps.evaluate(self.training, _average()))
        return Brief([*plan, *(steps.train(self.training, steps.mixture(slot), [slot]) for slot in TWINS)])

    def deliver(self, client: Client) -> Brief:
        """The average."""
        plan = [steps.initialise(slot, self.seed) for slot in TWINS]
        return Brief([*plan, steps.save(_average()), steps.evaluate(self.training, _average())])


def _average() -> plan_pb2.Mixture:
    return steps.mixture(*TWINS, coefficients=[0.5, 0.5])
