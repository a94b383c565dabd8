"""Training of a personal model on a client's data; deterministic for a seed on the CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from client_app.data.arrival import StreamedDataset
from client_app.data.dataset import ClientData, Dataset
from client_app.data.targets import mean_of, means_of
from client_app.kinds import kind_of, targets_in
from client_app.model.forward.packing import packed
from client_app.model.forward.padding import set_training
from client_app.model.personal import PersonalModel
from client_app.plan.mixtures import activate
from client_app.plan.names import PlanError
from client_app.plan.optimizers import optimizer_of, restore, state_of
from client_app.plan.progress import tick
from client_app.plan.schedules import rate_of
from client_app.plan.seeds import batches, by_length, seed_of_step
from client_app.plan.sharpness import at_the_top, require_radius
from client_app.plan.task_losses import TaskLosses
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter, all_finite
from fedalloy_adapters.layout import Factor
from fedalloy_adapters.parts import layout_of_part
from proto.fedalloy.v1 import plan_pb2, report_pb2


class TrainingError(ValueError):
    """Training produced a loss that is not a number, or there is nothing to evaluate."""

    @property
    def told(self) -> str:
        """The whole message: it is about the plan's own numbers."""
        return str(self)


def set_up_torch(threads: int = 1) -> torch.device:
    """Use CUDA if available, else the CPU with this many threads; on the CPU results are deterministic."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Do not fill memory with NaN before it is written: that takes time, and nothing reads it before.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.device("cpu")


def accelerator() -> str:
    """The name of this process's GPU, the same in all processes; empty without a GPU."""
    return f"cuda-{torch.cuda.get_device_properties(0).uuid}" if torch.cuda.is_available() else ""


class Teacher(Protocol):
    """A second target for a model in training (:mod:`client_app.plan.distillation`)."""

    everywhere: bool
    """Whether it also teaches at positions without a label."""
    label_weight: float
    """The weight of the labels' own loss beside the teacher's."""

    def outputs(self, batch: Dataset) -> Tensor | None:
        """The teacher's answer to a batch; None if there is nothing to learn from it."""

    def loss(self, batch: Dataset, logits: Tensor, outputs: Tensor, *, counted: bool = True) -> Tensor:
        """Weighted distance of the student's logits from the teacher's outputs; ``counted`` ones are reported."""


def carry_out(bench: Workbench, step: plan_pb2.TrainStep, teacher: Teacher | None = None) -> report_pb2.TrainResult:
    """Train the step's slots inside its mixture, with a teacher if there is one.

    Raises:
        PlanError: the step's numbers, slots, fold or attribution do not fit.
        TrainingError: training diverged, and the plan does not say to go on.
    """
    if step.steps < 1 or step.batch_size < 1 or not step.learning_rate > 0:
        raise PlanError(
            f"{step.steps} steps of {step.batch_size} examples at learning rate {step.learning_rate:g}; "
            "expected at least one of each and a positive rate"
        )
    require_radius(step)
    data = bench.split(step.split)
    if step.HasField("fold"):
        data = bench.fold(data, step.fold, step.split)
    activate(bench, step.mixture)
    parameters, anchor = _trained(bench, step)
    seed = seed_of_step(bench.plan, bench.index, step, replaced=bench.replaced)
    weights = _attributed(bench, step) if step.attributed_to else None
    optimiser = optimizer_of(step, parameters)
    if step.keep_optimizer:
        restore(optimiser, parameters, _kept(bench, step.slots))
    order = _order(bench, step, data)
    try:
        if bench.private is not None:
            result = bench.private.train(bench.model, step, parameters, data, anchor, optimiser)
        else:
            result = train(bench.model, step, parameters, data, seed, anchor, teacher, weights, order, optimiser)
    except TrainingError:
        if not step.keep_on_divergence:
            raise
        bench.slots.losses.pop(step.record, None)
        return report_pb2.TrainResult(diverged=True)
    _name_tasks(result, bench.data)
    if step.record and bench.private is None:
        share = step.record_batch_share
        found = {task: loss.batch_share if share else loss.mean for task, loss in result.task_losses.items()}
        bench.slots.losses[step.record] = bench.slots.losses.get(step.record, {}) | found
    for slot in step.slots:
        bench.slots.set_whole(slot, bench.model.read(slot))
        if step.keep_optimizer:
            left, prefix = state_of(optimiser, parameters), f"{slot}:"
            mine = {name.removeprefix(prefix): t for name, t in left.items() if name.startswith(prefix)}
            bench.slots.set_optimizer(slot, {**bench.slots.optimizer(slot), **mine})
    return result


def _kept(bench: Workbench, slots: Iterable[str]) -> dict[str, Tensor]:
    """These slots' optimiser states, by slot, entry name and kind of state."""
    return {f"{slot}:{name}": tensor for slot in slots for name, tensor in bench.slots.optimizer(slot).items()}


def _trained(bench: Workbench, step: plan_pb2.TrainStep) -> tuple[dict[str, nn.Parameter], dict[str, Tensor] | None]:
    """The trained parameters by slot and entry name, and the values that the step pulls them to, if any."""
    parameters: dict[str, nn.Parameter] = {}
    anchor: dict[str, Tensor] = {}
    for slot in step.slots:
        layout = bench.slots[slot].layout
        is_gates = any(entry.factor is Factor.GATE for entry in layout.entries)
        part = layout if is_gates else layout_of_part(layout, step.part)
        own = bench.model.own_layout if not is_gates else None
        for trained in (part, own):
            for name, parameter in bench.model.trainable(slot, trained).items() if trained is not None else ():
                parameters[f"{slot}:{name}"] = parameter
        if step.HasField("proximal") and not is_gates:
            pulled = tensors_by_entry(bench.slots[step.proximal.slot].part(part), bench.model.device)
            anchor |= {f"{slot}:{name}": tensor for name, tensor in pulled.items()}
    if not parameters:
        raise PlanError("nothing to train: no slot is named")
    gates = {term.gate.slot for term in step.mixture.terms if term.HasField("gate")}
    missing = set(step.slots) - {term.slot for term in step.mixture.terms} - gates
    if missing:
        raise PlanError(f"slot {sorted(missing)[0]!r} is to be trained but is not in the mixture")
    return parameters, anchor or None


def _attributed(bench: Workbench, step: plan_pb2.TrainStep) -> Tensor:
    """How much each example counts, by an attribute step before this one."""
    found = bench.attributions.get(step.attributed_to)
    if found is None or step.HasField("fold") or len(found) != len(bench.split(step.split)):
        raise PlanError(f"the training split was not attributed to slot {step.attributed_to!r}")
    return found


def _order(bench: Workbench, step: plan_pb2.TrainStep, data: Dataset) -> list[Tensor] | None:
    """The batches of data that arrive over the rounds."""
    if not isinstance(data, StreamedDataset):
        return None
    plans = plan_pb2.Plan(seed=bench.plan.seed, client_id=bench.plan.client_id)

    def seed_in(round_: int) -> int:
        plans.round = round_
        return seed_of_step(plans, bench.index, step, replaced=bench.replaced)

    return data.batches(step.batch_size, step.steps, bench.plan.round, seed_in)


def _name_tasks(result: report_pb2.TrainResult, data: ClientData) -> None:
    """Name the only task of a client, because its batches have no task's name."""
    if "" in result.task_losses:
        result.task_losses[data.task].CopyFrom(result.task_losses[""])
        del result.task_losses[""]


def train(
    model: PersonalModel,
    step: plan_pb2.TrainStep,
    parameters: Mapping[str, nn.Parameter],
    data: Dataset,
    seed: int,
    anchor: Mapping[str, Tensor] | None = None,
    teacher: Teacher | None = None,
    example_weights: Tensor | None = None,
    order: Iterable[Tensor] | None = None,
    optimiser: torch.optim.Optimizer | None = None,
) -> report_pb2.TrainResult:
    """Optimise ``parameters`` for ``step.steps`` batches.

    A batch with examples of several tasks has the loss ``sum over tasks of (n_task / n) x the task's mean loss``.

    Args:
        model: with the mixture active.
        step: hyper-parameters.
        parameters: those to train, by entry name.
        data: training split.
        seed: decides batches and dropout.
        anchor: the values that ``step.proximal`` pulls to, by entry name.
        teacher: its outputs are a second target.
        example_weights: how much each example counts, ``[n]``, if ``data`` has one task.
        order: the batches' indices; None: pass after pass over the data, shuffled.
        optimiser: the parameters' optimiser; None: a fresh one, as the step says.

    Raises:
        TrainingError: the loss, or at the end a trained number, is NaN or infinite.
    """
    started = time.monotonic()
    torch.manual_seed(seed)
    optimiser = optimizer_of(step, parameters) if optimiser is None else optimiser
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate_of(step))
    set_training(model.module)
    losses: list[float] = []
    by_task = TaskLosses(step.batch_size)
    objective = _Objective(model, step, parameters, data, anchor, teacher, example_weights)
    for indices in _drawn(model, step, data, seed, order):
        tick("train", len(losses), step.steps, losses[-1] if losses else None)
        optimiser.zero_grad()
        loss, found = objective.gradients(indices)
        by_task.add(found)
        if step.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters.values(), step.max_grad_norm)
        optimiser.step()
        schedule.step()
        losses.append(loss)
        if not math.isfinite(loss):
            raise _diverged(f"training loss became {loss} at step {len(losses)} of {step.steps}", step)
    # No later loss would show that the last step has spoilt a number.
    if not all(map(all_finite, parameters.values())):
        raise _diverged(f"numbers that are not finite after the last of {step.steps} steps", step)
    model.module.eval()
    return _result(losses, by_task, time.monotonic() - started)


def _drawn(
    model: PersonalModel, step: plan_pb2.TrainStep, data: Dataset, seed: int, order: Iterable[Tensor] | None
) -> Iterable[Tensor]:
    """The batches' indices."""
    drawn = order or batches(len(data), step.batch_size, step.steps, seed)
    if model.group_by_length and data.lengths is not None:
        drawn = by_length(drawn, data.lengths, seed)
    return drawn


def _result(losses: list[float], by_task: TaskLosses, seconds: float) -> report_pb2.TrainResult:
    return report_pb2.TrainResult(
        steps=len(losses),
        examples=sum(by_task.examples.values()),
        first_loss=losses[0],
        mean_loss=sum(losses) / len(losses),
        last_loss=losses[-1],
        seconds=seconds,
        task_losses=by_task.to_proto(),
    )


def _diverged(what: str, step: plan_pb2.TrainStep) -> TrainingError:
    return TrainingError(f"{what}; lower learning-rate (now {step.learning_rate:g}) or set max-grad-norm")


@dataclass(frozen=True)
class _Objective:
    """What :func:`train` minimises; its arguments."""

    model: PersonalModel
    step: plan_pb2.TrainStep
    parameters: Mapping[str, nn.Parameter]
    data: Dataset
    anchor: Mapping[str, Tensor] | None
    teacher: Teacher | None
    example_weights: Tensor | None

    def gradients(self, indices: Tensor) -> tuple[float, dict[str, tuple[int, float]]]:
        """Compute one batch's gradients; returns what :meth:`backward` returns for the present numbers."""
        if not self.step.sharpness_radius:
            return self.backward(indices)
        with at_the_top(self.parameters.values(), self.step.sharpness_radius, self.model.device) as top:
            found = self.backward(indices)
            top.climb()
            self.backward(indices, counted=False)
        return found

    def backward(self, indices: Tensor, *, counted: bool = True) -> tuple[float, dict[str, tuple[int, float]]]:
        """Add one batch's gradients by micro-batches; returns its loss, and examples and mean loss by task."""
        loss, found = 0.0, dict[str, tuple[int, float]]()
        chunks = torch.split(indices, self.model.micro_batch or len(indices))
        parts = [part for chosen in chunks for part in self.data.by_task(chosen)]
        weights = self.example_weights
        if weights is not None and len(parts) != len(chunks):
            raise TrainingError("examples of several tasks in one batch cannot be weighed one by one")
        shares = _shares(parts)
        for position, part in enumerate(parts):
            counts = None if weights is None else weights[chunks[position]]
            objective, logits, taught = self._losses(part, counts)
            in_batch, in_task = shares[position]
            count, so_far = found.get(part.task, (0, 0.0))
            found[part.task] = count + len(part), so_far + in_task * float(objective.detach())
            if len(parts) > 1:  # gradients of the parts add up to that of the whole batch
                objective = objective * (in_batch * in_task)
            loss += float(objective.detach())
            if self.teacher is not None and self.teacher.label_weight != 1.0:
                objective = objective * self.teacher.label_weight
            if self.anchor is not None and position == 0:
                objective = objective + self.step.proximal.mu / 2 * self._distance(self.anchor)
            if self.teacher is not None and logits is not None and taught is not None:
                objective = objective + self.teacher.loss(part, logits, taught, counted=counted) * in_task
            objective.backward()  # type: ignore[no-untyped-call]
        return loss, found

    def _losses(self, part: Dataset, counts: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The task's loss; with a teacher, also the logits and the teacher's outputs."""
        taught = self.teacher.outputs(part) if self.teacher is not None else None
        with autocast(self.model.device):
            logits = None
            if self.teacher is not None:
                logits = logits_of(self.model, part, everywhere=self.teacher.everywhere)
            return batch_loss(self.model, part, logits, counts), logits, taught

    def _distance(self, anchor: Mapping[str, Tensor]) -> Tensor:
        """Squared distance of the trained parameters from the anchor."""
        return torch.stack([(self.parameters[name] - value).square().sum() for name, value in anchor.items()]).sum()


def tensors_by_entry(adapter: Adapter, device: torch.device) -> dict[str, Tensor]:
    """An adapter's tensors by entry name, on a device."""
    return {entry.name: tensor.to(device) for entry, tensor in adapter.items()}


def batch_loss(
    model: PersonalModel, batch: Dataset, logits: Tensor | None = None, example_weights: Tensor | None = None
) -> Tensor:
    """What training minimises on a batch of one task.

    Args:
        model: with a mixture active.
        batch: examples of one task.
        logits: those of the batch (:func:`logits_of`), if they are also needed for something else.
        example_weights: how much each example counts, ``[b]``; None: the mean of :func:`mean_loss`.
    """
    if model.packing and logits is None and example_weights is None and not model.looks_at_whole_texts:
        batch = packed(batch)
    labels, kind = batch.labels.to(model.device), kind_of(batch.kind)
    if logits is None and kind.generative:
        losses = model.at_targets(model.inputs(batch.inputs), labels, batch.task).losses()
        if example_weights is None:
            return mean_of(losses, labels)
        each = means_of(losses, labels)
    else:
        logits = logits_of(model, batch) if logits is None else logits
        if example_weights is None:
            return kind.mean_loss(logits, labels, model.label_weights.get(batch.task))
        each = kind.example_losses(logits, labels)
    return (each * example_weights.to(each)).mean()


def each_loss(model: PersonalModel, batch: Dataset) -> Tensor:
    """Each example's own loss, ``[b]``: over its own targets if it has several."""
    labels, kind = batch.labels.to(model.device), kind_of(batch.kind)
    if kind.generative:
        return means_of(model.at_targets(model.inputs(batch.inputs), labels, batch.task).losses(), labels)
    return kind.example_losses(logits_of(model, batch), labels)


def logits_of(model: PersonalModel, batch: Dataset, *, everywhere: bool = False) -> Tensor:
    """The model's answer to a batch, on its device.

    ``[b, C]``, ``[n, V]`` at the n targets of generated texts, or whatever else the kind of task says.

    Args:
        model: with a mixture active.
        batch: examples of one task.
        everywhere: ``[b, L, V]`` instead, at targets and elsewhere.
    """
    return kind_of(batch.kind).outputs(model, batch, everywhere=everywhere)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 arithmetic on CUDA; the CPU computes in the numbers' own type."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _shares(parts: list[Dataset]) -> list[tuple[float, float]]:
    """For each part of a batch: its task's share of the examples, and its own share of the task's targets."""
    examples: dict[str, int] = {}
    targets: dict[str, int] = {}
    for part in parts:
        examples[part.task] = examples.get(part.task, 0) + len(part)
        targets[part.task] = targets.get(part.task, 0) + targets_in(part)
    total = sum(examples.values())
    return [(examples[p.task] / total, targets_in(p) / max(targets[p.task], 1)) for p in parts]
