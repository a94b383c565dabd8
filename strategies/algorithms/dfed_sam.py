r"""DFedSAM: sharpness-aware training; adapters are mixed with those of a few neighbours.

Shi, Shen, Wei, Sun, Yuan, Wang, Tao, "Improving the Model Consistency of Decentralized Federated Learning", ICML 2023
(arXiv 2302.04083); its abstract and introduction were available. Each local step takes its gradient at

.. math:: \theta + \rho \, g / \|g\|, \qquad g = \nabla f_i(\theta; batch),

then neighbours are averaged, :math:`\theta_i \leftarrow \sum_j W_{ij} \theta_j`, with a symmetric W whose rows and
columns sum to one; ``gossip-steps`` above 1 are the paper's DFedSAM-MGS. Flat minima should survive that average. Here
W has Metropolis weights, :math:`W_{ij} = 1 / (1 + max(d_i, d_j))`, where d counts a client's neighbours; links are
random, both ways, and drawn anew in each round; the server relays (:mod:`strategies.families.gossip`). A step takes
twice the time of a plain one. ``optimizer`` is the run's (the paper's: SGD with momentum).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.families.gossip import LOCAL, Gossip, GossipOptions
from strategies.framework import About, Client, steps
from strategies.framework.options import require_range


@dataclass(frozen=True)
class DFedSAMOptions(GossipOptions):
    """How flat the minima are to be, and how often neighbours are averaged."""

    rho: float = 0.05
    """Radius of the sharpness-aware steps (the default of SAM's authors); 0 means plain steps."""
    gossip_steps: int = 1
    """How often neighbours are averaged after a round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("rho", self.rho, 0)
        require_range("gossip-steps", self.gossip_steps, 1, 1000)


class DFedSAM(Gossip[DFedSAMOptions]):
    """Undirected gossip of flat models."""

    name = "dfed-sam"
    about = About(
        "its adapter, trained for flatness and mixed with a few others'",
        when="a network without a server is to be tried out; every step takes twice the time",
    )

    @property
    def turns(self) -> int:
        """How often neighbours are averaged."""
        return self.options.gossip_steps

    def links(self, drawn: Tensor) -> Tensor:
        """Links go both ways: a client that is sent something also sends."""
        return torch.maximum(drawn, drawn.T)

    def mixing(self, links: Tensor) -> Tensor:
        """Rows and columns sum to one.

        >>> DFedSAM().mixing(torch.tensor([[1.0, 1.0], [1.0, 1.0]])).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
        """
        others = links - torch.diag(links.diagonal())
        degrees = others.sum(dim=0)
        weights = others / (1 + torch.maximum(degrees[:, None], degrees[None, :]))
        return weights + torch.diag(1 - weights.sum(dim=1))

    def train(self, client: Client) -> list[steps.Step]:
        """FedAvg's steps, sharpness-aware."""
        return [steps.train(self.training, steps.mixture(LOCAL), [LOCAL], sharpness_radius=self.options.rho)]
