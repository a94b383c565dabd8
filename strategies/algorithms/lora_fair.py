r"""LoRA-FAIR: factors are averaged, and B is corrected for the error of that average.

Bian, Wang, Zhang, Xu, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", ICCV 2025
(arXiv 2411.14961). With :math:`\bar A, \bar B` the averages and :math:`\Delta = \sum_k p_k B_k A_k` the exact average,

.. math:: X = \arg\min_X \|(\bar B + X) \bar A - \Delta\|_F^2 + \lambda \|X\|_F^2
          = (\Delta - \bar B \bar A) \bar A^T (\bar A \bar A^T + \lambda I)^{-1}

and clients continue from :math:`\bar A, \bar B + X`. The paper finds X by gradient steps on a cosine; the squared
distance has this closed form, which needs only :math:`B_k (A_k \bar A^T)` and no dense delta. :math:`\lambda` is
``damping`` times the mean of the diagonal of :math:`\bar A \bar A^T`. Heads are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank
from fedalloy_adapters.layout import Factor, Layout
from strategies.families.fedavg import Averaging
from strategies.framework import About, AlloyStrategy, Client
from strategies.framework.options import require_range


@dataclass(frozen=True)
class LoRAFAIROptions:
    """How large the correction may become."""

    damping: float = 0.01
    """Lambda, relative to the mean diagonal of A A^T; a large value leaves B as averaged."""

    def __post_init__(self) -> None:
        require_range("damping", self.damping, 1e-9)


def correction(pairs: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float], damping: float) -> Tensor:
    """X ``[out, r]``, float64, from clients' pairs of A ``[r, in]`` and B ``[out, r]`` and shares that sum to one."""
    pairs = [(a.double(), b.double()) for a, b in pairs]
    mean_a = sum((share * a for share, (a, _) in zip(shares, pairs, strict=True)), torch.zeros(()))
    mean_b = sum((share * b for share, (_, b) in zip(shares, pairs, strict=True)), torch.zeros(()))
    meant = sum((share * b @ (a @ mean_a.T) for share, (a, b) in zip(shares, pairs, strict=True)), torch.zeros(()))
    inner = mean_a @ mean_a.T
    size = inner.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    damped = inner + damping * size * torch.eye(len(inner), dtype=torch.float64)
    found: Tensor = torch.linalg.solve(damped, (meant - mean_b @ inner).T)
    return found.T


class LoRAFAIR(Averaging[LoRAFAIROptions]):
    """FedAvg of the factors, corrected."""

    name = "lora-fair"
    about = About(
        "the average of the factors, B corrected towards the exact average",
        when="FedAvg's averaging error matters, with FedAvg's bytes",
    )

    def compatible(self, first: Layout, second: Layout) -> bool:
        """Equal layouts: groups are not averaged one by one here."""
        return first.digest == second.digest

    def enrol(self, client: Client) -> None:
        """The first client's layout is the federation's."""
        AlloyStrategy.enrol(self, client)  # FedAvg's own makes a union of groups
        if self.model is None:
            self.model = Adapter.initial(client.layout, self.seed)

    def average(self, adapters: Mapping[str, Adapter], examples: Mapping[str, int]) -> Adapter:
        """The averages, and the correction of each B."""
        bank = Bank.of(adapters)
        merged = bank.mean(examples)
        total = sum(examples[name] for name in bank)
        shares = [examples[name] / total for name in bank]
        for module in merged.layout.lora_modules:
            part = merged.layout.select((), [module])  # only this module of each upload is read
            parts = [bank.part(name, part) for name in bank]
            pairs = [(found[module, Factor.A], found[module, Factor.B]) for found in parts]
            merged[module, Factor.B].add_(correction(pairs, shares, self.options.damping).float())
        return merged
