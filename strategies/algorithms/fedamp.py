r"""FedAMP: attentive message passing; similar clients attract each other.

Huang, Chu, Zhou, Wang, Liu, Pei, Zhang, "Personalized Cross-Silo Federated Learning on Non-IID Data", AAAI 2021. With
:math:`A(x) = 1 - e^{-x/\sigma}`,

.. math::
    \xi_{kj} = \alpha A'(\|\theta_k - \theta_j\|^2), \quad \xi_{kk} = 1 - \sum_{j \neq k} \xi_{kj}, \quad
    u_k = \sum_j \xi_{kj} \theta_j

and client k continues from its own adapter with the pull :math:`\frac{\lambda}{2\alpha} \|\theta - u_k\|^2`. Distances,
sums and the pull are in factor space. Since distances of adapters have no natural scale, ``sigma`` is in units of the
median squared distance of two clients, and A' is normalised to 1 at 0: :math:`\xi_{kj} = \alpha e^{-x/\sigma}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedalloy_adapters.bank.blocks import Row, rows_of, squared_distances
from strategies.families.peer_average import LOCAL, Peers
from strategies.framework import About, Brief, Client, steps
from strategies.framework.options import require_range

CLOUD = "cloud"


@dataclass(frozen=True)
class FedAMPOptions:
    """How strongly clients attract each other."""

    alpha: float = 0.2
    """Largest weight of another client; if the others' weights sum to more than one, they are scaled down."""
    sigma: float = 1.0
    """Reach of the attention, in units of the median squared distance of two clients."""
    pull: float = 0.1
    """Lambda / alpha, the strength of the pull towards the mixture."""

    def __post_init__(self) -> None:
        require_range("alpha", self.alpha, 0, 1)
        require_range("sigma", self.sigma, 1e-6)
        require_range("pull", self.pull, 0)


def attention(vectors: Tensor | Sequence[Row], alpha: float, sigma: float) -> Tensor:
    """``xi [N, N]`` of adapters ``[N, P]``, or of a bank's rows: rows sum to one, nothing is negative.

    ``alpha e^{-x / (sigma m)}`` off the diagonal, with the squared distance x and the median m of those that are not 0.
    If a row's off-diagonal weights sum to more than one, they are divided by that sum; otherwise the diagonal would be
    negative.

    Two equal clients and a different one: similar clients attract each other more.

    >>> weights = attention(torch.tensor([[0.0], [0.0], [1.0]]), alpha=0.25, sigma=1.0)
    >>> [round(weight, 3) for weight in weights[0].tolist()]
    [0.658, 0.25, 0.092]
    """
    squared = squared_distances(rows_of(vectors))
    apart = squared[squared > 0]
    scale = sigma * float(apart.median()) if len(apart) else 1.0
    found = alpha * torch.exp(-squared / scale)
    found.fill_diagonal_(0)
    found = found / found.sum(dim=1, keepdim=True).clamp_min(1)
    return found + torch.diag(1 - found.sum(dim=1))


class FedAMP(Peers[FedAMPOptions]):
    """A pull towards a mixture of similar clients."""

    name = "fedamp"
    about = About(
        "its own adapter, pulled to a mixture of similar clients",
        when="clients come in groups of similar ones; the server keeps every client's last adapter",
    )

    def weigh(self, names: list[str]) -> Tensor:
        """Attention by distance."""
        return attention(self.uploads.rows(names), self.options.alpha, self.options.sigma)

    def brief(self, round_: int, client: Client) -> Brief:
        """Install the mixture; evaluate the client's adapter, train it with the pull to the mixture, send it."""
        mix, cloud = steps.mixture(LOCAL), self.combined(CLOUD, client)
        plan = [
            *self.begin(),
            steps.evaluate(self.training, mix),
            steps.train(self.training, mix, [LOCAL], proximal=None if cloud is None else (CLOUD, self.options.pull)),
            self.send(),
        ]
        return Brief(plan, cloud or {})
