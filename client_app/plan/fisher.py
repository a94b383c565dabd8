"""Diagonal Fisher information of slots, from per-example gradients.

Empirical Fisher information is the mean, over examples, of the squared gradient of one example's loss at its own label.
It is not the square of a batch's mean gradient. Only sums over modules are reported, a few numbers each, never the
diagonal itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from client_app.data.dataset import Dataset, MixedDataset
from client_app.kinds import kind_of
from client_app.model.personal import PersonalModel
from client_app.plan.example_gradients import ExampleGradients
from client_app.plan.names import PlanError
from client_app.plan.progress import tick
from client_app.plan.seeds import batches
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
_CLOSE, _CLOSE_IN_LESS = 1e-3, 0.25
"""Relative differences of an example's gradient alone and in a batch that pass for rounding, in float32 and in less:
with bfloat16 it is six hundredths. Layers that mix less than a quarter are not noticed there."""
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
    """Gradients ``[b, P]``, float32, of each example's loss by the slot's numbers, with only this slot active."""
    return _gradients_of(model, slot, layout)(batch)


def _gradients_of(model: PersonalModel, slot: str, layout: Layout) -> Callable[[Dataset], Tensor]:
    """:func:`example_gradients` of one slot, batch after batch."""
    model.activate({slot: 1.0})
    numbers = list(model.trainable(slot, layout).values())
    exact = model.dtype == torch.float32 and model.device.type == "cpu"
    together = ExampleGradients(model, numbers, _CLOSE if exact else _CLOSE_IN_LESS)

    def of_batch(batch: Dataset) -> Tensor:
        model.activate({slot: 1.0})
        model.trainable(slot, layout)
        size = max(1, MAX_TOKENS // max(1, _longest(batch)))
        parts = [batch.batch(indices) for indices in torch.split(torch.arange(len(batch)), size)]
        found = [together.of(part) for part in parts]
        return torch.cat([torch.cat([one[p].flatten(1) for p in numbers], dim=1) for one in found]).float()

    return of_batch


def _longest(batch: Dataset) -> int:
    """Tokens of the longest example, padding included; 0 if examples have none."""
    return max((math.prod(t.shape[1:]) for t in batch.inputs.values() if not t.is_floating_point()), default=0)


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
    gradients = [_gradients_of(model, slot, layout) for slot in slots]
    for indices in torch.split(chosen, chunk):
        tick("fisher")
        for batch in data.by_task(indices):
            first, second = (of_batch(batch) for of_batch in gradients)
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
