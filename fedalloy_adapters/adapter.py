"""An adapter: a layout and one flat vector with its numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedalloy_adapters.layout import Entry, Factor, Layout, LayoutError


def all_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    given = numbers.detach()
    if given.device.type == "cpu" and given.dtype in (torch.float32, torch.float64):
        return bool(np.isfinite(given.numpy()).all())  # twenty times as fast as PyTorch's, which makes copies
    return bool(torch.isfinite(given).all())


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: ``layout`` says what the numbers mean, ``vector`` of shape ``[P]`` holds them.

    The vector is contiguous and has one floating dtype (state is kept in float32; tests of the algebra use float64).
    ``adapter["module", Factor.A]`` is a view into it, never a copy.

    Raises:
        LayoutError: the vector's shape is not ``[layout.size]``, or it is not floating.
    """

    layout: Layout
    vector: Tensor

    def __post_init__(self) -> None:
        if self.vector.shape != (self.layout.size,):
            raise LayoutError(f"got vector.shape={tuple(self.vector.shape)}, expected ({self.layout.size},)")
        if not self.vector.is_floating_point():
            raise LayoutError(f"got vector.dtype={self.vector.dtype}, expected a floating dtype")
        if not self.vector.is_contiguous():
            object.__setattr__(self, "vector", self.vector.contiguous())

    def __getitem__(self, key: tuple[str, Factor]) -> Tensor:
        """View of one tensor, in its own shape."""
        entry = self.layout.by_name[f"{key[0]}.{key[1]}"]
        return self.vector[self.layout.slice_of(entry.name)].view(entry.shape)

    def items(self) -> Iterator[tuple[Entry, Tensor]]:
        """Entries with their views, in the layout's order."""
        for entry in self.layout.entries:
            yield entry, self.vector[self.layout.slice_of(entry.name)].view(entry.shape)

    def clone(self) -> Adapter:
        """A copy that shares no memory."""
        return Adapter(self.layout, self.vector.clone())

    def to(self, dtype: torch.dtype) -> Adapter:
        """The same adapter with its numbers in another dtype."""
        return Adapter(self.layout, self.vector.to(dtype))

    @property
    def is_finite(self) -> bool:
        """Whether all its numbers are finite."""
        return all_finite(self.vector)

    @property
    def digest(self) -> bytes:
        """Content digest, 32 bytes. It identifies these numbers (as binary32) in this layout."""
        numbers = self.vector.detach().to("cpu", torch.float32).numpy().astype("<f4", copy=False)
        digest = hashlib.sha256(b"fedalloy.content.v1" + self.layout.digest)
        digest.update(numbers.data)
        return digest.digest()

    def select(self, factors: Iterable[Factor] = (), modules: Iterable[str] = ()) -> Adapter:
        """The part with these factors and modules, copied (see ``Layout.select``)."""
        return self.part(self.layout.select(factors, modules))

    def part(self, layout: Layout) -> Adapter:
        """The tensors of ``layout``, which must be contained in this adapter's layout, copied.

        Raises:
            LayoutError: ``layout`` is not a part of this adapter's layout.
        """
        if layout is self.layout:
            return self.clone()
        if not self.layout.contains(layout):
            raise LayoutError(f"not a part of this adapter: {self.layout.describe_difference(layout, part=True)}")
        pieces = [self.vector[self.layout.slice_of(entry.name)] for entry in layout.entries]
        return Adapter(layout, torch.cat(pieces))

    def with_part(self, part: Adapter) -> Adapter:
        """A copy in which the tensors of ``part`` replace this adapter's own.

        Raises:
            LayoutError: ``part``'s layout is not contained in this adapter's.
        """
        if not self.layout.contains(part.layout):
            raise LayoutError(f"not a part of this adapter: {self.layout.describe_difference(part.layout, part=True)}")
        vector = self.vector.clone()
        for entry, tensor in part.items():
            vector[self.layout.slice_of(entry.name)] = tensor.reshape(-1).to(vector.dtype)
        return Adapter(self.layout, vector)

    @classmethod
    def zeros(cls, layout: Layout, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Adapter:
        """An adapter of zeros."""
        return cls(layout, torch.zeros(layout.size, dtype=dtype, device=device))

    @classmethod
    def initial(cls, layout: Layout, seed: int) -> Adapter:
        """The start for a seed: A is uniform as in LoRA, the rest is zero, so the model equals the base model.

        A is drawn from U(-1/sqrt(d_in), 1/sqrt(d_in)), which is the Kaiming-uniform (a = sqrt 5) draw of the LoRA
        paper's code. Every module has a generator of its own, seeded by ``seed`` and the module's name, so clients
        with different layouts agree on the modules they share. A module with P gets orthonormal rows in A and
        orthonormal columns in B (the polar factors of such draws), which make the map from P to the update an isometry.
        Then P and Q are zero.
        """
        adapter = cls.zeros(layout)
        for entry, tensor in adapter.items():
            is_basis = layout.is_basis(entry)
            if entry.factor is Factor.A or is_basis:
                suffix = ":B" if entry.factor is Factor.B else ""
                name = hashlib.sha256(f"{seed}:{entry.module}{suffix}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(name[:8], "little", signed=True))
                bound = 1 / math.sqrt(entry.shape[1])
                drawn = torch.empty(entry.shape).uniform_(-bound, bound, generator=generator)
                tensor.copy_(polar(drawn) if is_basis else drawn)
        return adapter


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, whichever are fewer, ``U V^T`` of its thin SVD."""
    u, _, v_t = torch.linalg.svd(matrix, full_matrices=False)
    product: Tensor = u @ v_t
    return product


def stack_vectors(adapters: Iterable[Adapter]) -> Tensor:
    """The matrix ``[N, P]`` of N adapters of one layout.

    Raises:
        LayoutError: the layouts differ (says where), or there is no adapter.
    """
    found = list(adapters)
    if not found:
        raise LayoutError("got no adapters, expected at least one")
    for other in found[1:]:
        require_same_layout(found[0].layout, other.layout)
    return torch.stack([adapter.vector for adapter in found])


def joined(first: Adapter, second: Adapter) -> Adapter:
    """One adapter with the tensors of both. They must have one base model and no tensor in common.

    Raises:
        LayoutError: they overlap, or their bases differ.
    """
    return Adapter(first.layout.joined(second.layout), torch.cat([first.vector, second.vector]))


def require_same_layout(expected: Layout, found: Layout) -> None:
    """Raise LayoutError, naming the first difference, unless the layouts are equal."""
    if expected is not found and expected.digest != found.digest:
        raise LayoutError(f"found {expected.describe_difference(found)}")


def scalings_from(ranks: Mapping[str, int], alpha: float) -> dict[str, float]:
    """LoRA's scaling alpha / rank for each module."""
    return {module: alpha / rank for module, rank in ranks.items()}
