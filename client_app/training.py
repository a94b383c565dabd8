"""Training of a personal model on a client's data; deterministic for a seed on the CPU."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from adapters.adapter import Adapter
from adapters.layout import factor_from_proto
from client_app.data import Dataset
from client_app.model import PersonalModel
from client_app.progress import tick
from client_app.tasks import mean_loss, targets_in
from proto.fedalloy.v1 import plan_pb2, report_pb2


class TrainingError(ValueError):
    """Training produced a loss that is not a number, or there is nothing to evaluate."""


def set_up_torch() -> torch.device:
    """CUDA where there is one; else the CPU with one thread (clients share cores). Deterministic on the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    return torch.device("cpu")


def accelerator() -> str:
    """The name that all processes have for the GPU that this one works on; empty without one."""
    return f"cuda-{torch.cuda.get_device_properties(0).uuid}" if torch.cuda.is_available() else ""


def seed_of(*parts: object) -> int:
    """A 63-bit seed that differs wherever any part differs."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def batches(examples: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices ``[b]`` of ``steps`` batches: pass after pass over the examples, each in a new random order.

    The last batch of a pass may be smaller; with fewer examples than ``batch_size`` every batch is all of them.
    """
    generator = torch.Generator().manual_seed(seed)
    position, order = examples, torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if position >= examples:
            position, order = 0, torch.randperm(examples, generator=generator)
        yield order[position : position + batch_size]
        position += batch_size


def train(
    model: PersonalModel,
    step: plan_pb2.TrainStep,
    parameters: Mapping[str, nn.Parameter],
    data: Dataset,
    seed: int,
    anchor: Mapping[str, Tensor] | None = None,
) -> report_pb2.TrainResult:
    """AdamW on ``parameters`` for ``step.steps`` batches; the optimiser starts fresh.

    Args:
        model: with the mixture active.
        step: hyper-parameters.
        parameters: what is optimised, by entry name.
        data: training split.
        seed: decides batches and dropout.
        anchor: the values that ``step.proximal`` pulls to, by entry name.

    Raises:
        TrainingError: the loss became NaN or infinite.
    """
    started = time.monotonic()
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(_groups(step, parameters), lr=step.learning_rate, weight_decay=step.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _schedule(step))
    model.module.train()
    losses: list[float] = []
    for indices in batches(len(data), step.batch_size, step.steps, seed):
        tick("train", len(losses), step.steps)
        optimiser.zero_grad()
        loss = 0.0
        parts = [data.batch(part) for part in torch.split(indices, model.micro_batch or len(indices))]
        targets = [targets_in(part) for part in parts]
        for position, part in enumerate(parts):
            with autocast(model.device):
                objective = mean_loss(part.kind, logits_of(model, part), part.labels.to(model.device))
            if len(parts) > 1:  # gradients of the parts add up to that of the whole batch
                objective = objective * (targets[position] / max(sum(targets), 1))
            loss += float(objective.detach())
            if anchor is not None and position == 0:
                pull = torch.stack([(parameters[name] - value).square().sum() for name, value in anchor.items()]).sum()
                objective = objective + step.proximal.mu / 2 * pull
            objective.backward()  # type: ignore[no-untyped-call]
        if step.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters.values(), step.max_grad_norm)
        optimiser.step()
        schedule.step()
        losses.append(loss)
        if not math.isfinite(losses[-1]):
            raise TrainingError(
                f"training loss became {losses[-1]} at step {len(losses)} of {step.steps}; lower learning-rate "
                f"(now {step.learning_rate:g}) or set max-grad-norm"
            )
    model.module.eval()
    return report_pb2.TrainResult(
        steps=len(losses),
        examples=min(step.steps * step.batch_size, len(data) * math.ceil(step.steps * step.batch_size / len(data))),
        first_loss=losses[0],
        mean_loss=sum(losses) / len(losses),
        last_loss=losses[-1],
        seconds=time.monotonic() - started,
    )


def tensors_by_entry(adapter: Adapter, device: torch.device) -> dict[str, Tensor]:
    """An adapter's tensors by entry name, on a device."""
    return {entry.name: tensor.to(device) for entry, tensor in adapter.items()}


def logits_of(model: PersonalModel, batch: Dataset) -> Tensor:
    """The model's logits for a batch, on its device."""
    return model.logits(model.inputs(batch.inputs))


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 arithmetic on CUDA; the CPU computes as the numbers are."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _groups(step: plan_pb2.TrainStep, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """AdamW's groups: parameters by the factor in their names, each with its scale of the learning rate."""
    scales = {str(factor_from_proto(item.factor)): item.scale for item in step.rate_scales}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(scales.get(name.rsplit(".", 1)[-1], 1.0), []).append(parameter)
    return [{"params": found, "lr": scale * step.learning_rate} for scale, found in groups.items()]


def _schedule(step: plan_pb2.TrainStep) -> Callable[[int], float]:
    total = step.steps
    if step.schedule == plan_pb2.SCHEDULE_LINEAR:
        return lambda done: max(0.0, 1 - done / total)
    if step.schedule == plan_pb2.SCHEDULE_COSINE:
        return lambda done: 0.5 * (1 + math.cos(math.pi * min(done / total, 1.0)))
    return lambda done: 1.0
