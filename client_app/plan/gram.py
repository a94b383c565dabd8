"""What a client measures so that others can combine models: moments of module inputs, weights by improvement."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from client_app.data.dataset import MASK, Dataset
from client_app.data.task_kinds import kind_of
from client_app.model.personal import PersonalModel
from client_app.plan.progress import tick
from client_app.plan.training import logits_of
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor
from fedalloy_adapters.parts import layout_of_gram


@torch.no_grad()
def input_moments(model: PersonalModel, data: Dataset) -> Adapter:
    """Mean of ``x x^T`` over the inputs of every module of the layout, the active mixture running on ``data``.

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


def improvement_weights(own: float, losses: Tensor, moves: Tensor) -> Tensor:
    """Weights ``[M]`` of candidates in proportion to ``max(0, (own - loss) / distance)``; they sum to 1, or are all 0.

    Args:
        own: loss of where one is.
        losses: the candidates' ``[M]``.
        moves: candidate minus where one is, ``[M, P]``; one that is no move has weight 0, as one without a finite loss.
    """
    distances = moves.double().norm(dim=1)
    gains = torch.where(distances > 0, (own - losses).clamp_min(0) / distances.clamp_min(1e-30), 0.0).nan_to_num(
        0, 0, 0
    )
    return gains / gains.sum() if gains.sum() > 0 else gains
