r"""FedGMM: FedEM, with Gaussians over what the base model sees in an example.

Wu, Zhang, Yu, Liu, Gu, Zhou, Chen, Cheng, "Personalized Federated Learning under Mixture of Distributions", ICML 2023
(arXiv 2305.01068; its abstract and the authors' code were read). With features z of an example x, M Gaussians and C
adapters for all clients, and shares :math:`\pi_k` of its own, client k computes

.. math:: q_s(m, c) \propto \pi_k(m, c) \, N(z_s; \mu_m, \Sigma_m) \, e^{-\ell(h_c(x_s), y_s)}, \qquad
    \pi_k = mean_s \, q_s

trains adapter c with example weights :math:`\sum_m q_s(m, c)`, and predicts with shares
:math:`\propto \sum_m \pi_k(m, c) N(z; \mu_m, \Sigma_m)`, which depend on the input. The server averages adapter c by
:math:`n_k \sum_m \pi_k(m, c)`, and Gaussians by their parts of the examples. The mean of :math:`\log \sum_m \pi_k(m)
N(z; \mu_m, \Sigma_m)` over a client's examples is in each round's record: a client that is new, or has become
different, has a low one.

Here z are a few fixed directions of the frozen base model's features (the authors: of an autoencoder's or of PCA's),
covariances are diagonal (theirs: full, plus 0.1) and have a floor of a tenth of all clients' variance, and a merged
variance contains the spread of clients' means (in their code it is the mean of the variances). The first round has one
Gaussian for each client, its own; then the M start at the means of clients that are far from each other (theirs: at
k-means centres of every client's own, averaged). Means and variances of features leave a client; no single example's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from proto.fedalloy.v1 import plan_pb2
from strategies.algorithms.fedem import SHARES, FedEMOptions, Learners
from strategies.framework import About, Answer, Client, State, steps
from strategies.framework.options import require_range

_FLOOR = 0.1
DENSITY = "log-density"
"""Key of the clients' mean logarithms of densities in a round's record."""


@dataclass(frozen=True)
class FedGMMOptions(FedEMOptions):
    """How many adapters and Gaussians there are."""

    gaussians: int = 3
    """M, the number of Gaussians over features."""
    dimensions: int = 8
    """How many features of an example the Gaussians see."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("gaussians", self.gaussians, 1, 64)
        require_range("dimensions", self.dimensions, 1, 256)


def pooled(mass: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[..., d]`` of all examples together, from ``mass [K, ...]`` and moments ``[K, ..., d]``."""
    share = (mass / mass.sum(dim=0).clamp_min(1e-300))[..., None]
    mean = (share * means).sum(dim=0)
    return mean, (share * (variances + (means - mean).square())).sum(dim=0)


def starts(means: Tensor, variance: Tensor, count: int, seed: int) -> Tensor:
    """``count`` of the ``means [K, d]``, each as far as possible from those before; if there are no more, draws."""
    chosen, points = [means[0]], means / variance.sqrt()
    for _ in range(count - 1):
        distances = torch.cdist(points, torch.stack(chosen) / variance.sqrt()).amin(dim=1)
        chosen.append(means[distances.argmax()])
        if float(distances.max()) == 0:
            draw = torch.Generator().manual_seed(seed + len(chosen))
            chosen[-1] = means[0] + variance.sqrt() * torch.randn(len(variance), generator=draw, dtype=variance.dtype)
    return torch.stack(chosen)


class FedGMM(Learners[FedGMMOptions]):
    """C global adapters, and M Gaussians that say for which inputs a client uses which."""

    name = "fedgmm"
    about = About(
        "C global adapters, their predictions averaged by shares that depend on the input",
        trains="A, B, head of each",
        travels="C P and moments of features, up and down",
        when="as fedem, where kinds also differ in what examples look like, or new kinds are to be noticed; means and "
        "variances of features leave",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gaussians = torch.empty(0, 2, self.options.dimensions, dtype=torch.float64)  # means and variances
        self.answers: dict[str, tuple[Tensor, list[float], float]] = {}

    def divide(self) -> steps.Step:
        """Among the adapters and the Gaussians."""
        found = [plan_pb2.Gaussian(mean=mean.tolist(), variance=variance.tolist()) for mean, variance in self.gaussians]
        return steps.density(self.slots, SHARES, found, dimensions=self.options.dimensions, seed=self.seed)

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep moments and shares, too."""
        super().absorb(round_, client, answer)
        (found,) = (result.density for result in answer.report.results if result.HasField("density"))
        rows = [[[g.weight] * len(g.mean), list(g.mean), list(g.variance)] for g in found.gaussians]
        self.answers[client.id] = torch.tensor(rows, dtype=torch.float64), list(found.shares), found.log_density

    def weight_of(self, slot: str, client: Client) -> float:
        """The client's examples that belong to the adapter."""
        return client.examples * self.answers[client.id][1][self.slots.index(slot)]

    def settle(self, round_: int) -> dict[str, Any]:
        """Average each adapter, and merge the Gaussians' moments."""
        record = super().settle(round_)
        names = sorted(self.answers)
        if names:
            self.gaussians = self._merged(names)
            record[DENSITY] = {name: round(self.answers[name][2], 3) for name in names}
        self.answers = {}
        return record

    def state(self) -> State:
        """The adapters and the Gaussians."""
        found = super().state()
        return State(found.tensors | {"gaussians": self.gaussians}, found.values)

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        super().load_state(state)
        self.gaussians = state.tensors["gaussians"]

    def _merged(self, names: list[str]) -> Tensor:
        counts = torch.tensor([self.clients[name].examples for name in names], dtype=torch.float64)
        moments = torch.stack([self.answers[name][0] for name in names])  # [K, M, 3, d]
        mass, means, variances = counts[:, None] * moments[:, :, 0, 0], moments[:, :, 1], moments[:, :, 2]
        mean, variance = pooled(mass, means, variances)
        overall = pooled(mass.flatten(), means.flatten(0, 1), variances.flatten(0, 1))[1]
        if not len(self.gaussians):
            order = counts.argsort(descending=True, stable=True)
            mean = starts(means[order, 0], overall + 1e-12, self.options.gaussians, self.seed)
            variance = (counts[:, None] * variances[:, 0]).sum(dim=0).expand_as(mean) / counts.sum()
        elif (lost := mass.sum(dim=0) <= 0).any():  # a Gaussian without examples stays where it is
            mean[lost], variance[lost] = self.gaussians[lost].unbind(dim=1)
        return torch.stack([mean, variance.clamp_min(_FLOOR * overall + 1e-12)], dim=1)
