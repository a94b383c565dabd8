"""Controls: the baselines that merging has to beat. Every comparison contains them.

* ``fedavg-head``: FedAvg, and at the end each client re-fits the head on its own data. It shows how much a personal
  model gains from its labels alone.
* ``fedavg-tuned``: FedAvg in the first half of the rounds; then each client trains the global adapter further, alone.
  In total it makes as many local steps as FedAvg.
* ``local-all``: local training on training and validation examples together, with as many steps as ``local``. A
  strategy may choose weights, models or gates on validation examples (``learns_from``). It has to beat what these
  examples are worth as training data.
* ``local-twice``: the exact average of two local runs of the same client, which differ only in the order of batches. It
  shows what averaging gains without anybody else's data. Local work is doubled.
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
    """How long each head is re-fitted."""

    steps: int = 0
    """Steps on the head at the end; 0 means as many as in a round."""

    def __post_init__(self) -> None:
        require_range("steps", self.steps, 0, 2**31 - 1)


class FedAvgHead(Averaging[FedAvgHeadOptions]):
    """FedAvg with heads re-fitted at the end."""

    name = "fedavg-head"
    about = About(
        "FedAvg's adapter, with the head re-fitted on its own data at the end",
        group="control",
        when="control: is it only the head?",
    )

    def deliver(self, client: Client) -> Brief:
        """The global adapter with a re-fitted head; plain FedAvg if no head is averaged."""
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
    """When clients begin to train alone."""

    federated_rounds: int = 0
    """Rounds of FedAvg; 0 means half of the run's rounds."""

    def __post_init__(self) -> None:
        require_range("federated-rounds", self.federated_rounds, 0)


class FedAvgTuned(Averaging[FedAvgTunedOptions]):
    """FedAvg, then every client alone."""

    name = "fedavg-tuned"
    about = About(
        "FedAvg's adapter, trained further on its own data",
        travels="P up, P down in half of the rounds",
        group="control",
        when="control: is it only a few steps of one's own?",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tuning: set[str] = set()  # clients that train on alone

    def needs_everyone(self, round_: int) -> bool:
        """In the rounds in which clients train alone: they cost no bytes."""
        return not self._is_federated(round_)

    def brief(self, round_: int, client: Client) -> Brief:
        """FedAvg's brief. Later nothing is sent up, and nothing down once the client trains alone."""
        brief = super().brief(round_, client)
        if self._is_federated(round_):
            return brief
        plan = [step for step in brief.steps if not step.HasField("send")]
        return Brief(plan, {} if client.id in self.tuning else brief.adapters)

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Remember which clients train alone."""
        if self._is_federated(round_):
            super().absorb(round_, client, answer)
        else:
            self.tuning.add(client.id)

    def deliver(self, client: Client) -> Brief:
        """The client's own version of the global adapter."""
        brief = super().deliver(client)
        return Brief(brief.steps, {} if client.id in self.tuning else brief.adapters)

    def state(self) -> State:
        """The global adapter, and which clients train alone."""
        found = super().state()
        return State(found.tensors, found.values | {"tuning": sorted(self.tuning)})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        super().load_state(state)
        self.tuning = set(state.values["tuning"])

    def _is_federated(self, round_: int) -> bool:
        return round_ <= (self.options.federated_rounds or max(1, self.rounds // 2))


class LocalAll(Local):
    """Local training on all of a client's examples except its test examples."""

    name = "local-all"
    about = About(
        "its own adapter, trained on its validation examples, too; nothing shared",
        travels="0",
        group="control",
        when="control: is it only the validation examples?",
    )

    @property
    def learns_from(self) -> tuple[str, ...]:
        """Training and validation examples."""
        return ("train", "validation")

    def split(self, client: Client) -> str:
        """Both splits, if the client has both."""
        return "train+validation" if client.held_out else "train"


class LocalTwice(Local):
    """Two local runs of the same client, averaged."""

    name = "local-twice"
    about = About(
        "the exact average of two local runs of its own",
        trains="both",
        travels="0",
        group="control",
        when="control: is it only the average of two runs?",
    )

    def brief(self, round_: int, client: Client) -> Brief:
        """Evaluate the average of both, then train each of them further."""
        plan = [steps.initialise(slot, self.seed, keep_existing=round_ > 1) for slot in TWINS]
        plan.append(steps.evaluate(self.training, _average()))
        return Brief([*plan, *(steps.train(self.training, steps.mixture(slot), [slot]) for slot in TWINS)])

    def deliver(self, client: Client) -> Brief:
        """The average."""
        plan = [steps.initialise(slot, self.seed) for slot in TWINS]
        return Brief([*plan, steps.save(_average()), steps.evaluate(self.training, _average())])


def _average() -> plan_pb2.Mixture:
    return steps.mixture(*TWINS, coefficients=[0.5, 0.5])
