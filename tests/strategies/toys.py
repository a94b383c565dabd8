"""FedMerge's toys: clients with quadratic losses, and a second implementation that shares no code with the strategy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fedalloy_adapters.layout import Factor
from strategies.algorithms.fedmerge import FedMerge, FedMergeOptions
from strategies.framework.steps import Training
from tests.strategies.conftest import (
    client_of,
    layout_of,
)

VARIANTS = ("frozen-a", "trained-a", "factors")
NAMES = ("ada", "ben", "cyd", "dan")
COUNTS = (10, 30, 20, 7)
LAYOUT = layout_of()
JITTER: dict[str, Any] = {"models": 5, "init": "jitter", "lr_w": 0.05}  # what most of these tests were written for
NOT_A = (Factor.B, Factor.WEIGHT, Factor.BIAS)


def fedmerge(
    names: tuple[str, ...] = NAMES, seed: int = 3, training: Training | None = None, **options: Any
) -> FedMerge:
    strategy = FedMerge(FedMergeOptions(**(JITTER | options)), training, seed)
    for name, count in zip(names, COUNTS, strict=False):
        strategy.enrol(client_of(name, LAYOUT, count))
    return strategy


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Toy:
    """K clients with quadratic losses ``1/2 (x - c)' H (x - c)`` in float64; gradients come from autograd."""

    def __init__(self, clients: int = 7, models: int = 3, size: int = 40) -> None:
        roots = draw(clients, size, size, seed=1, scale=size**-0.5)
        self.hessians = roots @ roots.transpose(1, 2) + 0.1 * torch.eye(size, dtype=torch.float64)
        self.centres = draw(clients, size, seed=2)
        self.theta = draw(models, size, seed=3).requires_grad_()
        self.logits = draw(clients, models, seed=4).requires_grad_()
        counts = torch.arange(1, clients + 1, dtype=torch.float64)
        self.shares = counts / counts.sum()

    def loss(self, client: int, x: Tensor) -> Tensor:
        away = x - self.centres[client]
        return 0.5 * away @ self.hessians[client] @ away

    def objective_gradients(self) -> tuple[Tensor, Tensor]:
        """dF/dTheta and dF/dW of F = sum_i p_i L_i(sum_j softmax(W_i)_j Theta_j)."""
        merged = torch.softmax(self.logits, dim=1) @ self.theta
        total = torch.stack([p * self.loss(i, merged[i]) for i, p in enumerate(self.shares)]).sum()
        theta, logits = torch.autograd.grad(total, (self.theta, self.logits))
        return theta, logits

    def local_gradients(self) -> Tensor:
        """g_i, the gradient of client i's loss at its merged model, ``[K, P]``."""
        merged = (torch.softmax(self.logits, dim=1) @ self.theta).detach().requires_grad_()
        total = torch.stack([self.loss(i, merged[i]) for i in range(len(self.shares))]).sum()
        return torch.autograd.grad(total, merged)[0]

    def one_step(self, lr: float, mu: float) -> Tensor:
        """D_i after one step of gradient descent on loss and pull, ``[K, P]``."""
        received = (torch.softmax(self.logits, dim=1) @ self.theta).detach()
        model = received.clone().requires_grad_()
        losses = [
            self.loss(i, model[i]) + mu / 2 * (model[i] - received[i]).square().sum() for i in range(len(self.shares))
        ]
        return received - (received - lr * torch.autograd.grad(torch.stack(losses).sum(), model)[0])

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        return self.theta.detach(), self.logits.detach()


class Reference:
    """The round of section 6 of the specification in loops over Python floats; no code of the strategy."""

    def __init__(
        self, options: FedMergeOptions, theta: Tensor, logits: Tensor, counts: list[int], mask: Tensor
    ) -> None:
        self.options, self.counts = options, counts
        self.theta: list[list[float]] = theta.double().tolist()
        self.logits: list[list[float]] = logits.double().tolist()
        self.used = [index for index, flag in enumerate(mask.tolist()) if flag]
        self.adam = [[(0.0, 0.0, 0)] * len(self.theta) for _ in counts]

    def weights(self, client: int) -> list[float]:
        row = self.logits[client]
        exponentials = [math.exp(value - max(row)) for value in row]
        return [value / sum(exponentials) for value in exponentials]

    def merged(self, client: int) -> list[float]:
        weights = self.weights(client)
        return [
            sum(w * model[k] for w, model in zip(weights, self.theta, strict=True)) for k in range(len(self.theta[0]))
        ]

    def round(self, displacement: dict[int, list[float]]) -> None:
        options, models = self.options, len(self.theta)
        total = sum(self.counts[i] for i in displacement)
        shares = {i: self.counts[i] / total for i in displacement}
        gradient: dict[int, list[float]] = {}
        for i, moved in displacement.items():
            weights, merged = self.weights(i), self.merged(i)
            pull = shares[i] if options.w_client_weight else 1.0
            gradient[i] = [
                pull * weights[j] * sum((self.theta[j][k] - merged[k]) * moved[k] for k in self.used)
                for j in range(models)
            ]
        largest = max(abs(value) for row in gradient.values() for value in row)
        for i, row in gradient.items():
            scale = max(abs(value) for value in row) if options.w_step == "maxnorm-per-row" else largest
            for j in range(models):
                if options.w_step == "adam":
                    first, second, count = self.adam[i][j]
                    first, second = 0.9 * first + 0.1 * row[j], 0.999 * second + 0.001 * row[j] ** 2
                    count += 1
                    self.adam[i][j] = (first, second, count)
                    step = first / (1 - 0.9**count) / math.sqrt(second / (1 - 0.999**count))
                else:
                    step = row[j] / scale
                self.logits[i][j] -= options.lr_w * step
        for j in range(models):
            carried = {i: shares[i] * self.weights(i)[j] for i in displacement}
            mass = sum(carried.values())
            if mass < options.min_mass:
                continue
            for i, moved in displacement.items():
                c = carried[i] / mass if options.theta_norm == "column" else carried[i]
                for k in range(len(moved)):
                    self.theta[j][k] -= options.lr_theta * c * moved[k]
