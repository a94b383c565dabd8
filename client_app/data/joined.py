"""Several splits of one client as one, for controls that train on all examples that a strategy learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from client_app.data.dataset import MASK, Dataset, MixedDataset
from client_app.data.targets import IGNORED


@dataclass(frozen=True)
class JoinedDataset(Dataset):
    """The examples of several splits of one task, one split after another; read when a batch needs them.

    ``chosen`` are positions among all examples of ``parts``.
    """

    parts: tuple[Dataset, ...] = ()
    chosen: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def batch(self, indices: Tensor) -> Dataset:
        """See :meth:`Dataset.batch`; texts are padded to the longest of the batch."""
        wanted, start = self.chosen[indices], 0
        found, places = [], []
        for part in self.parts:
            here = ((wanted >= start) & (wanted < start + len(part))).nonzero().flatten()
            if len(here):
                found.append(part.batch(wanted[here] - start))
                places.append(here)
            start += len(part)
        order = torch.argsort(torch.cat(places))
        names = found[0].inputs
        inputs = {name: _stacked([batch.inputs[name] for batch in found], 0, MASK in names) for name in names}
        rows = {
            name: torch.cat([batch.rows.get(name, torch.ones(len(batch), dtype=torch.long)) for batch in found])
            for name in dict.fromkeys(name for batch in found for name in batch.rows)
        }
        labels = _stacked([batch.labels for batch in found], IGNORED)
        return Dataset(inputs, labels, self.kind, self.task, rows=rows).batch(order)

    def subset(self, indices: Tensor) -> JoinedDataset:
        """See :meth:`Dataset.subset`; nothing is read yet."""
        return replace(self, labels=self.labels[indices], chosen=self.chosen[indices])


def join(splits: Sequence[Dataset]) -> Dataset:
    """The splits' examples as one split; task by task if the client has several tasks."""
    found = [split for split in splits if len(split)] or list(splits[:1])
    if any(isinstance(split, MixedDataset) for split in found):
        mixed = [split for split in found if isinstance(split, MixedDataset)]
        names = dict.fromkeys(name for split in mixed for name in split.parts)
        return MixedDataset.of({n: join([split.parts[n] for split in mixed if n in split.parts]) for n in names})
    labels = _stacked([split.labels for split in found], IGNORED)
    return JoinedDataset({}, labels, found[0].kind, found[0].task, tuple(found), torch.arange(len(labels)))


def _stacked(tensors: Sequence[Tensor], filling: int, is_text: bool = True) -> Tensor:
    """One after another; rows of tokens, and lists of them, are padded on the right to the longest."""
    if is_text and all(tensor.dim() == 2 for tensor in tensors):
        width = max(tensor.shape[1] for tensor in tensors)
        tensors = [functional.pad(tensor, (0, width - tensor.shape[1]), value=filling) for tensor in tensors]
    elif len({tensor.shape[1:] for tensor in tensors}) > 1 and not any(t.is_floating_point() for t in tensors):
        shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        tensors = [
            functional.pad(
                tensor,
                [n for axis in range(len(shape), 0, -1) for n in (0, shape[axis - 1] - tensor.shape[axis])],
                value=filling,
            )
            for tensor in tensors
        ]
    return torch.cat(list(tensors))
