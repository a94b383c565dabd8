r"""FedDPA: a global and a local adapter whose outputs are added, :math:`y = W_0 x + (1 - u) \Delta_G x + u \Delta_L x`.

Yang, Long, Shen, Jiang, Blumenstein, "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024.

* ``variant = "t"`` (FedDPA-T): from the second round on, first the local adapter is trained beside the frozen global
  one, then the global one alone; only the global one travels.
* ``variant = "f"`` (FedDPA-F): the first half of the rounds (or ``federated-rounds``) is FedAvg; in the others the
  local adapter is trained beside the resulting global one, which travels down once; nothing else travels.

u is fixed (``local_share``) in training. With ``weights = "example"`` each test example has its own, as in the paper:
``local_share`` times the mean cosine of its embedding with those of ``references`` training examples, drawn anew in
each round, with the local adapter active. (The embedding is the input of the last adapted module, averaged over the
prompt's tokens; theirs is the last hidden state of the last token. The released code multiplies the weight with the
adapter that is active, which seems to be the global one; here it is the local one's, as the method suggests.) Then
evaluations write no texts, and the model is kept in parts. The server's mean is weighted by example counts (in the
authors' code all clients count the same). A client that has no local adapter yet uses the global one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proto.fedalloy.v1 import plan_pb2
from strategies.families.fedavg import SLOT, Averaging
from strategies.framework import About, Answer, Brief, Client, State, steps
from strategies.framework.options import require_choice, require_range

LOCAL, LIKENESS = "local", "likeness"


@dataclass(frozen=True)
class FedDPAOptions:
    """How the two adapters take turns."""

    variant: str = "t"
    """``"t"``: train both in every round, one after the other; ``"f"``: in early rounds the global one, later the local
    one.
    """
    local_share: float = 0.5
    """u, the weight of the local adapter's output."""
    weights: str = "fixed"
    """``"fixed"``: u for every example; ``"example"``: less for one that is unlike the client's training examples."""
    references: int = 5
    """With ``"example"``: how many training examples it is compared with."""
    federated_rounds: int = 0
    """Rounds of the global adapter in variant ``"f"``; 0 means half of the run's rounds."""

    def __post_init__(self) -> None:
        require_choice("variant", self.variant, ("t", "f"))
        require_choice("weights", self.weights, ("fixed", "example"))
        require_range("references", self.references, 1, 1000)
        require_range("local-share", self.local_share, 0, 1)
        require_range("federated-rounds", self.federated_rounds, 0)


class FedDPA(Averaging[FedDPAOptions]):
    """One global adapter, and one per client beside it."""

    name = "feddpa"
    about = About(
        "FedAvg's adapter and its own, outputs added",
        trains="both in turn",
        travels="P up, P down (variant f: in half of the rounds)",
        when="test data are partly unlike a client's training data; twice FedAvg's steps",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own: set[str] = set()  # clients that have trained a local adapter

    def brief(self, round_: int, client: Client) -> Brief:
        """FedAvg's brief. Without the global branch (variant "f") nothing goes up and the adapter goes down once."""
        brief = super().brief(round_, client)
        if self._is_federated(round_):
            return brief
        plan = [step for step in brief.steps if not step.HasField("send")]
        return Brief(plan, {} if client.id in self.own else brief.adapters)

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Remember which clients have a local adapter."""
        if self._is_federated(round_):
            super().absorb(round_, client, answer)
        if self._trains_own(round_):
            self.own.add(client.id)

    def needs_everyone(self, round_: int) -> bool:
        """In local rounds: they cost no bytes."""
        return not self._is_federated(round_)

    def prepare(self, round_: int, client: Client) -> list[steps.Step]:
        """The client's local adapter, from the common start; for weights by example, how training data look to it."""
        plan = [steps.initialise(LOCAL, self.seed)]
        if self._weighs(client):
            samples, most = self.options.references, self.options.local_share
            plan.append(steps.likeness(LIKENESS, LOCAL, samples=samples, most=most))
        return plan

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """The client's local adapter beside the global one, then the global one alone."""
        plan = []
        if self._trains_own(round_):
            plan.append(steps.train(self.training, self._both(), [LOCAL]))
        return plan + (super().train(round_, client) if self._is_federated(round_) else [])

    def personal(self, client: Client) -> plan_pb2.Mixture:
        """The sum of both, once the client has a local adapter."""
        if self._weighs(client):
            return steps.by_likeness(LOCAL, SLOT, LIKENESS)
        return self._both() if client.id in self.own else super().personal(client)

    def state(self) -> State:
        """The global adapter, and which clients have a local one."""
        found = super().state()
        return State(found.tensors, found.values | {"own": sorted(self.own)})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        super().load_state(state)
        self.own = set(state.values["own"])

    def _both(self) -> plan_pb2.Mixture:
        return steps.mixture(SLOT, LOCAL, coefficients=[1 - self.options.local_share, self.options.local_share])

    def _weighs(self, client: Client) -> bool:
        return self.options.weights == "example" and client.id in self.own

    def _is_federated(self, round_: int) -> bool:
        half = self.options.federated_rounds or max(1, self.rounds // 2)
        return self.options.variant == "t" or round_ <= half

    def _trains_own(self, round_: int) -> bool:
        return round_ > 1 if self.options.variant == "t" else not self._is_federated(round_)
