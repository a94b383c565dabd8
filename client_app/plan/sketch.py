"""Sketches: a few rows of the gradient of a small frozen reference model on a client's data, with noise.

RELA of FedMosaic (arXiv 2506.11024) compares clients by the gradient of one weight of a model that all of them hold:
the MLP down-projection of the last layer, outside vision towers. The reference is the scenario's own, or else the
client's base model, without adapters. Nothing is clipped, so the noise sanitises but is not differential privacy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from client_app.data.dataset import Dataset
from client_app.guard.noise import Noise, gaussian, noise_key
from client_app.kinds import kind_of, mean_loss
from client_app.model.forward.padding import set_training
from client_app.model.module_roles import RoleError, last_down_projection, layer_of, outside_towers
from client_app.model.personal import PersonalModel
from client_app.plan.seeds import batches, seed_of
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Entry, Factor, Layout
from fedalloy_adapters.parts import layout_of_sketch
from proto.fedalloy.v1 import plan_pb2, report_pb2


class SketchError(ValueError):
    """The reference model lacks the parts that a sketch needs, or cannot score this client's labels."""


@dataclass(frozen=True)
class Sketch:
    """``state`` is the moving average from which the next round goes on; ``upload`` is what the server gets."""

    state: Adapter
    upload: Adapter
    examples: int
    norm: float


def carry_out(bench: Workbench, step: plan_pb2.SketchStep) -> report_pb2.SketchResult:
    """Take this round's sketch, keep its moving average in the step's slot, and send it.

    Raises:
        PlanError: the slot is sent twice.
        RoleError, SketchError: the reference model or the step does not fit.
    """
    started = time.monotonic()
    bench.require_unsent(step.slot)
    readings = bench.data.for_reference
    data = readings[step.split] if step.split in readings else bench.split(step.split)
    reference, common_seed = ReferenceModel(bench.model), bench.plan.seed
    noise = gaussian(step.noise, noise_key(bench.secret, bench.plan, bench.index))
    sketch = take_sketch(reference, step, data, bench.held(step.slot), bench.seed, common_seed, noise)
    bench.slots[step.slot] = sketch.state
    bench.upload(step.slot, sketch.upload, step.encoding)
    seconds = time.monotonic() - started
    return report_pb2.SketchResult(slot=step.slot, examples=sketch.examples, norm=sketch.norm, seconds=seconds)


class ReferenceModel:
    """The frozen model whose gradients make the sketches.

    Raises:
        RoleError: it has no MLP down-projection with a known name.
        SketchError: the down-projection is quantised.
    """

    def __init__(self, personal: PersonalModel) -> None:
        reference = personal.base.reference
        self.personal = personal if reference is None else None
        self.module: nn.Module = personal.module if reference is None else reference.model
        self.device = personal.device
        self.module.to(self.device)
        self.name = last_down_projection(self.module)
        layer = self.module.get_submodule(self.name)
        self.linear = layer if isinstance(layer, nn.Linear) else layer.get_submodule("base_layer")
        if not self.weight.is_floating_point():
            raise SketchError(f"{self.name!r} of the reference model is quantised, so it has no gradient")
        fingerprint = personal.base.fingerprint if reference is None else reference.fingerprint
        self.layout = Layout((Entry(self.name, Factor.GRADIENT, tuple(self.weight.shape)),), {}, fingerprint)

    @property
    def weight(self) -> nn.Parameter:
        """The down-projection's weight ``[d, f]``."""
        weight = self.linear.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def gradient(self, batch: Dataset, kind: plan_pb2.SketchGradient = plan_pb2.SKETCH_GRADIENT_EXACT) -> Tensor:
        """Gradient ``[d, f]`` of the mean cross-entropy on a batch; parameters and mode stay as they were.

        Raises:
            SketchError: a label that the reference model's head does not have, or no RMS norm for the diagonal kind.
        """
        with self._frozen():
            if kind == plan_pb2.SKETCH_GRADIENT_DIAGONAL:
                return self._diagonal(batch)
            self.weight.requires_grad_(True)
            return torch.autograd.grad(self._loss(batch), self.weight)[0].detach()

    def _loss(self, batch: Dataset) -> Tensor:
        dtype = self.weight.dtype
        inputs = {n: v.to(self.device, dtype if v.is_floating_point() else None) for n, v in batch.inputs.items()}
        task = {"task": batch.task} if batch.task else {}
        kind = kind_of(batch.kind)
        if not kind.probabilities or kind.own_inputs:
            raise SketchError(f"there are no sketches of gradients of {kind.name!r}")
        logits: Tensor = self.module(**inputs, **task).logits
        labels = batch.labels.to(self.device)
        if int(labels.max()) >= logits.shape[-1]:
            raise SketchError(
                f"the reference model scores {logits.shape[-1]} classes, but this client has the label "
                f"{int(labels.max())}"
            )
        return mean_loss(batch.kind, logits.float(), labels)

    def _diagonal(self, batch: Dataset) -> Tensor:
        """With the diagonal of the last RMS norm's Jacobian: the authors' closed form, without autograd below it."""
        modules = dict(self.module.named_modules())
        outside = [name for name in outside_towers(modules) if layer_of(name) is None]
        last = [modules[name] for name in outside if "RMSNorm" in type(modules[name]).__name__]
        if len(last) != 1:
            raise SketchError(f"the diagonal gradient needs one RMS norm after the layers, found {len(last)}")
        norm: Any = last[0]
        kept: dict[str, Tensor] = {}

        def before_down(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kept["u"] = inputs[0].detach()

        def after_norm(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            kept["h"], kept["z"] = inputs[0].detach(), output.detach().requires_grad_(True)
            return kept["z"]

        hooks = [self.linear.register_forward_pre_hook(before_down), norm.register_forward_hook(after_norm)]
        try:
            loss = self._loss(batch)
            above = torch.autograd.grad(loss, kept["z"])[0]
        finally:
            for hook in hooks:
                hook.remove()
        h = kept["h"]
        variance = h.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon
        diagonal = norm.weight * variance.rsqrt() * (1 - h.square() / (variance * h.shape[-1]))
        result: Tensor = (above * diagonal).flatten(0, -2).T @ kept["u"].flatten(0, -2)
        return result.detach()

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Inside the block, adapters are off and the model is in evaluation mode; afterwards all is as before."""
        training = self.module.training
        if self.personal is not None:
            self.personal.activate({})
        self.module.eval()
        try:
            yield
        finally:
            self.weight.requires_grad_(False)
            set_training(self.module, training)


def reference_layout(personal: PersonalModel) -> Layout | None:
    """The layout of the gradient behind this client's sketches; None for a model without a known down-projection."""
    try:
        return ReferenceModel(personal).layout
    except (RoleError, SketchError):
        return None


def take_sketch(
    reference: ReferenceModel,
    step: plan_pb2.SketchStep,
    data: Dataset,
    previous: Adapter | None,
    seed: int,
    common_seed: int,
    noise: Noise,
) -> Sketch:
    """One round's sketch: mean gradient of some batches, a subset of its rows, moving average, noise.

    Args:
        reference: the model.
        step: the plan's step.
        data: the split.
        previous: the moving average so far; if it is None or has another layout, a new one starts.
        seed: decides batches.
        common_seed: decides the rows; the same for all clients and rounds.
        noise: draws the noise that is added.

    Raises:
        SketchError: a count is zero, or more rows are asked for than there are.
    """
    d = reference.weight.shape[0]
    if step.batches < 1 or step.batch_size < 1 or not 1 <= step.row_count <= d or not 0 < step.new_weight <= 1:
        raise SketchError(
            f"{step.batches} batches of {step.batch_size}, {step.row_count} of {d} rows, new weight "
            f"{step.new_weight:g}: expected at least one of each, and a weight above 0 and at most 1"
        )
    layout = layout_of_sketch(reference.layout, step.row_count)
    rows = row_subset(d, step.row_count, step.rows, common_seed)
    total, clean = (torch.zeros(step.row_count, reference.weight.shape[1]) for _ in range(2))
    examples = 0
    for indices in batches(len(data), step.batch_size, step.batches, seed):
        gradient = _mean_gradient(reference, data.by_task(indices), step.gradient)[rows]
        clean += gradient
        total += gradient + noise(gradient.shape) if step.noise_on_gradients else gradient
        examples += len(indices)
    mean = Adapter(layout, (total / step.batches).reshape(-1))
    if previous is not None and previous.layout.digest == layout.digest:
        old = previous.vector
        mean = Adapter(layout, (1 - step.new_weight) * old + step.new_weight * mean.vector)
    upload = mean
    if not step.noise_on_gradients:
        upload = Adapter(layout, mean.vector + noise(mean.vector.shape))
    return Sketch(mean, upload, examples, float(clean.norm()) / step.batches)


def _mean_gradient(reference: ReferenceModel, batches_of_tasks: list[Dataset], kind: plan_pb2.SketchGradient) -> Tensor:
    """Of the examples of one batch, which may be of several tasks; float32 on the CPU."""
    count = sum(len(batch) for batch in batches_of_tasks)
    found = [reference.gradient(batch, kind).float().cpu() * (len(batch) / count) for batch in batches_of_tasks]
    return torch.stack(found).sum(dim=0)


def row_subset(rows: int, kept: int, which: plan_pb2.SketchRows, seed: int) -> Tensor:
    """Indices ``[kept]`` in rising order; the same for all with the same seed.

    Raises:
        SketchError: ``which`` is neither the first rows nor random ones.
    """
    if which == plan_pb2.SKETCH_ROWS_FIRST:
        return torch.arange(kept)
    if which != plan_pb2.SKETCH_ROWS_RANDOM:
        raise SketchError(f"unknown choice of rows {which}, expected the first or random ones")
    generator = torch.Generator().manual_seed(seed_of("sketch rows", seed))
    return torch.randperm(rows, generator=generator)[:kept].sort().values
