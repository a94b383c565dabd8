r"""DFedPGP: clients pass a shared part to a few others, one way (push-sum), and keep their heads.

Liu, Shi, Li, Wu, Wang, Shen, "Decentralized Directed Collaboration for Personalized Federated Learning", CVPR 2024:
with a column-stochastic matrix P that says who sends to whom in a round,

.. math:: u_i \leftarrow \sum_j P_{ij} (u_j + \Delta_j), \qquad w_i \leftarrow \sum_j P_{ij} w_j, \qquad z_i = u_i /
w_i,

where client i trains its head, then the shared part, from :math:`z_i`, and :math:`\Delta_i` is the change of the shared
part. A sender gives equal shares to its receivers and itself. The network is random and directed, drawn anew in each
round; the server relays (:mod:`strategies.families.gossip`). Without a head everything is shared. The head takes half
of the local steps.
"""

from __future__ import annotations

from torch import Tensor

from fedalloy_adapters.layout import Layout
from strategies.families.gossip import LOCAL, Gossip, GossipOptions
from strategies.framework import About, Client, steps


class DFedPGP(Gossip[GossipOptions]):
    """Directed gossip of the representation."""

    name = "dfedpgp"
    about = About(
        "a representation mixed with a few others' (directed), its own head",
        trains="head, then the rest",
        travels="the rest up, the rest down",
        when="a network without a server and with one-way links is to be tried out; labels differ",
    )

    def mixing(self, links: Tensor) -> Tensor:
        """The column-stochastic matrix: each sender's shares sum to one.

        >>> import torch
        >>> DFedPGP().mixing(torch.tensor([[1.0, 1.0], [0.0, 1.0]])).tolist()
        [[1.0, 0.5], [0.0, 0.5]]
        """
        return links / links.sum(dim=0)

    def part(self, layout: Layout) -> Layout:
        """All but the head."""
        head = layout.head_modules
        return layout.select(modules=[module for module in layout.modules if module not in head]) if head else layout

    def train(self, client: Client) -> list[steps.Step]:
        """The head, then the rest."""
        head, total = list(client.layout.head_modules), self.local_steps(client)
        if not head:
            return super().train(client)
        parts = ((head, total // 2), (list(self.part(client.layout).modules), total - total // 2))
        mix = steps.mixture(LOCAL)
        return [steps.train(self.training, mix, [LOCAL], modules=modules, steps=n) for modules, n in parts if n]
