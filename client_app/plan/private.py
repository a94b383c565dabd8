"""DP-SGD: training that reveals no single example (Abadi et al., 2016; Poisson sampling, flat clipping).

For each step, every example is drawn with probability q. Each drawn example's gradient g_i over all that is trained is
clipped, and the optimiser gets ::

    (sum_i g_i min(1, C / ||g_i||) + sigma C N(0, I)) / (q n)

Draws and noise come from the operating system's randomness, anew for every execution: a plan that is carried out twice
draws twice, and is charged twice. Per-example gradients of linear layers (LoRA's A and B, heads) are Opacus's; if a
model's layers mix the examples of a batch, each example is computed alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from client_app.data.dataset import Dataset
from client_app.guard.noise import gaussian, uniform
from client_app.guard.privacy import Privacy, rate_of
from client_app.model.forward.padding import set_training
from client_app.model.personal import PersonalModel
from client_app.plan.optimizers import optimizer_of
from client_app.plan.progress import tick
from client_app.plan.schedules import rate_of as schedule_of
from client_app.plan.training import TrainingError, autocast, each_loss
from proto.fedalloy.v1 import plan_pb2, report_pb2

CHUNK = 16
"""Examples whose gradients are held at once."""
_CLOSE = 1e-3
"""If an example's gradient alone and in a batch differ relatively by more than this, the layers are not trusted."""
Place = tuple[nn.Linear, str, float]
"""A linear layer, ``weight`` or ``bias``, and the factor on the parameter there."""


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
        if not all(bool(parameter.isfinite().all()) for parameter in parameters.values()):
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


class ExampleGradients:
    """Gradients of each example's own loss, ``[b, ...]`` by parameter.

    Args:
        model: with a mixture active.
        parameters: those that are trained.
    """

    def __init__(self, model: PersonalModel, parameters: Sequence[nn.Parameter]) -> None:
        self.model = model
        self.parameters = list(parameters)
        self.places = places_of(model.module, self.parameters)
        self.together = self.places is not None
        self._checked = False

    def of(self, batch: Dataset) -> dict[nn.Parameter, Tensor]:
        """The gradients of a batch of one task."""
        if self.together:
            if not self._checked and len(batch) > 1:
                self._checked, self.together = True, self._agrees(batch)
            found = self._in_company(batch) if self.together else None
            if found is not None:
                return found
            self.together = False
            logging.getLogger("flwr").warning("examples cannot be told apart in this model's layers: one at a time")
        return self.one_by_one(batch)

    def one_by_one(self, batch: Dataset) -> dict[nn.Parameter, Tensor]:
        """The same by autograd, each example alone: the reference for the faster way."""
        rows = [self._alone(batch.batch(torch.tensor([index]))) for index in range(len(batch))]
        return {p: torch.stack([row[i] for row in rows]) for i, p in enumerate(self.parameters)}

    def _alone(self, example: Dataset) -> list[Tensor]:
        with autocast(self.model.device):
            loss = each_loss(self.model, example).sum()
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g.float() for p, g in zip(self.parameters, found, strict=True)]

    def _agrees(self, batch: Dataset) -> bool:
        """Whether the first example's gradient is the same alone and in the batch, so that no layer mixes examples.

        This is done without dropout, which would differ for an example alone.
        """
        module, first = self.model.module, torch.tensor([0])
        training = module.training
        module.eval()
        alone = self._alone(batch.batch(first))
        found = self._in_company(batch)
        set_training(module, training)
        if found is None:
            return False
        norm = torch.stack([gradient.square().sum() for gradient in alone]).sum().sqrt()
        far = torch.stack([(found[p][0] - g).square().sum() for p, g in zip(self.parameters, alone, strict=True)])
        return bool(far.sum().sqrt() <= _CLOSE * norm + 1e-7)

    def _in_company(self, batch: Dataset) -> dict[nn.Parameter, Tensor] | None:
        """By Opacus's rule for linear layers; None if a layer's input has another first dimension."""
        assert self.places is not None
        with _watched(self.places, len(batch)) as found:
            with autocast(self.model.device):
                loss = each_loss(self.model, batch).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        for parameter in self.parameters:
            parameter.grad = None
        each: dict[nn.Parameter, Tensor] = {}
        for parameter in self.parameters:
            seen = found.get(parameter, torch.zeros(len(batch), *parameter.shape, device=parameter.device))
            if seen is None:
                return None
            each[parameter] = seen
        return each


def places_of(module: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, Place] | None:
    """Where each parameter acts in a linear layer; None if one acts anywhere else (a gate, say)."""
    wanted, found = set(parameters), dict[nn.Parameter, Place]()
    for layer in module.modules():
        if not isinstance(layer, nn.Linear):
            continue
        for kind in ("weight", "bias"):
            if parametrize.is_parametrized(layer, kind):
                parametrizations: Any = layer.parametrizations
                differences = parametrizations[kind][0]
                for slot, parameter in differences.by_slot.items():
                    share = differences.coefficients.get(slot, 0.0)
                    if parameter in wanted and isinstance(share, float | int):
                        found[parameter] = (layer, kind, float(share))
            elif getattr(layer, kind) in wanted if getattr(layer, kind) is not None else False:
                found[getattr(layer, kind)] = (layer, kind, 1.0)
    return found if wanted <= found.keys() else None


@contextmanager
def _watched(places: Mapping[nn.Parameter, Place], size: int) -> Iterator[dict[nn.Parameter, Tensor | None]]:
    """Inside the block, backward passes fill in each example's gradients; None if a layer has no row for each."""
    from opacus.grad_sample.linear import compute_linear_grad_sample

    found: dict[nn.Parameter, Tensor | None] = {}
    by_layer: dict[nn.Linear, list[tuple[nn.Parameter, str, float]]] = {}
    for parameter, (layer, kind, share) in places.items():
        by_layer.setdefault(layer, []).append((parameter, kind, share))

    def seen(layer: nn.Linear, inputs: tuple[Tensor, ...], gradient: Tensor) -> None:
        for parameter, kind, share in by_layer[layer]:
            if inputs[0].shape[0] != size or gradient.shape[0] != size:
                found[parameter] = None
                continue
            like: Any = SimpleNamespace(weight=SimpleNamespace(requires_grad=False), bias=None)
            setattr(like, kind, parameter)
            each = share * compute_linear_grad_sample(like, [inputs[0].float()], gradient.float())[parameter]
            before = found.get(parameter, each.new_zeros(()))
            found[parameter] = None if before is None else before + each

    def watch(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            kept = tuple(tensor.detach() for tensor in inputs)
            output.register_hook(partial(seen, layer, kept))  # type: ignore[no-untyped-call]

    handles = [layer.register_forward_hook(watch) for layer in by_layer]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
