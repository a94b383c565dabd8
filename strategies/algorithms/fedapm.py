r"""FedAPM: one part of the adapter is shared by consensus (ADMM), the other belongs to the client.

Zhu, Nie, Zeng, Wang, Sun, Yao, Chen, Xu, Yang, "FedAPM: Federated Learning via ADMM with Partial Model
Personalization", 2025 (arXiv 2506.04672). With its own part :math:`v_i`, a copy :math:`u_i` of the shared part u and a
multiplier :math:`\pi_i` for :math:`u_i = u`, client i minimises in turn over :math:`v_i` and :math:`u_i`

.. math:: f_i(v_i, u_i) + \langle \pi_i, u_i - u \rangle + \frac{\rho}{2} \|u_i - u\|^2,

then :math:`\pi_i \leftarrow \pi_i + \rho (u_i - u)`, and the server :math:`u = \sum_i p_i (u_i + \pi_i / \rho)`. Here
the dual is scaled, :math:`d_i = \pi_i / \rho`: the two terms are a pull towards :math:`u - d_i` with strength rho. The
dual stays at the client, which sends :math:`u_i + d_i`. In every round :math:`u_i` starts from u (in the paper from
itself), so a client that was away for long does not start far off. ``local-steps`` are divided as in FedRep. With AdamW
the pull counts relative to the loss, as in Ditto. A dual of zero and ``rho = 0`` give FedRep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from strategies.families.fedavg import SLOT
from strategies.families.own_part import OwnPart, OwnPartOptions
from strategies.framework import About, Answer, Brief, Client, State, steps
from strategies.framework.options import require_range

DUAL, CENTRE, RECEIVED, SENT = "dual", "centre", "received", "sent"


@dataclass(frozen=True)
class FedAPMOptions(OwnPartOptions):
    """Which part is the client's own, and how strongly the shared part is held together."""

    rho: float = 0.1
    """Strength of the pull towards the server's shared part minus the client's dual."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("rho", self.rho, 0)


class FedAPM(OwnPart[FedAPMOptions]):
    """A consensus on the representation."""

    name = "fedapm"
    about = About(
        "a representation by consensus (ADMM), its own head (or other modules)",
        trains="head, then the rest",
        travels="the rest up, the rest down",
        when="labels differ and clients drift apart in long rounds; keeps a dual on the client's disk",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.duals: set[str] = set()  # clients that hold a dual

    def brief(self, round_: int, client: Client) -> Brief:
        """FedRep's round, pulled to the centre; then the dual grows by the client's distance from what it received."""
        own, shared = self.divided_steps(client)
        dual = [] if client.id in self.duals else [_sum(DUAL, {SLOT: 0.0})]
        plan = [
            *self.prepare(round_, client),
            steps.evaluate(self.training, self.personal(client)),
            *dual,
            _sum(RECEIVED, {SLOT: 1.0}),
            _sum(CENTRE, {SLOT: 1.0, DUAL: -1.0}),
            *self.train_own(client, own),
            *self.train_shared(client, shared, (CENTRE, self.options.rho)),
            _sum(DUAL, {DUAL: 1.0, SLOT: 1.0, RECEIVED: -1.0}),
            _sum(SENT, {SLOT: 1.0, DUAL: 1.0}),
            steps.send(
                self.training,
                SENT,
                modules=self.shared(round_, client).modules,
                relative_to_received=False,
                comes_back=True,
            ),
        ]
        return Brief(plan, self.received(client))

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the upload: the sum of the shared part and the dual."""
        self.duals.add(client.id)
        super().absorb(round_, client, replace(answer, adapters={SLOT: answer.adapters[SENT]}))

    def state(self) -> State:
        """The global adapter, and which clients hold a dual."""
        found = super().state()
        return State(found.tensors, found.values | {"duals": sorted(self.duals)})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        super().load_state(state)
        self.duals = set(state.values["duals"])


def _sum(target: str, terms: dict[str, float]) -> steps.Step:
    """A step that sets ``target`` to this sum of slots, in factor space."""
    return steps.merge(target, steps.mixture(*terms, coefficients=list(terms.values())), space="factor")
