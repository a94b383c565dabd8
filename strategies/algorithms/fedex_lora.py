r"""FedEx-LoRA: FedAvg of the factors; the error of that average is added to every client's base model.

Singhal, Ponkshe, Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
Models", ACL 2025. With :math:`\bar A = \sum p_k A_k`, :math:`\bar B = \sum p_k B_k`, the residual

.. math:: R = s(\sum_k p_k B_k A_k - \bar B \bar A) = s \sum_k p_k (B_k - \bar B)(A_k - \bar A)

of rank (S - 1) r is added to the frozen base (:mod:`strategies.families.merged_base`), so base plus adapter are the
exact average. Weights are example counts (with ``uniform = true`` 1/S, as in the authors' code). The residual is sent
as a stack of rank (S - 1) r; the head, whose average is exact, is all zero in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import stack, truncate
from fedalloy_adapters.bank.store import Bank
from strategies.families.by_modules import by_modules
from strategies.families.merged_base import MergedBase, compact, layout_at
from strategies.framework import About


@dataclass(frozen=True)
class FedExLoRAOptions:
    """How clients are weighted."""

    uniform: bool = False
    """Give all clients the same weight, whatever their example counts."""


def residual(adapters: Sequence[Adapter], shares: Sequence[float]) -> Adapter:
    """``s sum p (B - mean B)(A - mean A)`` in float32, of rank ``(S - 1) r``; ``shares`` sum to one.

    Differences are taken in float64: they are small beside the factors.
    """
    vectors = torch.stack([adapter.vector.double() for adapter in adapters])
    mean = torch.tensor(shares, dtype=torch.float64) @ vectors
    parts = [Adapter(adapters[0].layout, vector - mean) for vector in vectors]
    total = stack(parts, list(shares))
    for entry, tensor in total.items():
        if entry.module in total.layout.head_modules:
            tensor.zero_()
    ranks = {module: max(rank * (len(adapters) - 1), 1) for module, rank in adapters[0].layout.ranks.items()}
    return truncate(total, total.layout.with_ranks(ranks)).to(torch.float32)


class FedExLoRA(MergedBase[FedExLoRAOptions]):
    """FedAvg and its residual."""

    name = "fedex-lora"
    about = About(
        "FedAvg's adapter; the error of that average goes into its base",
        travels="P up, P + (S - 1) P down",
        when="FedAvg's averaging error matters and few clients take part in a round",
    )

    def average(self, adapters: Mapping[str, Adapter], examples: Mapping[str, int]) -> Adapter:
        """Average the factors; the residual is added to the base."""
        bank = Bank.of(adapters)
        counts = dict.fromkeys(bank, 1) if self.options.uniform else examples
        total = sum(counts[name] for name in bank)
        shares = [counts[name] / total for name in bank]
        if len(bank) > 1:
            layout = bank.common_layout(list(bank))
            ranks = {module: max(rank * (len(bank) - 1), 1) for module, rank in layout.ranks.items()}
            self.add(by_modules(bank, lambda parts: compact(residual(parts, shares)), layout_at(layout, ranks)))
        return bank.mean({name: float(counts[name]) for name in bank})
