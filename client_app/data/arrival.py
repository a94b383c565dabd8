"""Training data that arrives over the rounds, and the replay memory that batches are then drawn from.

FedMosaic's two settings (its reference code; specification section 5.1): ``static``, where every round brings an equal
share of all of a client's data, and ``dynamic``, where tasks come one after another, each over its own rounds. Which
examples are one task, is said by a column of the client's data or by its task file. A client with one classification
task has groups of classes instead. Examples stay once they have arrived: batches are drawn from all of them, and new or
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

from client_app.data.dataset import ClientData, Dataset, MixedDataset
from client_app.settings import SettingsError

GROUPS = 4
"""Number of groups of classes in a client's data; fewer if it has fewer classes."""
SHARPNESS, FADING = 0.125, 0.99
"""An example that was drawn c times has a weight of exp(-c / SHARPNESS); counts fade by this factor at each draw."""


@dataclass(frozen=True)
class StreamedDataset(Dataset):
    """A split whose examples arrive over time: those of ``whole``; ``arrivals [n]`` is the round of each, from 1."""

    arrivals: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    whole: Dataset = field(default_factory=lambda: Dataset({}, torch.empty(0, dtype=torch.long)))

    @staticmethod
    def over(whole: Dataset, arrivals: Tensor) -> StreamedDataset:
        """The examples of a split, of one task or of several, with their arrivals."""
        if isinstance(whole, MixedDataset):
            return StreamedMixture(
                whole.inputs, whole.labels, whole.kind, whole.task, parts=whole.parts, arrivals=arrivals, whole=whole
            )
        return StreamedDataset(
            whole.inputs, whole.labels, whole.kind, whole.task, arrivals=arrivals, whole=whole, rows=whole.rows
        )

    def batch(self, indices: Tensor) -> Dataset:
        """See :meth:`Dataset.batch`."""
        return self.whole.batch(indices)

    def by_task(self, indices: Tensor) -> list[Dataset]:
        """See :meth:`Dataset.by_task`."""
        return self.whole.by_task(indices)

    def subset(self, indices: Tensor) -> StreamedDataset:
        """See :meth:`Dataset.subset`."""
        part = self.whole.subset(indices)
        if isinstance(self.whole, MixedDataset):  # which puts the tasks one after another
            indices = indices[torch.argsort(self.labels[indices], stable=True)]
        return StreamedDataset.over(part, self.arrivals[indices])

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


@dataclass(frozen=True)
class StreamedMixture(StreamedDataset, MixedDataset):
    """A :class:`StreamedDataset` over several tasks."""


def streamed(data: ClientData, arrival: str, rounds: int, seed: int) -> ClientData:
    """The client's data with a training split that arrives over the rounds.

    Args:
        data: of one task or of several.
        arrival: ``static`` or ``dynamic``.
        rounds: of the run.
        seed: decides the order of examples, and of groups that have none.

    Raises:
        SettingsError: nothing says what comes after what: there are neither several tasks, a column, nor classes.
    """
    train = data.splits["train"]
    if arrival == "static":
        found = arrivals_static(np.arange(len(train)), rounds, seed)
    else:
        found = arrivals_of(_groups_in(data, seed), rounds, seed)
    whole = StreamedDataset.over(train, torch.from_numpy(found))
    return replace(data, splits={**data.splits, "train": whole})


def _groups_in(data: ClientData, seed: int) -> NDArray[np.int64]:
    """The group of each training example, from 0, in the order in which they come."""
    train = data.splits["train"]
    if data.streams is not None:
        return data.streams.numpy()
    if isinstance(train, MixedDataset):
        return class_groups(train.labels.numpy(), seed, len(train.parts))
    if train.labels.dim() == 1 and not train.labels.is_floating_point():
        return class_groups(train.labels.numpy(), seed)
    raise SettingsError(
        f"task-arrival = 'dynamic' lets tasks come one after another; this client's data ({data.task}, {data.kind}) "
        "have neither classes nor several tasks: name the column that says each example's task (task-column)"
    )


def arrivals_static(labels: NDArray[np.int64], rounds: int, seed: int) -> NDArray[np.int64]:
    """The round of each example: all are shuffled and cut into chunks whose sizes differ by at most one."""
    found = np.empty(len(labels), dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    for number, chunk in enumerate(np.array_split(order, rounds), start=1):
        found[chunk] = number
    return found


def arrivals_dynamic(labels: NDArray[np.int64], rounds: int, seed: int) -> NDArray[np.int64]:
    """The round of each example of one task: see :func:`class_groups` and :func:`arrivals_of`."""
    return arrivals_of(class_groups(labels, seed), rounds, seed)


def arrivals_of(groups: NDArray[np.int64], rounds: int, seed: int) -> NDArray[np.int64]:
    """The round of each example: groups (from 0) in turn, each shuffled and over an equal part of the rounds.

    With R = ``rounds`` / groups, a round brings 1 / R of a group; if R is not a whole number, some rounds bring the end
    of one group and the beginning of the next.
    """
    chance = np.random.default_rng(seed)
    found = np.empty(len(groups), dtype=np.int64)
    count = int(groups.max()) + 1
    for group in range(count):
        order = chance.permutation(np.flatnonzero(groups == group))
        # In whole numbers: 0.1 * 30 is more than 3 in floating point.
        found[order] = (group * len(order) + np.arange(len(order))) * rounds // (count * len(order)) + 1
    return found


def class_groups(labels: NDArray[np.int64], seed: int, most: int = GROUPS) -> NDArray[np.int64]:
    """The group of each example, from 0: classes in random order, divided into at most ``most`` groups."""
    classes = np.random.default_rng((GROUPS, seed)).permutation(np.unique(labels))
    found = np.empty(len(labels), dtype=np.int64)
    for number, group in enumerate(np.array_split(classes, min(most, len(classes)))):
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
