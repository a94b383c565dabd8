r"""Distillation: the distance of a student's outputs from a teacher's, as a second term of the training loss.

For one task's examples in a batch and a temperature T::

    KL:   T^2 sum_v p_v (log p_v - log q_v),   p = softmax(teacher / T), q = softmax(student / T)
    MSE:  mean_v (teacher_v - student_v)^2

over the last axis (classes, vocabulary), reduced over positions as the plan says. Hinton, Vinyals and Dean,
"Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from client_app.data.dataset import Dataset
from client_app.kinds import kind_of
from client_app.model.co_lora import Gate
from client_app.plan import training
from client_app.plan.ensembles import forward_of
from client_app.plan.mixtures import activate, terms_of
from client_app.plan.names import PlanError
from client_app.plan.training import autocast, logits_of
from client_app.plan.workbench import Workbench
from proto.fedalloy.v1 import plan_pb2, report_pb2


class DistillationError(ValueError):
    """A distillation step cannot be carried out."""


def carry_out(bench: Workbench, step: plan_pb2.DistillStep) -> report_pb2.DistillResult:
    """Train with a frozen mixture or ensemble of slots as the teacher.

    Raises:
        DistillationError: temperature, reduction or a weight is not valid.
        EnsembleError: the teacher's shares do not fit its slots, or the task's answers are not a distribution.
        PlanError: a slot would teach itself, or the train step does not fit.
        TrainingError: training diverged.
    """
    slots, coefficients = terms_of(step.teacher)
    if set(step.train.slots) & {*slots, *(item.slot for item in coefficients if isinstance(item, Gate))}:
        raise PlanError("a slot that is trained cannot be its own teacher")
    teacher = MixtureTeacher(_outputs_of(bench, step), step, bench.data.task)
    result = training.carry_out(bench, step.train, teacher)
    return report_pb2.DistillResult(train=result, divergences=teacher.divergences())


def divergence(
    teacher: Tensor,
    student: Tensor,
    loss: plan_pb2.DistillLoss,
    temperature: float = 1.0,
) -> Tensor:
    """The distance at every position: ``[..., V]`` and ``[..., V]`` to ``[...]``; the teacher gets no gradient."""
    if loss == plan_pb2.DISTILL_LOSS_MSE:
        return (teacher.detach().float() - student.float()).square().mean(dim=-1)
    if loss != plan_pb2.DISTILL_LOSS_KL:
        raise DistillationError(f"unknown distillation loss {loss}, expected one of {plan_pb2.DistillLoss.keys()}")
    log_p = torch.log_softmax(teacher.detach().float() / temperature, dim=-1)
    log_q = torch.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _outputs_of(bench: Workbench, step: plan_pb2.DistillStep) -> Callable[[Dataset], Tensor]:
    """A function that gives the teacher's logits for a batch while the model is the student; loads the teacher."""
    everywhere = step.reduction == plan_pb2.DISTILL_REDUCTION_EXAMPLE_MEAN
    slots, coefficients = terms_of(step.teacher)
    taught, model = dict(zip(slots, coefficients, strict=True)), bench.model
    if step.teacher.shares:
        forward = forward_of(bench, step.teacher, everywhere=everywhere)
    else:
        activate(bench, step.teacher)
        forward = partial(logits_of, model, everywhere=everywhere)

    def outputs(batch: Dataset) -> Tensor:
        with model.switched(taught), torch.no_grad(), autocast(model.device):
            return forward(batch)

    return outputs


class MixtureTeacher:
    """A frozen mixture as the teacher; see :class:`client_app.plan.training.Teacher`.

    Args:
        said: the teacher's logits for a batch, in evaluation mode and without gradients.
        step: weights, losses, temperature and reduction.
        default_task: the name of the client's only task, whose batches have no name.

    Raises:
        DistillationError: temperature, reduction or a weight is not valid.
    """

    def __init__(self, said: Callable[[Dataset], Tensor], step: plan_pb2.DistillStep, default_task: str) -> None:
        if not step.temperature > 0 or step.reduction not in (1, 2):
            raise DistillationError(
                f"temperature {step.temperature:g} and reduction {step.reduction}, expected a positive temperature and "
                f"one of {plan_pb2.DistillReduction.keys()[1:]}"
            )
        bad = [item.task for item in step.tasks if not 0 <= item.weight < float("inf")]
        if bad:
            raise DistillationError(f"the weight of task {bad[0]!r} is not a finite number of at least 0")
        self.label_weight = step.label_weight if step.HasField("label_weight") else 1.0
        if not 0 <= self.label_weight < float("inf"):
            raise DistillationError(f"label weight {self.label_weight:g}, expected a finite number of at least 0")
        self.said, self.step, self.default_task = said, step, default_task
        self.everywhere = step.reduction == plan_pb2.DISTILL_REDUCTION_EXAMPLE_MEAN
        self.tasks = {item.task: item for item in step.tasks}
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def outputs(self, batch: Dataset) -> Tensor | None:
        """The teacher's logits for a batch; None for a task of weight 0."""
        asked = self.tasks.get(batch.task or self.default_task)
        return None if asked is None or asked.weight == 0 else self.said(batch)

    def loss(self, batch: Dataset, logits: Tensor, outputs: Tensor, *, counted: bool = True) -> Tensor:
        """Weight times the mean divergence of a batch of one task."""
        task = batch.task or self.default_task
        found = self._reduced(batch, divergence(outputs, logits, self.tasks[task].loss, self.step.temperature))
        if counted:
            self.sums[task] = self.sums.get(task, 0.0) + float(found.detach())
            self.counts[task] = self.counts.get(task, 0) + 1
        return self.tasks[task].weight * found

    def divergences(self) -> dict[str, float]:
        """Mean over batches, by task."""
        return {task: self.sums[task] / self.counts[task] for task in self.sums}

    def _reduced(self, batch: Dataset, found: Tensor) -> Tensor:
        """Reduce ``[b]``, ``[targets]`` or (everywhere) ``[b, positions]`` to one number."""
        if kind_of(batch.kind).generative and self.everywhere:
            return found[:, -batch.labels.shape[1] :].sum() / len(batch)
        return found.sum() / max(found.numel(), 1)
