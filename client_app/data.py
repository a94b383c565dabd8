"""What a client trains on: tensors per split, the task they belong to, and the base model that goes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

MASK = "attention_mask"


@dataclass(frozen=True)
class Dataset:
    """One split in memory: model inputs by argument name, each ``[n, ...]``, and labels.

    Labels are integers ``[n]``, or ``[n, L]`` where every token has one (-100: not a target). ``kind`` decides the loss
    and the metrics; see ``client_app.tasks``. Texts are padded on the right to the longest of the split; inputs that
    are as long as ``attention_mask`` belong to tokens.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    kind: str = "image-classification"

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Dataset:
        """The examples at ``indices`` ``[b]``, in that order; texts are padded to the longest of the batch only."""
        return Dataset(
            {name: tensor[indices] for name, tensor in self.inputs.items()}, self.labels[indices], self.kind
        ).trimmed()

    def subset(self, indices: Tensor) -> Dataset:
        """A split with the examples at ``indices`` only."""
        return self.batch(indices)

    def trimmed(self) -> Dataset:
        """Without the columns that are padding in every example."""
        if MASK not in self.inputs or not len(self):
            return self
        width = self.inputs[MASK].shape[1]
        used = max(1, int(self.inputs[MASK].sum(dim=1).max()))
        if used == width:
            return self

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:, :used] if tensor.dim() == 2 and tensor.shape[1] == width else tensor

        return Dataset({name: cut(tensor) for name, tensor in self.inputs.items()}, cut(self.labels), self.kind)


@dataclass(frozen=True)
class LazyDataset(Dataset):
    """A split whose large inputs (images) are read when a batch needs them.

    ``read`` gives those inputs for a list of positions; ``inputs`` holds the small ones.
    """

    read: Callable[[Sequence[int]], Mapping[str, Tensor]] = lambda positions: {}

    def batch(self, indices: Tensor) -> Dataset:
        """See :meth:`Dataset.batch`."""
        small = Dataset.batch(self, indices)
        return Dataset({**self.read(indices.tolist()), **small.inputs}, small.labels, self.kind)

    def subset(self, indices: Tensor) -> Dataset:
        """See :meth:`Dataset.subset`; nothing is read yet."""
        small, chosen = Dataset.batch(self, indices), indices.tolist()
        return LazyDataset(
            small.inputs, small.labels, self.kind, lambda positions: self.read([chosen[i] for i in positions])
        )


@dataclass(frozen=True)
class ClientData:
    """A client's task and its splits; ``"train"``, ``"validation"`` and ``"test"`` are disjoint.

    ``metrics`` are wanted beyond those that logits give at once. Where texts are generated, ``decode`` turns token ids
    into text, and at most ``generate_examples`` texts of ``max_new_tokens`` tokens are written in an evaluation.
    ``notes`` are findings about the data that contain none of it, for the server's log. ``for_reference`` has splits as
    the reference model reads them, where that has a tokenizer or processor of its own.
    """

    task: str
    kind: str
    splits: Mapping[str, Dataset]
    metrics: tuple[str, ...] = ()
    decode: Callable[[Tensor], str] | None = None
    generate_examples: int = 0
    max_new_tokens: int = 64
    notes: tuple[str, ...] = ()
    for_reference: Mapping[str, Dataset] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """A frozen base model and what of it adapters change.

    ``targets`` are the names of the linear modules that get LoRA factors, ``heads`` those whose weight and bias are
    trained in full, as differences. ``own_heads`` are trained in full, too, but never leave the client: heads for
    labels that only this client has. ``fingerprint`` is 64 hex digits that all clients of a federation must share,
    except with a strategy that crosses architectures. ``reference`` is the small model that sketches are gradients of,
    the same for all clients; None: this base model itself.
    """

    name: str
    model: nn.Module
    fingerprint: str
    targets: tuple[str, ...]
    heads: tuple[str, ...]
    own_heads: tuple[str, ...] = ()
    reference: Base | None = None
