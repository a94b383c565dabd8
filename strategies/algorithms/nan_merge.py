r"""NAN: merge with coefficients inversely proportional to the norms of the deltas.

Si, Shi, Shao, et al., "NAN: A Training-Free Solution to Coefficient Estimation in Model Merging", 2025 (arXiv
2505.16148):
:math:`\Delta = \sum_k c_k \Delta_k, \; c_k = \|\Delta_k\|^{-1} / \sum_j \|\Delta_j\|^{-1}`. Here the norm is that of
the whole delta, including the head, computed with Gram matrices. The excerpts that were available do not say whether
the paper's is per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import norm
from fedalloy_adapters.bank.store import Bank
from strategies.families.by_modules import exact_average
from strategies.families.one_shot import LOCAL, OneShot, OneShotOptions
from strategies.framework import About


def inverse_norm_coefficients(norms: Sequence[float]) -> list[float]:
    """Coefficients that sum to one. If there are deltas of norm zero, they share all of the weight.

    >>> inverse_norm_coefficients([1.0, 3.0])
    [0.75, 0.25]
    """
    zeros = [found == 0 for found in norms]
    inverse = [float(zero) for zero in zeros] if any(zeros) else [1 / found for found in norms]
    return [found / sum(inverse) for found in inverse]


class NAN(OneShot[OneShotOptions]):
    """A mean in which large updates count less."""

    name = "nan"
    about = About(
        "one merge of all local adapters at the end, weighted by inverse norms",
        travels="P up once, P down once",
        when="there is only one exchange, and adapters are of very unequal size",
    )

    def merge(self, uploads: Mapping[str, Bank], shares: Sequence[float]) -> Adapter:
        """Exact in delta space, then truncated."""
        norms = [norm(adapter) for adapter in uploads[LOCAL].values()]
        return exact_average(uploads[LOCAL], inverse_norm_coefficients(norms), self.options.rank)
