"""Strategies that give every client its own combination of all clients' adapters.

The server keeps each client's last upload; :meth:`Peers.weigh` says how much each counts for each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedalloy_adapters.bank.store import Bank, Made
from strategies.framework import AlloyStrategy, Answer, Brief, Client, OptionsT, State, round_record, steps

LOCAL = "local"
MOST_RECORDED = 64
"""Clients of the largest matrix that goes into a round's record: nobody can look at a larger one, and the squares of
thousands of clients would fill the server's memory and the run's folder."""


class PeerWeights(Mapping[str, dict[str, float]]):
    """By client, each client's weight for it.

    Args:
        names: of N clients.
        matrix: ``[N, N]``; a row has the weights for its client.
    """

    def __init__(self, names: Sequence[str], matrix: Tensor) -> None:
        self.names, self.matrix = list(names), matrix
        self._rows = {name: number for number, name in enumerate(self.names)}

    def __getitem__(self, name: str) -> dict[str, float]:
        return dict(zip(self.names, self.matrix[self._rows[name]].tolist(), strict=True))

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def used(self, name: str) -> dict[str, float]:
        """The row without what is zero; empty for a client that has none."""
        return {peer: weight for peer, weight in self[name].items() if weight} if name in self else {}

    def recorded(self, digits: int) -> dict[str, list[float]]:
        """Rounded rows for a round's record; empty for more than :data:`MOST_RECORDED` clients."""
        if len(self) > MOST_RECORDED:
            return {}
        rows = self.matrix.tolist()
        return {name: [round(weight, digits) for weight in row] for name, row in zip(self.names, rows, strict=True)}


class Peers(AlloyStrategy[OptionsT]):
    """The clients' last uploads, and a row of weights for each client; sums are taken in factor space."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.uploads = Bank(self.storage)
        self.weights = PeerWeights([], torch.zeros(0, 0))
        self.arrived = 0
        self._known: Bank | None = None

    @abstractmethod
    def weigh(self, names: list[str]) -> Tensor:
        """Weights ``[N, N]``: how much the upload of the column's client counts for the row's."""

    def brief(self, round_: int, client: Client) -> Brief:
        """Install the client's combination, evaluate and train it, send the result."""
        mix = steps.mixture(LOCAL)
        train = steps.train(self.training, mix, [LOCAL])
        models = self.combined(LOCAL, client)
        send = steps.send(self.training, LOCAL, relative_to_received=models is not None, comes_back=True)
        return Brief([*self.begin(), steps.evaluate(self.training, mix), train, send], models or {})

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the upload until the next one comes."""
        self.uploads[client.id] = answer.adapters[LOCAL]
        self.arrived += 1

    def settle(self, round_: int) -> dict[str, Any]:
        """Weigh all whose adapters are known; the matrix of few clients goes to the round's record."""
        record: dict[str, Any] = {round_record.MERGED: self.arrived}
        self.arrived = 0
        self._known = None
        self._weigh()
        rows = self.weights.recorded(6)
        return record | ({round_record.RELATIONS: rows} if rows else {})

    def combined(self, slot: str, client: Client) -> Made | None:
        """The client's combination for this slot; None for a client without weights, or with only zeros."""
        row = self.weights.used(client.id)
        if not row:
            return None
        weights = torch.tensor([list(row.values())], dtype=torch.float64)
        known = self.known
        return Made({slot: lambda: known.combine(list(row), weights)[0]})

    def examples(self, names: list[str]) -> Tensor:
        """The clients' example counts ``[N]``; 1 for a client that has not rejoined after a resume."""
        counts = [self.clients[name].examples if name in self.clients else 1 for name in names]
        return torch.tensor(counts, dtype=torch.float64)

    @property
    def known(self) -> Bank:
        """Uploads as they were when the round began; later arrivals change no client's combination."""
        if self._known is None:
            self._known = self.uploads.snapshot()
        return self._known

    def begin(self) -> list[steps.Step]:
        """The client's own adapter, from the common start."""
        return [steps.initialise(LOCAL, self.seed)]

    def send(self) -> steps.Step:
        """Upload the client's own adapter; the server does not send it back."""
        return steps.send(self.training, LOCAL, relative_to_received=False)

    def deliver(self, client: Client) -> Brief:
        """The client's own adapter, as it holds it."""
        mix = steps.mixture(LOCAL)
        return Brief([*self.begin(), steps.save(mix), steps.evaluate(self.training, mix)])

    def state(self) -> State:
        """Last uploads; weights follow from them."""
        state = State({}, {"clients": list(self.uploads)})
        state.keep("upload", self.uploads)
        return state

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        layout = next(iter(self.clients.values())).layout  # all share it, also clients that are not back yet
        self.uploads.clear()
        for name in state.values["clients"]:
            self.uploads.put_row(name, layout, state.row(f"upload/{name}"))
        self._known = None
        self._weigh()

    def _weigh(self) -> None:
        names = list(self.uploads)
        self.weights = PeerWeights(names, self.weigh(names) if names else torch.zeros(0, 0))
