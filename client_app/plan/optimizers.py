"""Optimisers of train steps, and the state that is kept between two steps of the same slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from client_app.plan.names import PlanError
from fedalloy_adapters.factors import factor_from_proto
from proto.fedalloy.v1 import plan_pb2

_STATE = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), torch.optim.SGD: ("momentum_buffer",)}
"""An optimiser's state for a parameter; SGD without momentum has none."""


def optimizer_of(step: plan_pb2.TrainStep, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW or SGD for parameters by name, each with the learning rate of its factor.

    Raises:
        PlanError: an unknown optimiser, or a momentum that it does not have.
    """
    groups, rate = _groups(step, parameters), step.learning_rate
    if step.optimizer == plan_pb2.OPTIMIZER_SGD:
        if not 0 <= step.momentum < 1:
            raise PlanError(f"momentum {step.momentum:g}, expected at least 0 and below 1")
        return torch.optim.SGD(groups, lr=rate, momentum=step.momentum, weight_decay=step.weight_decay)
    if step.optimizer not in (plan_pb2.OPTIMIZER_UNSPECIFIED, plan_pb2.OPTIMIZER_ADAMW) or step.momentum:
        known = plan_pb2.Optimizer.keys()
        raise PlanError(f"optimizer {step.optimizer} with momentum {step.momentum:g}, expected one of {known}")
    # All parameters in one call give the same bits as a loop over them, which takes longer on CPUs.
    return torch.optim.AdamW(groups, lr=rate, weight_decay=step.weight_decay, foreach=True)


def restore(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]
) -> None:
    """Go on from what :func:`state_of` returned; a parameter that it lacks or no longer fits starts fresh.

    Args:
        optimizer: that of ``parameters``.
        parameters: the parameters by name.
        kept: the state by ``<name>/<what>``.
    """
    names = _STATE[type(optimizer)]
    for name, parameter in parameters.items():
        found = {what: kept[f"{name}/{what}"] for what in names if f"{name}/{what}" in kept}
        if len(found) == len(names) and all(t.shape in (parameter.shape, ()) for t in found.values()):
            optimizer.state[parameter] = {
                what: tensor.clone() if what == "step" else tensor.to(parameter.device, copy=True)
                for what, tensor in found.items()
            }


def state_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's state by ``<name>/<what>``: exact copies on the CPU."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for what in _STATE[type(optimizer)]:
            tensor = optimizer.state[parameter].get(what)
            if tensor is not None:
                found[f"{name}/{what}"] = tensor.detach().cpu().clone().contiguous()
    return found


def _groups(step: plan_pb2.TrainStep, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Parameters by the factor in their names, each with its scale of the learning rate."""
    scales = {str(factor_from_proto(item.factor)): item.scale for item in step.rate_scales}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(scales.get(name.rsplit(".", 1)[-1], 1.0), []).append(parameter)
    return [{"params": found, "lr": scale * step.learning_rate} for scale, found in groups.items()]
