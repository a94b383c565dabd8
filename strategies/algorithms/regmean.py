r"""RegMean: the merged delta whose outputs are closest to those of every client's own delta, on the client's inputs.

Jin, Ren, Preotiuc-Pietro, Cheng, "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023. With
:math:`G_k = E[x x^T]` over the inputs of a module at client k, off-diagonal numbers multiplied by ``shrink``,

.. math:: \Delta = (\sum_k p_k \Delta_k G_k)(\sum_k p_k G_k)^{-1}

which is a stack :math:`[p_k s_k B_k][A_k G_k G^{-1}]`: no dense delta is formed. A head's weight is merged likewise,
a bias as a mean. The upload of G is usually larger than the adapter, and it says something about the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import fold, stack, truncate
from fedalloy_adapters.bank.store import Bank
from fedalloy_adapters.layout import Factor
from fedalloy_adapters.parts import layout_of_gram
from strategies.families.by_modules import at_rank, bank_of, by_modules
from strategies.families.one_shot import LOCAL, OneShot, OneShotOptions
from strategies.framework import About, Client, steps
from strategies.framework.options import require_range

GRAM = "gram"


@dataclass(frozen=True)
class RegMeanOptions(OneShotOptions):
    """How the moments are taken and shrunk."""

    shrink: float = 0.9
    """Factor of the moments' off-diagonal numbers; 1 shrinks none."""
    samples: int = 0
    """Largest number of training examples for computing the moments; 0 means all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("shrink", self.shrink, 0, 1)
        require_range("samples", self.samples, 0, 2**31 - 1)


def symmetric(triangle: Tensor, width: int, shrink: float = 1.0) -> Tensor:
    """The matrix ``[d, d]`` float64 of an upper triangle ``[d (d + 1) / 2]``, off-diagonal numbers times ``shrink``."""
    rows, columns = torch.triu_indices(width, width)
    found = torch.zeros(width, width, dtype=torch.float64)
    found[rows, columns] = found[columns, rows] = triangle.double()
    return shrink * found + (1 - shrink) * torch.diag(found.diagonal())


def transports(moments: Sequence[Tensor], shares: Sequence[float]) -> list[Tensor]:
    """``G_k G^{-1}`` with ``G = sum p_k G_k``, each ``[d, d]``; the identity if all moments are zero."""
    total = sum((share * moment for share, moment in zip(shares, moments, strict=True)), torch.zeros_like(moments[0]))
    floor = 1e-6 * float(total.diagonal().mean()) + 1e-30
    eye = floor * torch.eye(len(total), dtype=total.dtype)
    # G is symmetric: X G = M is G X^T = M^T.
    try:
        return [torch.linalg.solve(total + eye, (moment + eye).T).T for moment in moments]
    except RuntimeError:  # singular: not real second moments, a client made them up
        inverse = torch.linalg.pinv(total + eye, hermitian=True)
        return [(moment + eye) @ inverse for moment in moments]


def regression_mean(
    adapters: Sequence[Adapter] | Bank,
    moments: Sequence[Adapter] | Bank,
    shares: Sequence[float],
    shrink: float = 1.0,
    rank: int = 0,
) -> Adapter:
    """The merge of adapters with their inputs' second moments; ``shares`` sum to one."""
    bank, grams = bank_of(adapters), bank_of(moments)

    def merge(parts: list[Adapter]) -> Adapter:
        measured = layout_of_gram(parts[0].layout)
        seen = list(grams.parts(measured).values())
        return _regressed(parts, seen, shares, shrink, rank)

    return by_modules(bank, merge, at_rank(bank, rank).folded)


def _regressed(
    adapters: Sequence[Adapter], moments: Sequence[Adapter], shares: Sequence[float], shrink: float, rank: int
) -> Adapter:
    moved = [fold(adapter).to(torch.float64).clone() for adapter in adapters]
    for entry in moved[0].layout.entries:
        if entry.factor not in (Factor.A, Factor.WEIGHT):
            continue
        width = entry.shape[1]
        matrices = [symmetric(found[entry.module, Factor.GRAM], width, shrink) for found in moments]
        for adapter, transport in zip(moved, transports(matrices, shares), strict=True):
            adapter[entry.module, entry.factor].copy_(adapter[entry.module, entry.factor] @ transport)
    return truncate(stack(moved, list(shares)), at_rank(adapters, rank)).to(adapters[0].vector.dtype)


class RegMean(OneShot[RegMeanOptions]):
    """Least squares on everybody's inputs."""

    name = "regmean"
    about = About(
        "one merge of all local adapters at the end, by regression on the modules' inputs",
        travels="P and d_in (d_in + 1) / 2 for each module up once, P down once",
        when="there is only one exchange, bytes are cheap, and second moments of inputs may leave",
    )

    def extra(self, client: Client) -> list[steps.Step]:
        """Second moments of the inputs of every module."""
        return [steps.gram(self.training, GRAM, steps.mixture(LOCAL), samples=self.options.samples)]

    def merge(self, uploads: Mapping[str, Bank], shares: Sequence[float]) -> Adapter:
        """The regression, then truncated."""
        return regression_mean(uploads[LOCAL], uploads[GRAM], shares, self.options.shrink, self.options.rank)
