"""Sharpness-aware steps: the gradient is taken where the loss is highest nearby.

Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021.
With the gradient g of a batch's loss in all that a step optimises, the optimiser gets the gradient at ::

    theta + rho g / ||g||

of the same batch with the same dropout. Each step costs one more forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from client_app.plan.names import PlanError
from proto.fedalloy.v1 import plan_pb2


def require_radius(step: plan_pb2.TrainStep) -> None:
    """Refuse a radius that is not valid.

    Raises:
        PlanError: it is negative or not finite.
    """
    if not 0 <= step.sharpness_radius < float("inf"):
        raise PlanError(f"sharpness radius {step.sharpness_radius:g}, expected a finite number of at least 0")


class Top:
    """The trained parameters, and the state of the random numbers before their first gradient."""

    def __init__(self, parameters: Iterable[nn.Parameter], radius: float, device: torch.device) -> None:
        self.parameters = list(parameters)
        self.radius, self.device = radius, device
        self.random = [torch.get_rng_state()]
        if device.type == "cuda":
            self.random.append(torch.cuda.get_rng_state(device))
        self.before: list[Tensor] = []

    @torch.no_grad()
    def climb(self) -> None:
        """Move along the present gradients, and delete them; the next pass repeats the last pass's dropout."""
        self.before = [parameter.detach().clone() for parameter in self.parameters]
        moved = [parameter for parameter in self.parameters if parameter.grad is not None]
        norms = [parameter.grad.float().norm() for parameter in moved if parameter.grad is not None]
        if norms:
            scale = self.radius / torch.stack(norms).norm().clamp_min(1e-12)
            for parameter in moved:
                parameter.add_(parameter.grad * scale)
                parameter.grad = None
        torch.set_rng_state(self.random[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.random[1], self.device)

    @torch.no_grad()
    def descend(self) -> None:
        """Go back to exactly the numbers before, if it has moved; gradients stay."""
        for parameter, numbers in zip(self.parameters, self.before, strict=bool(self.before)):
            parameter.copy_(numbers)


@contextmanager
def at_the_top(parameters: Iterable[nn.Parameter], radius: float, device: torch.device) -> Iterator[Top]:
    """Inside the block, take a first gradient, call :meth:`Top.climb`, and take a second gradient there."""
    top = Top(parameters, radius, device)
    try:
        yield top
    finally:
        top.descend()
