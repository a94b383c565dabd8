"""Diagonal Fisher information of slots, from per-example gradients.

Empirical Fisher information is the mean, over examples, of the squared gradient of one example's loss at its own label.
It is not the square of a batch's mean gradient. Only sums over modules are reported, a few numbers each, never the
diagonal itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from client_app.data.dataset import Dataset, MixedDataset
from client_app.kinds import example_losses, kind_of
from client_app.model.personal import PersonalModel
from client_app.plan.names import PlanError
from client_app.plan.progress import tick
from client_app.plan.seeds import batches
from client_app.plan.training import each_loss, logits_of
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor, Layout
from proto.fedalloy.v1 import plan_pb2, report_pb2

DEFAULT_GRADIENT_BYTES = 2**28
MAX_CHUNK = 32
"""Examples at once, whatever the bound on gradients allows: activations need memory, too."""
MAX_TOKENS = 1024
"""Tokens of texts at once, padding included, for the same reason; at least one text."""
_COPIES = 8
"""Copies of a chunk's gradients at the peak of memory: for both slots, as computed, flat, and squared."""
TEXT_INPUTS = frozenset({"input_ids", "attention_mask"})
MAX_DAMPINGS = 64
MAX_DROPPED = 0.1
"""Largest share of examples whose gradients may be not finite."""


class FisherError(ValueError):
    """There are no usable examples, or too many gradients are not finite."""


@dataclass(frozen=True)
class Moments:
    """Mean squared gradients ``[P]`` of two slots, and the mean of their products, over the same examples."""

    first: Tensor
    second: Tensor
    product: Tensor
    samples: int
    dropped: int


def carry_out(bench: Workbench, step: plan_pb2.FisherStep) -> report_pb2.FisherResult:
    """Compare two slots by their Fisher information, and keep the diagonals if the plan says so.

    Raises:
        FisherError: there is no example, or too many gradients are not finite.
        PlanError: samples or damping make no sense, or a slot has another layout than the client.
    """
    dampings = [step.relative_damping, *step.more_dampings]
    if step.samples < 1 or len(dampings) > MAX_DAMPINGS or not all(damping >= 0 for damping in dampings):
        raise PlanError(
            f"{step.samples} samples and damping {', '.join(f'{damping:g}' for damping in dampings[:8])}; expected one "
            f"sample, no damping below 0, and at most {MAX_DAMPINGS} of them"
        )
    layout = bench.model.layout
    pair = tuple(bench.slots[slot] for slot in (step.first, step.second))
    for slot, adapter in zip((step.first, step.second), pair, strict=True):
        if adapter.layout.digest != layout.digest:
            raise PlanError(f"slot {slot!r} has {layout.describe_difference(adapter.layout)}")
        bench.model.load(slot, bench.slots.whole(slot))
    found = moments(
        bench.model,
        (step.first, step.second),
        layout,
        bench.split(step.split),
        samples=step.samples,
        seed=bench.seed,
        max_bytes=step.max_bytes or DEFAULT_GRADIENT_BYTES,
    )
    damping = damping_of(found, step.relative_damping)
    blind = (found.first + found.second + damping == 0).float()  # without information: equal precisions
    for slot, information in ((step.keep_first, found.first), (step.keep_second, found.second)):
        if slot:
            bench.slots[slot] = Adapter(layout, information + damping + blind)
    reported = result(pair, found, damping, in_delta_space=step.in_delta_space)
    for relative in step.more_dampings:
        other = damping_of(found, relative)
        sums = result(pair, found, other, in_delta_space=step.in_delta_space)
        reported.more.add(
            relative_damping=relative,
            damping=other,
            variance_first=sums.variance_first,
            variance_second=sums.variance_second,
            covariance=sums.covariance,
        )
    return reported


def example_gradients(model: PersonalModel, slot: str, layout: Layout, batch: Dataset) -> Tensor:
    """Gradients ``[b, P]``, float32, of each example's loss by the slot's numbers, with only this slot active.

    Images go through vmap, texts of language models through what linear modules read and what comes back to them; other
    examples, and models with which neither works, go one by one.
    """
    model.activate({slot: 1.0})
    parameters = model.trainable(slot, layout)
    if batch.kind == "causal-lm" and not batch.task and set(batch.inputs) <= TEXT_INPUTS:
        linears = _linears_with(model.module, list(parameters.values()))
        if linears is not None:
            size = max(1, MAX_TOKENS // batch.inputs["input_ids"].shape[1])
            parts = [batch.batch(indices) for indices in torch.split(torch.arange(len(batch)), size)]
            found_in = [_from_linears(model, linears, part) for part in parts]
            if all(part is not None for part in found_in):
                return torch.cat([part for part in found_in if part is not None])
    if batch.kind != "image-classification" or batch.task:
        return _one_by_one(model, list(parameters.values()), batch)
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    values = {names[parameter]: parameter.detach() for parameter in parameters.values()}

    def loss(values: dict[str, Tensor], inputs: Mapping[str, Tensor], label: Tensor) -> Tensor:
        one = {name: tensor[None] for name, tensor in inputs.items()}
        logits: Tensor = functional_call(model.module, values, kwargs=one).logits
        return functional.cross_entropy(logits, label[None])

    inputs = model.inputs(batch.inputs)
    labels = batch.labels.to(model.device)
    # The fused attention kernels have no batching rule: vmap would loop over them, and say so on every run.
    with sdpa_kernel(SDPBackend.MATH):
        try:
            found = vmap(grad(loss), in_dims=(None, 0, 0))(values, inputs, labels)
        except RuntimeError:  # control flow that depends on the data, or an operator without a batching rule
            each = [
                grad(loss)(values, {name: tensor[index] for name, tensor in inputs.items()}, labels[index])
                for index in range(len(batch))
            ]
            found = {name: torch.stack([gradient[name] for gradient in each]) for name in values}
    flat = [found[names[parameter]].reshape(len(batch), -1) for parameter in parameters.values()]
    return torch.cat(flat, dim=1).float()


def _linears_with(module: nn.Module, parameters: list[nn.Parameter]) -> list[nn.Linear] | None:
    """The linear modules that have these weights, in their order; None if one belongs to something else."""
    linears = (one for one in module.modules() if isinstance(one, nn.Linear))
    owners: dict[Tensor, nn.Linear] = {one.weight: one for one in linears if one.bias is None}
    found = [owners[parameter] for parameter in parameters if parameter in owners]
    return found if len(found) == len(parameters) else None


def _from_linears(model: PersonalModel, linears: list[nn.Linear], batch: Dataset) -> Tensor | None:
    """The gradients of all texts in one pass: for each text, the products of what a module read and what came back.

    None if a module did not read ``[b, L, d_in]`` exactly once, as in a mixture of experts: then which rows are whose
    cannot be told.
    """
    passed: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {linear: [] for linear in linears}

    def keep(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:  # else it is a look for the model's head, which is its first use
            passed[linear].append((inputs[0].detach(), output))

    hooks = [linear.register_forward_hook(keep) for linear in linears]
    try:
        loss = each_loss(model, batch).sum()
    finally:
        for hook in hooks:
            hook.remove()
    shape = batch.inputs["input_ids"].shape
    if any(len(calls) != 1 or calls[0][0].shape[:-1] != shape for calls in passed.values()):
        return None
    back = torch.autograd.grad(loss, [passed[linear][0][1] for linear in linears])
    found = [
        torch.einsum("blo,bli->boi", gradient.float(), passed[linear][0][0].float()).flatten(1)
        for linear, gradient in zip(linears, back, strict=True)
    ]
    return torch.cat(found, dim=1)


def _one_by_one(model: PersonalModel, parameters: list[nn.Parameter], batch: Dataset) -> Tensor:
    """The same without vmap, which forbids that an attention mask's values choose the kernel."""
    gradients = []
    for index in range(len(batch)):
        one = batch.batch(torch.tensor([index]))
        loss = example_losses(one.kind, logits_of(model, one), one.labels.to(model.device)).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=bool(one.task))  # other tasks' groups
        numbers = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        gradients.append(torch.cat([tensor.reshape(-1) for tensor in numbers]))
    return torch.stack(gradients).float()


def moments(
    model: PersonalModel,
    slots: tuple[str, str],
    layout: Layout,
    data: Dataset,
    *,
    samples: int,
    seed: int,
    max_bytes: int,
) -> Moments:
    """Mean squares and products of the two slots' gradients on at most ``samples`` examples.

    Args:
        model: with both slots loaded.
        slots: the two slots.
        layout: their common layout, which orders the numbers.
        data: the examples to draw from, without replacement.
        samples: the most examples to draw.
        seed: decides which ones.
        max_bytes: bound on the memory of gradients; at least one example at a time.

    Raises:
        FisherError: no example, or more than a tenth of the gradients are not finite.
    """
    kinds = [part.kind for part in data.parts.values()] if isinstance(data, MixedDataset) else [data.kind]
    if any(kind_of(kind).company for kind in kinds):
        raise FisherError(f"an example of {kinds[0]!r} alone has no loss, and so no gradient")
    count = min(samples, len(data))
    if count < 1:
        raise FisherError(f"{samples} samples of {len(data)} examples, expected at least one")
    model.module.eval()
    total = torch.zeros(3, layout.size, device=model.device)
    kept = 0
    chunk = max(1, min(MAX_CHUNK, max_bytes // (_COPIES * 4 * layout.size)))
    chosen = next(batches(len(data), count, 1, seed))
    for indices in torch.split(chosen, chunk):
        tick("fisher")
        for batch in data.by_task(indices):
            first, second = (example_gradients(model, slot, layout, batch) for slot in slots)
            finite = (first.isfinite() & second.isfinite()).all(dim=1)
            first, second = first[finite], second[finite]
            total += torch.stack([first.square().sum(0), second.square().sum(0), (first * second).sum(0)])
            kept += int(finite.sum())
    if count - kept > MAX_DROPPED * count:
        raise FisherError(f"{count - kept} of {count} gradients are not finite, expected at most {MAX_DROPPED:.0%}")
    first, second, product = (total / kept).cpu()
    return Moments(first, second, product, kept, count - kept)


def damping_of(found: Moments, relative: float) -> float:
    """The same damping for both slots: per-slot damping would compare a slot with its own scale."""
    return relative * 0.5 * float(found.first.double().mean() + found.second.double().mean())


def delta_weights(adapter: Adapter) -> Tensor:
    """How much a number's variance moves the delta ``s B A``, to first order: ``[P]``, float64.

    ``s^2 ||B[:, p]||^2`` for ``A[p, q]``, ``s^2 ||A[p, :]||^2`` for ``B[o, p]``, 1 for weight and bias.
    """
    weights = Adapter(adapter.layout, torch.ones(adapter.layout.size, dtype=torch.float64))
    for module in adapter.layout.lora_modules:
        square = adapter.layout.scalings[module] ** 2
        a, b = adapter[module, Factor.A].double(), adapter[module, Factor.B].double()
        weights[module, Factor.A].copy_(square * b.square().sum(dim=0)[:, None].expand_as(a))
        weights[module, Factor.B].copy_(square * a.square().sum(dim=1)[None, :].expand_as(b))
    return weights.vector


def result(
    pair: tuple[Adapter, ...], found: Moments, damping: float, *, in_delta_space: bool
) -> report_pb2.FisherResult:
    """The step's result; ``pair`` are the two slots' adapters.

    With damping 0 a number without information has no finite variance. It is left out for both slots: if it were left
    out of one only, that slot would look certain.
    """
    layout = pair[0].layout
    first, second, product = (tensor.double() for tensor in (found.first, found.second, found.product))
    usable = (first + damping > 0) & (second + damping > 0)
    variance_first, variance_second = (
        torch.where(usable, 1 / (information + damping), 0.0) for information in (first, second)
    )
    if in_delta_space:
        variance_first = variance_first * delta_weights(pair[0])
        variance_second = variance_second * delta_weights(pair[1])
    scale = (first * second).sqrt()
    correlation = torch.where(scale > 0, product / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0).clamp(0, 1)
    difference = (pair[0].vector.double() - pair[1].vector.double()).square()
    sums = {
        "information_first": first,
        "information_second": second,
        "variance_first": variance_first,
        "variance_second": variance_second,
        "covariance": correlation * (variance_first * variance_second).sqrt(),
        "information_distance": second * difference,
        "effective_dimension": torch.where(second + damping > 0, second / (second + damping), 0.0),
    }
    result = report_pb2.FisherResult(samples=found.samples, dropped=found.dropped, damping=damping)
    for name, numbers in sums.items():
        getattr(result, name).extend(module_sums(layout, numbers))
    return result


def module_sums(layout: Layout, numbers: Tensor) -> list[float]:
    """Sums of ``numbers [P]`` over each module of the layout, in its order."""
    sums = dict.fromkeys(layout.modules, 0.0)
    for entry in layout.entries:
        sums[entry.module] += float(numbers[layout.slice_of(entry.name)].double().sum())
    return list(sums.values())
