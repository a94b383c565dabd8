"""Training data that arrives over the rounds, and the replay memory that batches are then drawn from.

FedMosaic's two settings (its reference code; specification section 5.1): ``static``, where every round brings an equal
share of all of a client's data, and ``dynamic``, where its groups of classes (FedMosaic's tasks) come one after
another, each over its own rounds. Examples stay once they have arrived: batches are drawn from all of them, and new or
rarely drawn examples come first. Nothing is stored between rounds: the examples in round k, and the draws of all
earlier rounds, follow from k and the seed. So a resumed run sees the same examples as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client_app.data.dataset import ClientData, Dataset
from client_app.settings import SettingsError

GROUPS = 4
"""Number of groups of classes in a client's data; fewer if it has fewer classes."""
SHARPNESS, FADING = 0.125, 0.99
"""An example that was drawn c times has a weight of exp(-c / SHARPNESS); counts fade by this factor at each draw."""


@dataclass(frozen=True)
class StreamedDataset(Dataset):
    """A split whose examples arrive over time: ``arrivals [n]`` is the round of each, from 1."""

    arrivals: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def subset(self, indices: Tensor) -> StreamedDataset:
        """See :meth:`Dataset.subset`."""
        part = Dataset.subset(self, indices)
        return StreamedDataset(part.inputs, part.labels, part.kind, part.task, self.arrivals[indices])

    def until(self, round_: int) -> StreamedDataset:
        """The examples that have arrived by this round."""
        return self.subset((self.arrivals <= round_).nonzero().flatten())

    def batches(self, batch_size: int, steps: int, round_: int, seed_of_round: Callable[[int], int]) -> list[Tensor]:
        """Indices ``[batch_size]`` of the ``steps`` batches of a round, drawn from the memory.

        The round's examples arrive one by one; after every n / steps of them a batch is drawn without replacement (with
        replacement while fewer than ``batch_size`` have arrived). Earlier rounds are replayed first, with the same
        number of steps, because their draws count.

        Args:
            batch_size: examples in every batch.
            steps: batches in every round.
            round_: the round, from 1.
            seed_of_round: gives the seed of a round's draws.
        """
        arrivals = self.arrivals.numpy()
        counts, here = np.zeros(len(arrivals)), np.zeros(len(arrivals), dtype=bool)
        drawn: list[Tensor] = []
        for number in range(1, max(round_, 1) + 1):
            chance = np.random.default_rng(seed_of_round(number))
            new = np.flatnonzero(arrivals == number)
            drawn = []
            for step in range(1, steps + 1):
                here[new[: -(-step * len(new) // steps)]] = True
                chosen = _draw(np.flatnonzero(here), counts, batch_size, chance)
                drawn.append(torch.from_numpy(chosen))
        return drawn


def streamed(data: ClientData, arrival: str, rounds: int, seed: int) -> ClientData:
    """The client's data with a training split that arrives over the rounds.

    Args:
        data: has one task, whose examples have classes.
        arrival: ``static`` or ``dynamic``.
        rounds: number of rounds of the run.
        seed: decides the order of groups and examples.

    Raises:
        SettingsError: there are several tasks already, or no classes.
    """
    train = data.splits["train"]
    if type(train) is not Dataset or train.labels.dim() != 1:
        raise SettingsError(
            f"task-arrival = {arrival!r} divides one classification task by its classes; this client's data "
            f"({data.task}, {data.kind}) cannot be divided that way"
        )
    find = arrivals_dynamic if arrival == "dynamic" else arrivals_static
    arrivals = torch.from_numpy(find(train.labels.numpy(), rounds, seed))
    whole = StreamedDataset(train.inputs, train.labels, train.kind, train.task, arrivals)
    return replace(data, splits={**data.splits, "train": whole})


def arrivals_static(labels: NDArray[np.int64], rounds: int, seed: int) -> NDArray[np.int64]:
    """The round of each example: all are shuffled and cut into chunks whose sizes differ by at most one."""
    found = np.empty(len(labels), dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    for number, chunk in enumerate(np.array_split(order, rounds), start=1):
        found[chunk] = number
    return found


def arrivals_dynamic(labels: NDArray[np.int64], rounds: int, seed: int) -> NDArray[np.int64]:
    """The round of each example: the groups take turns; each is shuffled and spread over an equal part of the rounds.

    With R = ``rounds`` / groups, a round brings 1 / R of a group; if R is not a whole number, some rounds bring the end
    of one group and the beginning of the next.
    """
    chance = np.random.default_rng(seed)
    found = np.empty(len(labels), dtype=np.int64)
    groups = class_groups(labels, seed)
    count = int(groups.max()) + 1
    for group in range(count):
        order = chance.permutation(np.flatnonzero(groups == group))
        # In whole numbers: 0.1 * 30 is more than 3 in floating point.
        found[order] = (group * len(order) + np.arange(len(order))) * rounds // (count * len(order)) + 1
    return found


def class_groups(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The group of each example, from 0: classes in random order, divided into at most :data:`GROUPS` groups."""
    classes = np.random.default_rng((GROUPS, seed)).permutation(np.unique(labels))
    found = np.empty(len(labels), dtype=np.int64)
    for number, group in enumerate(np.array_split(classes, min(GROUPS, len(classes)))):
        found[np.isin(labels, group)] = number
    return found


def _draw(
    memory: NDArray[np.int64], counts: NDArray[np.float64], size: int, chance: np.random.Generator
) -> NDArray[np.int64]:
    """Draw a batch by its examples' log weights; changes ``counts``. Adding Gumbel noise draws without replacement."""
    counts *= FADING
    weights = -counts[memory] / SHARPNESS
    if len(memory) >= size:
        noisy = weights + chance.gumbel(size=len(memory))
        chosen = memory[np.argsort(-noisy, kind="stable")[:size]]
    else:
        shares = np.exp(weights - weights.max())
        chosen = chance.choice(memory, size=size, p=shares / shares.sum())
    np.add.at(counts, chosen, 1.0)
    return chosen
