"""What a client trains on: tensors per split, the task they belong to, and the base model that goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Dataset:
    """One split in memory: model inputs by argument name, each ``[n, ...]``, and integer labels ``[n]``."""

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Dataset:
        """The examples at ``indices`` ``[b]``, in that order."""
        return Dataset({name: tensor[indices] for name, tensor in self.inputs.items()}, self.labels[indices])


@dataclass(frozen=True)
class ClientData:
    """A client's task and its splits; ``"train"``, ``"validation"`` and ``"test"`` are disjoint."""

    task: str
    kind: str
    splits: Mapping[str, Dataset]


@dataclass(frozen=True)
class Base:
    """A frozen base model and what of it adapters change.

    ``targets`` are the names of the linear modules that get LoRA factors, ``heads`` those whose weight and bias are
    trained in full, as differences. ``fingerprint`` is 64 hex digits that all clients of a federation must share,
    except with a strategy that crosses architectures. ``reference`` is the small model that sketches are gradients of,
    with the same inputs and the same for all clients; None: this base model itself.
    """

    name: str
    model: nn.Module
    fingerprint: str
    targets: tuple[str, ...]
    heads: tuple[str, ...]
    reference: Base | None = None
