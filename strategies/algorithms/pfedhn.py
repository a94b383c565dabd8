r"""pFedHN: a hypernetwork at the server makes every client's adapter from the client's embedding.

Shamsian, Navon, Fetaya, Chechik, "Personalized Federated Learning using Hypernetworks", ICML 2021. Client k is sent
:math:`\theta_k = \theta^0 + H z(v_k)`: an embedding :math:`v_k`, a body z (one hidden layer, its output of length one),
and a linear head H for each tensor. It trains to :math:`\theta_k + \Delta_k`, and the server follows the gradient of
:math:`-\sum_k \langle \theta_k, \Delta_k \rangle` with the sent :math:`\Delta_k` held fixed: heads by a step of
``rate`` over the largest eigenvalue of the round's Gram matrix of z (at 1, clients with the same z go to the mean of
their :math:`\Delta`, and clients with orthogonal z go the whole way), each embedding and the body by ``body-rate``
along its gradient. Heads start at zero, so all clients start from the common :math:`\theta^0`. (The paper uses SGD for
all of these, one client at a time.)

A tensor's head belongs to its base model, name and shape: clients of different ranks or layouts share body, embeddings
and the heads that they have in common. A client that joins later starts from the mean embedding. Its first answer moves
only its embedding; the heads and the body, which fit the other clients, stay fixed for that step. Server memory: (1 +
``hidden``) adapters.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank, Made
from fedalloy_adapters.layout import Entry, Layout
from strategies.framework import About, AlloyStrategy, Answer, Brief, Client, State, steps
from strategies.framework.options import require_range

SLOT = "personal"


@dataclass(frozen=True)
class PFedHNOptions:
    """The hypernetwork, and how fast it learns."""

    embedding: int = 8
    """Numbers in a client's embedding."""
    hidden: int = 16
    """Width of the hypernetwork's body; the server holds one adapter per unit."""
    rate: float = 1.0
    """How far the heads follow the clients' training: 1 goes the whole way for clients that have nothing in common."""
    body_rate: float = 0.1
    """Step length of embeddings and body in a round."""

    def __post_init__(self) -> None:
        require_range("embedding", self.embedding, 1, 4096)
        require_range("hidden", self.hidden, 1, 4096)
        require_range("rate", self.rate, 0, 2)
        require_range("body-rate", self.body_rate, 0, 1)


class PFedHN(AlloyStrategy[PFedHNOptions]):
    """An adapter for each client from one network."""

    name = "pfedhn"
    about = About(
        "an adapter that a network at the server makes from its embedding",
        when="there are many clients, and later new ones, which only fit an embedding",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.body = self._drawn("body", self.options.hidden * self.options.embedding).view(self.options.hidden, -1)
        self.embeddings: dict[str, Tensor] = {}
        self.heads: dict[str, Tensor] = {}  # [numbers, hidden], by base model, name and shape
        self.known: set[str] = set()  # clients that have answered
        self.arrived = Bank(self.storage)

    def compatible(self, first: Layout, second: Layout) -> bool:
        """Always: tensors that two clients do not share have separate heads."""
        return True

    def enrol(self, client: Client) -> None:
        """Give the client an embedding: a random one at the start, later the mean of the known ones."""
        super().enrol(client)
        for entry in client.layout.entries:
            self.heads.setdefault(_key(client.layout, entry), torch.zeros(entry.size, self.options.hidden))
        known = [self.embeddings[name] for name in sorted(self.known)]
        start = torch.stack(known).mean(dim=0) if known else self._drawn(client.id, self.options.embedding)
        self.embeddings.setdefault(client.id, start)

    def brief(self, round_: int, client: Client) -> Brief:
        """Install the client's adapter, evaluate, train, send."""
        mix = steps.mixture(SLOT)
        plan = [steps.evaluate(self.training, mix), steps.train(self.training, mix, [SLOT])]
        return Brief([*plan, steps.send(self.training, SLOT)], self._made(client))

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the displacement of the client's training."""
        moved = answer.adapters[SLOT].vector - answer.received[SLOT].vector
        self.arrived[client.id] = Adapter(client.layout, moved)

    def settle(self, round_: int) -> dict[str, Any]:
        """Make one step of heads, body and embeddings; a newcomer moves only its embedding."""
        arrived = self.arrived.taken()
        names = sorted(arrived)
        old = [name for name in names if name in self.known or not self.known]
        body, vectors = (
            self.body.clone().requires_grad_(),
            {n: self.embeddings[n].clone().requires_grad_() for n in names},
        )
        features = {name: _features(body, vectors[name]) for name in names}
        gain = sum((features[name] @ self._inward(arrived[name]) for name in names), torch.zeros(()))
        if names:
            found = torch.autograd.grad(gain, [*vectors.values(), body])
            for name, gradient in zip(names, found[:-1], strict=True):
                self.embeddings[name] = self.embeddings[name] + self._step(gradient)
        if old:
            self._move_heads({name: (arrived[name], features[name].detach()) for name in old})
            self.body = self.body + self._step(found[-1])
        self.known |= set(names)
        return {"merged": len(names)}

    def deliver(self, client: Client) -> Brief:
        """The adapter that the network makes now."""
        mix = steps.mixture(SLOT)
        return Brief([steps.save(mix), steps.evaluate(self.training, mix)], self._made(client))

    def state(self) -> State:
        """The network and the embeddings."""
        groups = {"head": self.heads, "embedding": self.embeddings, "network": {"body": self.body}}
        found = {f"{group}/{name}": t.flatten() for group, tensors in groups.items() for name, t in tensors.items()}
        return State(found, {"known": sorted(self.known)})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        self.known = set(state.values["known"])
        for name, numbers in state.tensors.items():
            group, _, rest = name.partition("/")
            if group == "head":
                self.heads[rest] = numbers.view(-1, self.options.hidden).clone()
            elif group == "embedding":
                self.embeddings[rest] = numbers.clone()
            else:
                self.body = numbers.view(self.options.hidden, -1).clone()

    def _move_heads(self, moves: dict[str, tuple[Adapter, Tensor]]) -> None:
        stacked = torch.stack([feature for _, feature in moves.values()])
        rate = self.options.rate / float(torch.linalg.matrix_norm(stacked @ stacked.T, 2))
        for moved, feature in moves.values():
            for entry, tensor in moved.items():
                self.heads[_key(moved.layout, entry)].addr_(tensor.flatten(), feature, alpha=rate)

    def _inward(self, moved: Adapter) -> Tensor:
        """``H^T Delta``, ``[hidden]``: the direction in z of what the client has trained."""
        parts = (self.heads[_key(moved.layout, entry)].T @ tensor.flatten() for entry, tensor in moved.items())
        return sum(parts, torch.zeros(self.options.hidden))

    def _made(self, client: Client) -> Made:
        def make() -> Adapter:
            found, feature = Adapter.initial(client.layout, self.seed), _features(self.body, self.embeddings[client.id])
            for entry, tensor in found.items():
                tensor.add_((self.heads[_key(client.layout, entry)] @ feature).view(entry.shape))
            return found

        return Made({SLOT: make})

    def _step(self, gradient: Tensor) -> Tensor:
        return self.options.body_rate * normalize(gradient.flatten(), dim=0).view(gradient.shape)

    def _drawn(self, name: str, size: int) -> Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return torch.randn(size, generator=draw)


def _features(body: Tensor, embedding: Tensor) -> Tensor:
    """z ``[hidden]``, of length one."""
    return normalize(torch.tanh(body @ embedding), dim=0)


def _key(layout: Layout, entry: Entry) -> str:
    return f"{layout.base_fingerprint}:{entry.name}:{'x'.join(map(str, entry.shape))}"
