"""Co-LoRA's P and Q under names that do not depend on the architecture.

"Co-LoRA: Collaborative Model Personalization on Heterogeneous Multi-Modal Clients", ICLR 2026 (arXiv 2506.11024): with
aligned A and B, P ``[r, r]`` and Q ``[r]`` mean the same in models of any width, depth and family, so
``sum_j w_j P_j`` is exactly the sum of the updates. Modules of two layouts correspond if they have the same name in
``shared_names``; nothing else about a model is known here.
"""

from __future__ import annotations

import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Entry, Factor, Layout, LayoutError

SHARED = "shared"
"""The base fingerprint of an adapter of shared tensors: no base model of its own."""


def shared_layout(layout: Layout) -> Layout | None:
    """The shared tensors of a layout under their shared names, ordered by these; None if there are none.

    Equal for all clients that can exchange P and Q: same names, ranks and scalings.
    """
    modules = {name: module for module, name in layout.shared_names.items()}
    entries = []
    for name in sorted(modules):
        found = [layout.by_name.get(f"{modules[name]}.{factor}") for factor in (Factor.P, Factor.Q)]
        entries += [Entry(name, entry.factor, entry.shape) for entry in found if entry is not None]
    if not entries:
        return None
    return Layout(tuple(entries), {name: layout.scalings[modules[name]] for name in modules}, SHARED)


def to_shared(adapter: Adapter) -> Adapter:
    """P and Q of an adapter under their shared names.

    Raises:
        LayoutError: it has none.
    """
    layout = shared_layout(adapter.layout)
    if layout is None:
        raise LayoutError("the layout has no shared tensors")
    modules = {name: module for module, name in adapter.layout.shared_names.items()}
    pieces = [adapter[modules[entry.module], entry.factor].reshape(-1) for entry in layout.entries]
    return Adapter(layout, torch.cat(pieces))


def with_shared(adapter: Adapter, shared: Adapter) -> Adapter:
    """A copy of ``adapter`` in which ``shared`` replaces P and Q.

    Raises:
        LayoutError: names, ranks or scalings are not those of ``adapter``.
    """
    expected = shared_layout(adapter.layout)
    if expected is None or expected.digest != shared.layout.digest:
        finding = "nothing is shared" if expected is None else expected.describe_difference(shared.layout)
        raise LayoutError(f"shared tensors do not fit: {finding}")
    result = adapter.clone()
    names = adapter.layout.shared_names
    for entry, tensor in result.items():
        if entry.module in names and entry.factor in (Factor.P, Factor.Q):
            tensor.copy_(shared[names[entry.module], entry.factor])
    return result
