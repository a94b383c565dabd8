r"""TIES: trim each delta, elect a sign for every number, and average the numbers that have that sign.

Yadav, Tam, Choshen, Raffel, Bansal, "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023. Per
dense delta: keep the share ``density`` of the largest magnitudes; the sign of the sum is elected (a sum of zero
elects plus); the merged number is ``scale`` times the mean of those that are not zero and have that sign. Trimmed per
module (the original: over the whole model). The result is no longer of low rank: it is cut to ``rank``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank
from strategies.families.one_shot import LOCAL, OneShot, OneShotOptions, merge_dense
from strategies.framework import About
from strategies.framework.options import OptionError, require_range


@dataclass(frozen=True)
class TIESOptions(OneShotOptions):
    """How much is trimmed, and how the rest is scaled."""

    density: float = 0.2
    """Share of each delta's numbers that is kept, the largest ones."""
    scale: float = 1.0
    """Lambda, the factor of the merged delta."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("scale", self.scale, 0)
        if not 0 < self.density <= 1:
            raise OptionError(f"density = {self.density}, expected above 0 and at most 1")


def trim(deltas: Tensor, density: float) -> Tensor:
    """Each of ``deltas [N, ...]`` with all but its ``density`` largest magnitudes at zero; at least one stays.

    >>> trim(torch.tensor([[3.0, -1.0, 0.5, -4.0]]), 0.5).tolist()
    [[3.0, 0.0, 0.0, -4.0]]
    """
    flat = deltas.reshape(len(deltas), -1)
    count = max(1, round(density * flat.shape[1]))
    kept = flat.abs().topk(count, dim=1).indices
    return torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).reshape(deltas.shape)


def elect_and_average(deltas: Tensor) -> Tensor:
    """Mean over ``deltas [N, ...]`` of the numbers whose sign is that of their sum; zeros do not count.

    >>> elect_and_average(torch.tensor([[3.0, -1.0], [1.0, 0.0], [-2.0, -5.0]])).tolist()
    [2.0, -3.0]
    """
    sign = torch.where(deltas.sum(dim=0) >= 0, 1.0, -1.0)
    agrees = deltas * sign > 0
    return (deltas * agrees).sum(dim=0) / agrees.sum(dim=0).clamp_min(1)


class TIES(OneShot[TIESOptions]):
    """Trim, elect, average."""

    name = "ties"
    about = About(
        "one merge of all local adapters at the end: trimmed, signs elected",
        travels="P up once, P down once",
        when="there is only one exchange, and adapters disagree in signs",
    )

    def merge(self, uploads: Mapping[str, Bank], shares: Sequence[float]) -> Adapter:
        """On dense deltas, module by module."""
        options = self.options
        return merge_dense(
            uploads[LOCAL],
            lambda name, deltas: options.scale * elect_and_average(trim(deltas, options.density)),
            options.rank,
        )
