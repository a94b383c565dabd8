r"""DARE: drop random numbers of each delta, rescale the others, then average.

Yu, Yu, Yu, Huang, Li, "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
ICML 2024: each number of a dense delta is dropped with probability ``drop`` and otherwise divided by 1 - drop, which
leaves its expectation. The mean by example counts follows; the result is cut to ``rank``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank
from strategies.families.one_shot import LOCAL, OneShot, OneShotOptions, merge_dense
from strategies.framework import About
from strategies.framework.options import OptionError


@dataclass(frozen=True)
class DAREOptions(OneShotOptions):
    """How many numbers are dropped."""

    drop: float = 0.9
    """Probability that a number is dropped; 0.9 in the paper, for models with far more numbers than an adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop < 1:
            raise OptionError(f"drop = {self.drop}, expected at least 0 and below 1")


def drop_and_rescale(deltas: Tensor, drop: float, seed: str) -> Tensor:
    """``deltas [N, ...]`` where each number is set to zero with probability ``drop``, else divided by 1 - drop."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    kept = torch.rand(deltas.shape, generator=generator, dtype=torch.float64) >= drop
    return deltas * kept / (1 - drop)


class DARE(OneShot[DAREOptions]):
    """A mean of thinned deltas."""

    name = "dare"
    about = About(
        "one merge of all local adapters at the end, most numbers dropped at random",
        travels="P up once, P down once",
        when="there is only one exchange, and many adapters disturb each other",
    )

    def merge(self, uploads: Mapping[str, Bank], shares: Sequence[float]) -> Adapter:
        """Merge dense deltas, module by module. The run's seed decides which numbers are dropped."""

        def rule(name: str, deltas: Tensor) -> Tensor:
            thinned = drop_and_rescale(deltas, self.options.drop, f"{self.seed}:{name}")
            mean: Tensor = torch.tensordot(torch.tensor(shares, dtype=thinned.dtype), thinned, dims=1)
            return mean.to(deltas.dtype)

        return merge_dense(uploads[LOCAL], rule, self.options.rank)
