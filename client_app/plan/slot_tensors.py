"""The tensors in a slot's files. They are checked when they are read, so that a changed bit is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Layout
from proto.fedalloy.v1 import adapter_pb2

_DIGEST = "digest"


def to_tensors(adapter: Adapter, prefix: str) -> dict[str, torch.Tensor]:
    """Vector, layout and digest, under names that begin with ``prefix``."""
    layout = adapter.layout.to_proto().SerializeToString()
    return {
        f"{prefix}vector": adapter.vector.contiguous(),
        f"{prefix}layout": torch.tensor(list(layout), dtype=torch.uint8),
        f"{prefix}digest": torch.tensor(list(adapter.digest), dtype=torch.uint8),
    }


def from_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> Adapter:
    """The adapter that :func:`to_tensors` was given.

    Raises:
        ValueError, KeyError, DecodeError: the tensors are not what it made.
    """
    layout = Layout.from_proto(adapter_pb2.Layout.FromString(bytes(tensors[f"{prefix}layout"].tolist())))
    adapter = Adapter(layout, tensors[f"{prefix}vector"])
    if adapter.digest != bytes(tensors[f"{prefix}digest"].tolist()):
        raise ValueError("the numbers are not those that were written")
    return adapter


def require_no_more_than(tensors: Mapping[str, torch.Tensor], count: int) -> None:
    """Refuse tensors that nobody reads.

    Raises:
        ValueError: there are not exactly ``count``.
    """
    if len(tensors) != count:
        raise ValueError(f"{len(tensors)} tensors, expected {count}: a name has changed")


def with_digest(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An optimiser's state, with its digest."""
    return {**state, _DIGEST: _digest_of(state)}


def without_digest(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state that :func:`with_digest` was given.

    Raises:
        ValueError, KeyError: the tensors are not what it made.
    """
    state = {name: tensor for name, tensor in tensors.items() if name != _DIGEST}
    if not torch.equal(tensors[_DIGEST], _digest_of(state)):
        raise ValueError("the numbers are not those that were written")
    return state


def _digest_of(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
