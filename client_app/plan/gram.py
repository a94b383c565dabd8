"""Second moments of the inputs of a model's modules, from which a server can combine models."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from client_app.data.dataset import MASK, Dataset
from client_app.kinds import kind_of
from client_app.model.personal import PersonalModel
from client_app.plan.mixtures import activate
from client_app.plan.progress import tick
from client_app.plan.training import logits_of
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor
from fedalloy_adapters.parts import layout_of_gram
from proto.fedalloy.v1 import plan_pb2, report_pb2


def carry_out(bench: Workbench, step: plan_pb2.GramStep) -> report_pb2.GramResult:
    """Send the moments of the active mixture's inputs.

    Raises:
        PlanError: the slot is sent twice.
    """
    bench.require_unsent(step.slot)
    data = bench.drawn(step.split, step.samples)
    activate(bench, step.mixture)
    bench.upload(step.slot, input_moments(bench.model, data), step.encoding)
    return report_pb2.GramResult(slot=step.slot, examples=len(data))


@torch.no_grad()
def input_moments(model: PersonalModel, data: Dataset) -> Adapter:
    """The mean of ``x x^T`` over the inputs of each of the layout's modules while the active mixture runs on ``data``.

    Padding does not count. Sums run in float64; the result is float32, an upper triangle for each module.
    """
    layout = layout_of_gram(model.layout)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: list[Tensor | None] = [None]

    def look(name: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().double()
        kept = mask[0]
        if kept is not None and x.shape[:-1] == kept.shape:
            x = x[kept.bool().to(x.device)]
        x = x.reshape(-1, x.shape[-1])
        sums[name] = sums.get(name, torch.zeros((), dtype=x.dtype, device=x.device)) + x.T @ x
        counts[name] = counts.get(name, 0) + len(x)

    handles = [
        model.module.get_submodule(name).register_forward_pre_hook(partial(look, name)) for name in layout.modules
    ]
    model.module.eval()
    size = kind_of(data.kind).evaluation_batch
    try:
        for indices in torch.split(torch.arange(len(data)), min(size, model.micro_batch or size)):
            tick("gram", int(indices[0]), len(data))
            batch = data.batch(indices)
            mask[0] = batch.inputs.get(MASK)
            logits_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = Adapter.zeros(layout)
    for name, total in sums.items():
        rows, columns = torch.triu_indices(*total.shape)
        found[name, Factor.GRAM].copy_((total / counts[name])[rows, columns])
    return found
