"""What a client trains on: tensors per split, the task they belong to, and the base model that goes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

MASK = "attention_mask"
MIXED = "several tasks"
"""The kind of a split that mixes tasks of several kinds."""


def mean_of_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """The mean ``[b, d]`` of ``values [b, L, d]`` over the tokens in ``mask [b, L]``; 0 where there is none."""
    there = mask[..., None].to(values)
    return (values * there).sum(dim=1) / there.sum(dim=1).clamp_min(1)


@dataclass(frozen=True)
class Dataset:
    """One split in memory: model inputs by argument name, each ``[n, ...]``, and labels.

    Labels are integers ``[n]``, or ``[n, L]`` if every token has one (-100: not a target). Other kinds of tasks have
    numbers ``[n]`` or ``[n, C]``, or spans ``[n, A, 2]``. ``kind`` decides the loss and the metrics; see
    :mod:`client_app.kinds`. Texts are padded on the right to the longest of the split; inputs with the length of
    ``attention_mask`` belong to tokens. ``task`` names one of several tasks of a client. ``rows [n]`` says how many
    rows of an input each example has, if that is not always one: patches of images in one long list (Qwen-VL), several
    images.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    kind: str = "image-classification"
    task: str = ""
    rows: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Dataset:
        """The examples at ``indices`` ``[b]``, in that order; texts are padded to the longest of the batch only."""
        inputs = {
            name: _rows_at(tensor, self.rows[name], indices) if name in self.rows else tensor[indices]
            for name, tensor in self.inputs.items()
        }
        rows = {name: counts[indices] for name, counts in self.rows.items()}
        return Dataset(inputs, self.labels[indices], self.kind, self.task, rows=rows).trimmed()

    @property
    def lengths(self) -> Tensor | None:
        """Token count of each example ``[n]``; None if examples have no tokens, or several texts."""
        return self.inputs[MASK].sum(dim=1) if MASK in self.inputs else None

    def by_task(self, indices: Tensor) -> list[Dataset]:
        """The examples at ``indices`` in batches of one task each: here, one batch."""
        return [self.batch(indices)]

    def sample(self) -> Dataset:
        """Enough examples in memory to check a model with; here, all of them."""
        return self

    def subset(self, indices: Tensor) -> Dataset:
        """A split with the examples at ``indices`` only."""
        return self.batch(indices)

    def trimmed(self) -> Dataset:
        """The same split without the columns that are padding in every example."""
        if MASK not in self.inputs or not len(self):
            return self
        width = self.inputs[MASK].shape[1]
        used = max(1, int(self.inputs[MASK].sum(dim=1).max()))
        if used == width:
            return self

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:, :used] if tensor.dim() == 2 and tensor.shape[1] == width else tensor

        inputs = {name: tensor if name in self.rows else cut(tensor) for name, tensor in self.inputs.items()}
        labels = self.labels if self.labels.is_floating_point() else cut(self.labels)  # numbers, not tokens
        return Dataset(inputs, labels, self.kind, self.task, rows=self.rows)


def _rows_at(tensor: Tensor, counts: Tensor, indices: Tensor) -> Tensor:
    """The rows of the examples at ``indices``; example i has ``counts[i]`` rows, and examples follow one another."""
    ends = counts.cumsum(dim=0)
    spans = [torch.arange(int(ends[i] - counts[i]), int(ends[i])) for i in indices.tolist()]
    return tensor[torch.cat(spans)] if spans else tensor[:0]


@dataclass(frozen=True)
class Read:
    """Inputs that were read for some examples, and the ``rows`` of :class:`Dataset` that go with them."""

    inputs: Mapping[str, Tensor]
    rows: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LazyDataset(Dataset):
    """A split whose large inputs (images) are read when a batch needs them.

    ``read`` gives those inputs for a list of positions; ``inputs`` holds the small ones.
    """

    read: Callable[[Sequence[int]], Read] = lambda positions: Read({})

    def batch(self, indices: Tensor) -> Dataset:
        """See :meth:`Dataset.batch`."""
        small = Dataset.batch(self, indices)
        large = self.read(indices.tolist())
        return replace(small, inputs={**large.inputs, **small.inputs}, rows=large.rows)

    def subset(self, indices: Tensor) -> Dataset:
        """See :meth:`Dataset.subset`; nothing is read yet."""
        small, chosen = Dataset.batch(self, indices), indices.tolist()
        return LazyDataset(
            small.inputs,
            small.labels,
            self.kind,
            self.task,
            lambda positions: self.read([chosen[i] for i in positions]),
        )


@dataclass(frozen=True)
class MixedDataset(Dataset):
    """One split of a client with several tasks: the tasks' examples one after the other, ordered by task name.

    A batch has examples of one task only; :meth:`by_task` takes a mixed choice apart. ``labels`` are the numbers of the
    tasks.
    """

    parts: Mapping[str, Dataset] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Mapping[str, Dataset]) -> MixedDataset:
        """The split with these tasks' examples."""
        numbers = [torch.full((len(part),), number) for number, part in enumerate(parts.values())]
        return cls({}, torch.cat(numbers), MIXED, "", {name: replace(part, task=name) for name, part in parts.items()})

    def batch(self, indices: Tensor) -> Dataset:
        """See :meth:`Dataset.batch`.

        Raises:
            ValueError: the examples are of several tasks.
        """
        (found,) = self.by_task(indices)
        return found

    def by_task(self, indices: Tensor) -> list[Dataset]:
        """See :meth:`Dataset.by_task`; tasks in their own order, examples in that of ``indices``."""
        return [part.batch(chosen) for part, chosen in self._chosen(indices) if len(chosen)]

    def subset(self, indices: Tensor) -> Dataset:
        """See :meth:`Dataset.subset`; a task may be left with no example."""
        chosen = self._chosen(indices)
        return MixedDataset.of({part.task: part.subset(own) for part, own in chosen})

    def _chosen(self, indices: Tensor) -> list[tuple[Dataset, Tensor]]:
        tasks, found, start = self.labels[indices], [], 0
        for number, part in enumerate(self.parts.values()):
            found.append((part, indices[tasks == number] - start))
            start += len(part)
        return found


@dataclass(frozen=True)
class ClientData:
    """A client's task and its splits; ``"train"``, ``"validation"`` and ``"test"`` are disjoint.

    ``metrics`` names the metrics to compute beside loss and accuracy. Where texts are generated, ``decode`` turns token
    ids into text, and at most ``generate_examples`` texts of ``max_new_tokens`` tokens are written in an evaluation.
    ``choices`` are the first tokens of the possible answers, if these are a fixed set; the likeliest of them counts as
    the model's answer. ``notes`` are findings about the data that contain none of it, for the server's log.
    ``for_reference`` has the splits as the reference model reads them, if it has its own tokenizer or processor.

    ``labels`` are the names of its classes in order. ``shared_labels`` are the same if the run names them; only those
    may leave the client. ``label_weights [C]`` is how much each counts in training; None: all the same. ``streams [n]``
    numbers, from 0, the task that each training example is of, where its row says so; they may come one after another.

    ``modalities`` are what the model reads and writes, ``groups`` the parameter groups
    (:mod:`fedalloy_adapters.groups`) that the task's forward pass touches; none: the adapter has no groups. A client
    with several tasks has each of them in ``tasks``, by name, and splits that mix them.
    """

    task: str
    kind: str
    splits: Mapping[str, Dataset]
    metrics: tuple[str, ...] = ()
    decode: Callable[[Tensor], str] | None = None
    generate_examples: int = 0
    max_new_tokens: int = 64
    choices: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    for_reference: Mapping[str, Dataset] = field(default_factory=dict)
    modalities: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    tasks: Mapping[str, ClientData] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    shared_labels: tuple[str, ...] = ()
    label_weights: Tensor | None = None
    streams: Tensor | None = None

    @classmethod
    def of_tasks(cls, tasks: Sequence[ClientData]) -> ClientData:
        """The data of a client with several tasks; each of its splits joins those of the tasks that have it.

        Raises:
            ValueError: two tasks have the same name, or there is no task.
        """
        by_name = {data.task: data for data in tasks}
        if not by_name or len(by_name) != len(tasks):
            raise ValueError(f"tasks {[data.task for data in tasks]}, expected at least one, and names that differ")
        names = dict.fromkeys(name for data in tasks for name in data.splits)
        splits = {
            name: MixedDataset.of({task: data.splits[name] for task, data in by_name.items() if name in data.splits})
            for name in names
        }
        return cls("+".join(by_name), MIXED, splits, tasks=by_name)

    @property
    def each_task(self) -> Mapping[str, ClientData]:
        """The client's tasks by name, whether one or several."""
        return self.tasks or {self.task: self}


@dataclass(frozen=True)
class Base:
    """A frozen base model, and the parts of it that adapters change.

    ``targets`` are the names of the linear modules that get LoRA factors, ``heads`` those whose weight and bias are
    trained in full, as differences. ``own_heads`` are trained in full, too, but never leave the client: heads for
    labels that only this client has. ``fingerprint`` is 64 hex digits that all clients of a federation must share,
    except with a strategy that crosses architectures. ``drawn`` are parameters that the checkpoint lacks and nothing
    trains: a personal model brings them along. ``padding`` is where texts are padded
    (:mod:`client_app.model.forward.padding`), ``notes`` are findings. ``reference`` is the small model whose gradients
    make the sketches, the same for all clients; None: this base model itself.
    """

    name: str
    model: nn.Module
    fingerprint: str
    targets: tuple[str, ...]
    heads: tuple[str, ...]
    own_heads: tuple[str, ...] = ()
    reference: Base | None = None
    drawn: tuple[str, ...] = ()
    padding: str = "right"
    notes: tuple[str, ...] = ()
