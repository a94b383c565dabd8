"""Weights of clients for one another: a matrix, read by names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

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

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def used(self, name: str) -> dict[str, float]:
        """The row without what is zero; empty for a client that has none."""
        return {peer: weight for peer, weight in self[name].items() if weight} if name in self._rows else {}

    def recorded(self, digits: int) -> dict[str, list[float]]:
        """Rounded rows for a round's record; empty for more than :data:`MOST_RECORDED` clients."""
        if len(self) > MOST_RECORDED:
            return {}
        rows = self.matrix.tolist()
        return {name: [round(weight, digits) for weight in row] for name, row in zip(self.names, rows, strict=True)}
