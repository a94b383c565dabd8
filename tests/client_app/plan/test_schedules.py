"""Learning rates by optimiser step, against transformers' own schedulers run from the beginning to the end."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from client_app.plan.names import PlanError
from client_app.plan.schedules import rate_of
from proto.fedalloy.v1 import plan_pb2

KINDS = {
    "constant_with_warmup": plan_pb2.SCHEDULE_CONSTANT,
    "linear": plan_pb2.SCHEDULE_LINEAR,
    "cosine": plan_pb2.SCHEDULE_COSINE,
    "inverse_sqrt": plan_pb2.SCHEDULE_INVERSE_SQRT,
}


def theirs(name: str, warmup: int, total: int) -> list[float]:
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(name, optimiser, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(total):
        rates.append(float(schedule.get_last_lr()[0]))
        optimiser.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", KINDS)
def test_three_rounds_have_the_rates_of_one_training_of_as_many_steps(name: str) -> None:
    ours = []
    for done in (0, 5, 10):
        step = plan_pb2.TrainStep(steps=5, schedule=KINDS[name], warmup_steps=4, schedule_done=done, schedule_total=15)
        ours += [rate_of(step)(now) for now in range(5)]
    assert ours == pytest.approx(theirs(name, 4, 15), abs=1e-12)


def test_without_a_run_the_schedule_is_the_steps_own() -> None:
    linear = rate_of(plan_pb2.TrainStep(steps=4, schedule=plan_pb2.SCHEDULE_LINEAR))
    assert [linear(now) for now in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert rate_of(plan_pb2.TrainStep(steps=4))(3) == 1.0
    bent = rate_of(plan_pb2.TrainStep(steps=4, schedule=plan_pb2.SCHEDULE_POLYNOMIAL))
    assert [bent(now) for now in range(4)] == pytest.approx([1.0, 0.5625, 0.25, 0.0625])
    again = rate_of(plan_pb2.TrainStep(steps=6, schedule=plan_pb2.SCHEDULE_COSINE_WITH_RESTARTS))
    assert [again(now) for now in range(6)] == pytest.approx([1.0, 0.5] * 3)


@pytest.mark.parametrize(
    "step",
    [
        plan_pb2.TrainStep(steps=5, schedule_done=11, schedule_total=15),
        plan_pb2.TrainStep(steps=5, warmup_steps=6),
        plan_pb2.TrainStep(steps=5, schedule=99),  # type: ignore[arg-type]
    ],
)
def test_a_schedule_that_is_not_one_is_refused(step: plan_pb2.TrainStep) -> None:
    with pytest.raises(PlanError, match="schedule"):
        rate_of(step)
