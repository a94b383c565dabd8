"""Gradients of single examples, all of a batch in one pass where the model's layers keep its examples apart.

A linear layer's gradient for one example is the product of what came back to its outputs and what it read, summed over
the example's tokens (Goodfellow, 2015, arXiv:1510.01799; Opacus does the same). LoRA's A and B and heads are such
layers. Models whose layers mix the examples of a batch are found by computing one example alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from client_app.data.dataset import Dataset
from client_app.model.forward.padding import set_training
from client_app.model.personal import PersonalModel
from client_app.plan.training import autocast, each_loss

Place = tuple[nn.Linear, str, float]
"""A linear layer, ``weight`` or ``bias``, and the factor on the parameter there."""


class ExampleGradients:
    """Gradients of each example's own loss, ``[b, ...]`` by parameter.

    Args:
        model: with a mixture active.
        parameters: those that are trained.
        close: if the first example's gradient alone and in a batch differ relatively by more than this, the model's
            layers mix examples, and each is computed alone.
    """

    def __init__(self, model: PersonalModel, parameters: Sequence[nn.Parameter], close: float = 1e-3) -> None:
        self.model = model
        self.close = close
        self.parameters = list(parameters)
        self.places = places_of(model.module, self.parameters)
        self.together = self.places is not None
        self._checked = False

    def of(self, batch: Dataset) -> dict[nn.Parameter, Tensor]:
        """The gradients of a batch of one task."""
        if self.together and len(batch) > 1:
            found = None
            if not self._checked:
                agrees, found = self._agrees(batch)
                if agrees is None:
                    return self.one_by_one(batch)
                self._checked, self.together = True, agrees
            if self.together:
                if found is None or self.model.module.training:  # the check is without dropout
                    found = self._in_company(batch)
                if found is not None:
                    return found
            self.together = False
            logging.getLogger("flwr").warning("examples cannot be told apart in this model's layers: one at a time")
        return self.one_by_one(batch)

    def one_by_one(self, batch: Dataset) -> dict[nn.Parameter, Tensor]:
        """The same by autograd, each example alone: the reference for the faster way."""
        rows = [self._alone(batch.batch(torch.tensor([index]))) for index in range(len(batch))]
        return {p: torch.stack([row[i] for row in rows]) for i, p in enumerate(self.parameters)}

    def _alone(self, example: Dataset) -> list[Tensor]:
        with autocast(self.model.device):
            loss = each_loss(self.model, example).sum()
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g.float() for p, g in zip(self.parameters, found, strict=True)]

    def _agrees(self, batch: Dataset) -> tuple[bool | None, dict[nn.Parameter, Tensor] | None]:
        """Whether the first example's gradient is the same alone and in the batch, so that no layer mixes examples.

        None if that gradient is not finite: then it cannot be told. Beside it, the batch's gradients, if there are any.
        Both are without dropout, which would differ for an example alone.
        """
        module, first = self.model.module, torch.tensor([0])
        training = module.training
        module.eval()
        alone = self._alone(batch.batch(first))
        found = self._in_company(batch)
        set_training(module, training)
        if found is None:
            return False, None
        norm = torch.stack([gradient.square().sum() for gradient in alone]).sum().sqrt()
        if not bool(norm.isfinite()):
            return None, found
        far = torch.stack([(found[p][0] - g).square().sum() for p, g in zip(self.parameters, alone, strict=True)])
        return bool(far.sum().sqrt() <= self.close * norm + 1e-7), found

    def _in_company(self, batch: Dataset) -> dict[nn.Parameter, Tensor] | None:
        """From what linear layers read and what comes back; None if a layer's input has another first dimension."""
        assert self.places is not None
        with _watched(self.places, len(batch)) as found:
            with autocast(self.model.device):
                loss = each_loss(self.model, batch).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        for parameter in self.parameters:
            parameter.grad = None
        each: dict[nn.Parameter, Tensor] = {}
        for parameter in self.parameters:
            seen = found.get(parameter, torch.zeros(len(batch), *parameter.shape, device=parameter.device))
            if seen is None:
                return None
            each[parameter] = seen
        return each


def places_of(module: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, Place] | None:
    """Where each parameter acts in a linear layer; None if one acts anywhere else (a gate, say)."""
    wanted, found = set(parameters), dict[nn.Parameter, Place]()
    for layer in module.modules():
        if not isinstance(layer, nn.Linear):
            continue
        for kind in ("weight", "bias"):
            if parametrize.is_parametrized(layer, kind):
                parametrizations: Any = layer.parametrizations
                differences = parametrizations[kind][0]
                for slot, parameter in differences.by_slot.items():
                    share = differences.coefficients.get(slot, 0.0)
                    if parameter in wanted and isinstance(share, float | int):
                        found[parameter] = (layer, kind, float(share))
            elif getattr(layer, kind) in wanted if getattr(layer, kind) is not None else False:
                found[getattr(layer, kind)] = (layer, kind, 1.0)
    return found if wanted <= found.keys() else None


@contextmanager
def _watched(places: Mapping[nn.Parameter, Place], size: int) -> Iterator[dict[nn.Parameter, Tensor | None]]:
    """Inside the block, backward passes fill in each example's gradients; None if a layer has no row for each."""
    found: dict[nn.Parameter, Tensor | None] = {}
    by_layer: dict[nn.Linear, list[tuple[nn.Parameter, str, float]]] = {}
    for parameter, (layer, kind, share) in places.items():
        by_layer.setdefault(layer, []).append((parameter, kind, share))

    def seen(layer: nn.Linear, inputs: tuple[Tensor, ...], gradient: Tensor) -> None:
        for parameter, kind, share in by_layer[layer]:
            if inputs[0].shape[0] != size or gradient.shape[0] != size:
                found[parameter] = None
                continue
            above, below = gradient.float(), inputs[0].float()
            if kind == "weight":
                each = share * torch.einsum("n...i,n...j->nij", above, below)
            else:
                each = share * above.flatten(1, -2).sum(1) if above.dim() > 2 else share * above
            before = found.get(parameter, each.new_zeros(()))
            found[parameter] = None if before is None else before + each

    def watch(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            kept = tuple(tensor.detach() for tensor in inputs)
            output.register_hook(partial(seen, layer, kept))  # type: ignore[no-untyped-call]

    handles = [layer.register_forward_hook(watch) for layer in by_layer]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
