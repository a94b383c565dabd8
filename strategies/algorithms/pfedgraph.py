r"""pFedGraph: a collaboration graph from the similarity of updates; every client gets its own weighted average.

Ye, Ni, Wu, Chen, Wang, "Personalized Federated Learning with Inferred Collaboration Graphs", ICML 2023. For client i

.. math:: \min_{x \in simplex} \lambda \|x\|^2 + (d_i - 2 \lambda p)^T x, \qquad
    d_{ij} = -\cos(\Delta_i, \Delta_j), \quad p_j = n_j / \sum n

which is the Euclidean projection of :math:`p - d_i / (2\lambda)` onto the simplex. As in the authors' code, a cosine
above 0.9 counts as 1. Cosines are of the deltas (through Gram matrices): cosines of factors depend on how a delta is
split. Averages are taken in factor space. The authors' local regulariser, whose sign differs between paper and code, is
left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedalloy_adapters.algebra import gram
from strategies.families.peer_average import LOCAL, Peers
from strategies.framework import About, Brief, Client
from strategies.framework.options import require_range


@dataclass(frozen=True)
class PFedGraphOptions:
    """How similar clients must be."""

    smoothing: float = 0.8
    """Lambda: if large, every client gets FedAvg's average; if small, its own adapter."""

    def __post_init__(self) -> None:
        require_range("smoothing", self.smoothing, 1e-9)


def to_simplex(rows: Tensor) -> Tensor:
    """Euclidean projection of every row of ``[N, K]`` onto the probability simplex (Held, Wolfe, Crowder, 1974).

    >>> to_simplex(torch.tensor([[2.0, 0.0], [0.75, 0.75]])).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    ordered = rows.sort(dim=1, descending=True).values
    count = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype)
    excess = (ordered.cumsum(dim=1) - 1) / count
    kept = (ordered > excess).sum(dim=1, keepdim=True)
    return (rows - excess.gather(1, kept - 1)).clamp_min(0)


def collaboration(inner: Tensor, shares: Tensor, smoothing: float) -> Tensor:
    """Weights ``[N, N]`` from the inner products ``[N, N]`` of updates and the shares ``[N]`` of examples.

    An update of norm zero is similar to itself only.
    """
    norms = inner.diagonal().clamp_min(0).sqrt()
    cosines = inner / (norms[:, None] * norms).clamp_min(torch.finfo(inner.dtype).tiny)
    cosines = torch.where(cosines > 0.9, torch.ones_like(cosines), cosines).fill_diagonal_(1)
    return to_simplex(shares + cosines / (2 * smoothing))


class PFedGraph(Peers[PFedGraphOptions]):
    """An average of its own for every client."""

    name = "pfedgraph"
    about = About(
        "an average of its own, by similarity of updates",
        when="clients come in groups of similar ones, and their updates show it",
    )

    def weigh(self, names: list[str]) -> Tensor:
        """The graph's rows."""
        counts = self.examples(names)
        return collaboration(
            gram([self.uploads[name] for name in names]), counts / counts.sum(), self.options.smoothing
        )

    def deliver(self, client: Client) -> Brief:
        """The average itself."""
        model = self.combined(LOCAL, client)
        return Brief(super().deliver(client).steps, model or {})
