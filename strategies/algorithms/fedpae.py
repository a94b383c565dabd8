r"""FedPAE: every client trains alone, and predicts with an ensemble of its own and its peers' adapters.

Mueller, Street, Baek, Lin, Yang, Huang, "FedPAE: Peer-Adaptive Ensemble Learning for Asynchronous and
Model-Heterogeneous Federated Learning", 2024 (arXiv 2410.14075); only its abstract was available: models travel once,
from peer to peer, and each client chooses its ensemble on validation data. In the paper a genetic search chooses
members for strength and diversity. Here all adapters that a client is sent are members, with the shares :math:`\pi_c`
of :mod:`strategies.families.nearest_peers`. The client predicts :math:`\sum_c \pi_c softmax(logits_c)`.
"""

from __future__ import annotations

from proto.fedalloy.v1 import plan_pb2
from strategies.families.nearest_peers import SHARES, NearestPeers, NearestPeersOptions
from strategies.framework import About, steps


class FedPAE(NearestPeers[NearestPeersOptions]):
    """Local training, then an ensemble of peers."""

    name = "fedpae"
    about = About(
        "its own and its peers' adapters, predictions averaged by shares",
        travels="P up, M P down, once",
        when="there is only one exchange, and an ensemble can be served; needs held-out examples",
    )

    def model(self, slots: list[str]) -> plan_pb2.Mixture:
        """The ensemble."""
        return steps.ensemble(slots, SHARES)
