r"""HetLoRA: adapters of different ranks, padded with zeros, averaged by their size, and cut to each client's rank.

Cho, Liu, Xu, Fahrezi, Joshi, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024:
a client of rank r is sent the first r rows of A and columns of B; uploads are padded with zeros to the highest rank,
and client k counts :math:`\|B_k A_k\|_F / \sum_j \|B_j A_j\|_F` ("sparsity-weighted"). Factors are averaged, so the
average has cross terms; FlexLoRA averages deltas. Scalings are folded into B before the average and taken out after it.
Heads are averaged with the same weights. Self-pruning, by which a client lowers its own rank during a run, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import norm
from fedalloy_adapters.layout import Factor, Layout
from strategies.algorithms.flexlora import FlexLoRA
from strategies.framework import About, Client


def fitted(adapter: Adapter, layout: Layout) -> Adapter:
    """The same factors at other ranks: their first rows and columns, or zeros after them.

    Args:
        adapter: in the layout of a client or of the federation.
        layout: with the same modules; ranks and scalings may differ.
    """
    found = Adapter.zeros(layout)
    for entry, tensor in found.items():
        given = adapter[entry.module, entry.factor]
        if entry.factor is Factor.B:
            given = given * (adapter.layout.scalings[entry.module] / layout.scalings[entry.module])
        kept = tuple(slice(0, min(sizes)) for sizes in zip(tensor.shape, given.shape, strict=True))
        tensor[kept].copy_(given[kept])
    return found


class HetLoRA(FlexLoRA):
    """FedAvg of padded factors, at any ranks."""

    name = "hetlora"
    about = About(
        "its first ranks of the padded factors' average, weighted by their size",
        when="ranks differ between clients, and the server should have very little work",
    )

    def average(self, adapters: Mapping[str, Adapter], examples: Mapping[str, int]) -> Adapter:
        """Pad, weigh by size, average."""
        self.averaged = True
        sizes = torch.tensor([norm(adapter) for adapter in adapters.values()], dtype=torch.float64)
        weights = sizes / sizes.sum() if sizes.sum() > 0 else torch.full_like(sizes, 1 / len(sizes))
        merged = torch.zeros(self.global_model.layout.size, dtype=torch.float64)
        for weight, adapter in zip(weights.tolist(), adapters.values(), strict=True):
            merged += weight * fitted(adapter, self.global_model.layout).vector
        return Adapter(self.global_model.layout, merged.float())

    def part_of(self, client: Client) -> Adapter:
        """The average's first ranks; before there is an average, the usual start."""
        if not self.averaged:
            return Adapter.initial(client.layout, self.seed)
        return fitted(self.global_model, client.layout)
