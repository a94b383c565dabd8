"""DP-SGD: training that reveals no single example (Abadi et al., 2016; Poisson sampling, flat clipping).

For each step, every example is drawn with probability q. Each drawn example's gradient g_i over all that is trained is
clipped, and the optimiser gets ::

    (sum_i g_i min(1, C / ||g_i||) + sigma C N(0, I)) / (q n)

Draws and noise come from the operating system's randomness, anew for every execution: a plan that is carried out twice
draws twice, and is charged twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from client_app.data.dataset import Dataset
from client_app.guard.noise import gaussian, uniform
from client_app.guard.privacy import Privacy, rate_of
from client_app.model.forward.padding import set_training
from client_app.model.personal import PersonalModel
from client_app.plan.example_gradients import ExampleGradients
from client_app.plan.optimizers import optimizer_of
from client_app.plan.progress import tick
from client_app.plan.schedules import rate_of as schedule_of
from client_app.plan.training import TrainingError
from fedalloy_adapters.adapter import all_finite
from proto.fedalloy.v1 import plan_pb2, report_pb2

CHUNK = 16
"""Examples whose gradients are held at once."""


class PrivateTraining:
    """Carries out one plan's train steps if examples are private."""

    def __init__(self, privacy: Privacy, randomness: Callable[[], bytes] = lambda: os.urandom(32)) -> None:
        self.privacy = privacy
        self.randomness = randomness

    def train(
        self,
        model: PersonalModel,
        step: plan_pb2.TrainStep,
        parameters: Mapping[str, nn.Parameter],
        data: Dataset,
        anchor: Mapping[str, Tensor] | None = None,
        optimiser: torch.optim.Optimizer | None = None,
    ) -> report_pb2.TrainResult:
        """Like :func:`client_app.plan.training.train`, but private; ``step.max_grad_norm`` has no effect.

        Raises:
            TrainingError: at the end, a trained number is not finite.
        """
        started = time.monotonic()
        optimiser = optimizer_of(step, parameters) if optimiser is None else optimiser
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule_of(step))
        set_training(model.module)
        rate, bound = rate_of(int(step.batch_size), len(data)), self.privacy.max_grad_norm
        draw, noise = uniform(self.randomness()), gaussian(self.privacy.noise_multiplier * bound, self.randomness())
        torch.manual_seed(int.from_bytes(self.randomness()[:8], "little") >> 1)  # dropout
        gradients = ExampleGradients(model, list(parameters.values()))
        for done in range(step.steps):
            tick("train", done, step.steps)
            chosen = (draw(len(data)) < rate).nonzero().flatten()
            sums = clipped_sum(gradients, data, chosen, bound)
            for name, parameter in parameters.items():
                drawn = noise(parameter.shape).to(parameter.device)
                parameter.grad = (sums[parameter] + drawn) / (rate * len(data))
                if anchor is not None and name in anchor:
                    parameter.grad += step.proximal.mu * (parameter.detach() - anchor[name])
            optimiser.step()
            schedule.step()
        optimiser.zero_grad()
        if not all(map(all_finite, parameters.values())):
            raise TrainingError(f"numbers that are not finite after {step.steps} private steps; lower learning-rate")
        model.module.eval()
        return report_pb2.TrainResult(
            steps=step.steps,
            examples=round(step.steps * rate * len(data)),
            seconds=time.monotonic() - started,
            withheld=True,
        )


def clipped_sum(gradients: ExampleGradients, data: Dataset, chosen: Tensor, bound: float) -> dict[nn.Parameter, Tensor]:
    """Sums by parameter of the chosen examples' gradients, each scaled to the norm ``bound`` if it is longer.

    A gradient that is not finite counts as zero.
    """
    sums = {parameter: torch.zeros_like(parameter) for parameter in gradients.parameters}
    size = min(gradients.model.micro_batch or CHUNK, CHUNK)
    for indices in torch.split(chosen, size) if len(chosen) else ():
        for batch in data.by_task(indices):
            each = gradients.of(batch)
            squares = torch.stack([found.flatten(1).square().sum(1) for found in each.values()]).sum(0)
            share = (bound / squares.sqrt().clamp_min(1e-12)).clamp_max(1.0)
            sound = squares.isfinite()
            for parameter, found in each.items():
                kept = torch.where(sound.view(-1, *[1] * (found.dim() - 1)), found, 0.0)
                sums[parameter] += torch.einsum("b...,b->...", kept, torch.where(sound, share, 0.0))
    return sums
