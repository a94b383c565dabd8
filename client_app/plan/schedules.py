"""How the learning rate changes over a step's optimiser steps; a schedule may span the steps of many rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from client_app.plan.names import PlanError
from proto.fedalloy.v1 import plan_pb2

_NAMES = {
    plan_pb2.SCHEDULE_UNSPECIFIED: "constant_with_warmup",
    plan_pb2.SCHEDULE_CONSTANT: "constant_with_warmup",
    plan_pb2.SCHEDULE_LINEAR: "linear",
    plan_pb2.SCHEDULE_COSINE: "cosine",
    plan_pb2.SCHEDULE_POLYNOMIAL: "polynomial",
    plan_pb2.SCHEDULE_INVERSE_SQRT: "inverse_sqrt",
    plan_pb2.SCHEDULE_COSINE_WITH_RESTARTS: "cosine_with_restarts",
}
_MORE: dict[int, dict[str, float]] = {
    plan_pb2.SCHEDULE_POLYNOMIAL: {"lr_end": 0.0, "power": 2.0},
    plan_pb2.SCHEDULE_COSINE_WITH_RESTARTS: {"num_cycles": 3},
}
"""Arguments without which these schedules would be the same as the linear and the cosine one."""


def rate_of(step: plan_pb2.TrainStep) -> Callable[[int], float]:
    """The factor on the learning rate, by the number of optimiser steps that are done in this step.

    Raises:
        PlanError: an unknown schedule, or one that ends before this step does.
    """
    done, total = int(step.schedule_done), int(step.schedule_total) or int(step.steps)
    if step.schedule not in _NAMES:
        raise PlanError(f"schedule {step.schedule}, expected one of {plan_pb2.Schedule.keys()}")
    if done + step.steps > total or step.warmup_steps > total:
        raise PlanError(
            f"{step.steps} steps after {done}, {step.warmup_steps} of them for the warm-up, in a schedule of {total}"
        )
    if _NAMES[step.schedule] == "constant_with_warmup" and not step.warmup_steps:
        return lambda now: 1.0
    from transformers import get_scheduler  # slow to import, and a constant rate needs none

    nobody = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule: Any = get_scheduler(
        _NAMES[step.schedule],
        nobody,
        num_warmup_steps=int(step.warmup_steps),
        num_training_steps=total,
        scheduler_specific_kwargs=_MORE.get(step.schedule),
    )
    return lambda now: float(schedule.lr_lambdas[0](done + now))
