r"""Strategies that send every client its nearest peers' adapters, once, at the end: local training until then.

A client finds out how well each adapter, including its own, explains its held-out examples: ``passes`` steps of
expectation maximisation from equal shares give the maximum-likelihood mixture of their predictions,

.. math:: q_{sc} \propto \pi_c e^{-\ell(h_c(x_s), y_s)}, \qquad \pi_c = mean_s q_{sc}

Candidates are the ``peers`` whose deltas have the highest cosine with its own. If the client's labels are its own, it
tries the others' adapters with its own head. Without validation examples the shares come from training examples, which
favours the client's own adapter.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import gram
from fedalloy_adapters.bank.store import Bank, Made
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import AlloyStrategy, Answer, Brief, Client, State, steps
from strategies.framework.options import require_range

LOCAL, SHARES = "local", "shares"


@dataclass(frozen=True)
class NearestPeersOptions:
    """How many other adapters a client tries, and for how long."""

    peers: int = 3
    """Number of other clients' adapters that a client is sent, once."""
    passes: int = 5
    """Passes over the held-out examples that find the shares."""

    def __post_init__(self) -> None:
        require_range("peers", self.peers, 1, 64)
        require_range("passes", self.passes, 1, 100)


PeersT = TypeVar("PeersT", bound=NearestPeersOptions)
"""Options that say how many peers there are."""


class NearestPeers(AlloyStrategy[PeersT]):
    """Local training; then every client is sent its nearest peers' adapters."""

    may_end_early = False
    asks_later: ClassVar[tuple[str, ...]] = ("attribute",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.uploads = Bank(self.storage)
        self.nearest: dict[str, list[str]] = {}
        self.arrived: set[str] = set()

    @property
    def learns_from(self) -> tuple[str, ...]:
        """Validation examples decide the shares."""
        return ("train", "validation")

    def needs_everyone(self, round_: int) -> bool:
        """Local rounds cost no bytes, and every peer's adapter is wanted."""
        return True

    def brief(self, round_: int, client: Client) -> Brief:
        """Train alone; upload in the last round."""
        mix = steps.mixture(LOCAL)
        plan = [
            steps.initialise(LOCAL, self.seed, keep_existing=round_ > 1),
            steps.evaluate(self.training, mix),
            steps.train(self.training, mix, [LOCAL]),
        ]
        if round_ >= self.rounds:  # if the number of rounds is not known, every round may be the last
            plan.append(steps.send(self.training, LOCAL, relative_to_received=False))
        return Brief(plan)

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep what was uploaded."""
        if LOCAL in answer.adapters:
            self.uploads[client.id] = answer.adapters[LOCAL]
            self.arrived.add(client.id)

    def settle(self, round_: int) -> dict[str, Any]:
        """Find each client's nearest peers, in the last round."""
        record = {"merged": len(self.arrived)}
        self.arrived = set()
        self._find_peers()
        return record

    def deliver(self, client: Client) -> Brief:
        """The client's own adapter beside its peers'."""
        peers = Made(
            {f"peer-{index}": partial(self._of, peer) for index, peer in enumerate(self.nearest.get(client.id, []))}
        )
        slots = [LOCAL, *peers]
        model = self.model(slots) if peers else steps.mixture(LOCAL)
        # A head that only the client knows is in all slots, whatever is received.
        plan = [steps.initialise(LOCAL, self.seed), *(steps.copy(slot, LOCAL) for slot in peers)]
        if peers:
            learn = steps.attribute(slots, SHARES, split="validation" if client.held_out else "train")
            plan += [*[learn] * self.options.passes, *self.learn(client, slots)]
        return Brief([*plan, steps.save(model), steps.evaluate(self.training, model)], peers)

    @abstractmethod
    def model(self, slots: list[str]) -> plan_pb2.Mixture:
        """The client's model, made of its own slot and its peers' slots."""

    def learn(self, client: Client, slots: list[str]) -> list[steps.Step]:
        """Steps between finding the shares and saving the model, if the strategy needs any."""
        return []

    def state(self) -> State:
        """The uploads; peers follow from them."""
        state = State({}, {"clients": list(self.uploads)})
        state.keep("upload", self.uploads)
        return state

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        layout = next(iter(self.clients.values())).layout
        self.uploads.clear()
        for name in state.values["clients"]:
            self.uploads.put_row(name, layout, state.row(f"upload/{name}"))
        self._find_peers()

    def _of(self, peer: str) -> Adapter:
        return self.uploads[peer]

    def _find_peers(self) -> None:
        self.nearest = {}
        names = sorted(self.uploads)
        if not names:
            return
        inner = gram([self.uploads[name] for name in names])
        for row, name in enumerate(names):
            cosine = {
                peer: float(inner[row, column] / (inner[row, row] * inner[column, column]).sqrt().clamp_min(1e-30))
                for column, peer in enumerate(names)
                if peer != name
            }
            self.nearest[name] = sorted(cosine, key=lambda peer: (-cosine[peer], peer))[: self.options.peers]
