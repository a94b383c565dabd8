"""Several slots that predict together: which slot explains which example, and the average of their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from client_app.data.dataset import Dataset
from client_app.data.targets import target_mask
from client_app.kinds import example_losses, kind_of
from client_app.model.personal import PersonalModel
from client_app.plan.features import features, log_densities
from client_app.plan.mixtures import activate_slot, slot_of, terms_of
from client_app.plan.names import PlanError
from client_app.plan.progress import tick
from client_app.plan.training import autocast, logits_of
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor
from proto.fedalloy.v1 import plan_pb2, report_pb2

_MODULE = "shares"
BY_INPUT = (_MODULE, "means", "variances", "directions")
"""What a slot of shares holds that depend on the input: ``[M, C]``, ``[M, d]`` twice, ``[d, d_in]``."""

Shares = Tensor | Callable[[Dataset], Tensor]
"""Shares ``[C]``; or a function for their logarithms on a batch, ``[b, C]``."""


class EnsembleError(ValueError):
    """Shares do not belong to these slots, or are not shares."""


def carry_out(bench: Workbench, step: plan_pb2.AttributeStep) -> report_pb2.AttributeResult:
    """Attribute each example of a split to the step's slots, and make the means the new shares.

    Raises:
        EnsembleError: the shares do not fit the slots.
        PlanError: there is no slot, or one twice.
    """
    data, slots = bench.split(step.split), loaded(bench, step.slots)
    shares = bench.held(step.shares) or equal_shares(bench.model, slots)
    found = attribute(bench.model, slots, shares_of(shares, slots), data)
    bench.attributions = {slot: found[:, index] for index, slot in enumerate(slots)}
    bench.slots[step.shares] = Adapter(shares.layout, found.mean(dim=0).float())
    return report_pb2.AttributeResult(examples=len(data))


def forward_of(bench: Workbench, mixture: plan_pb2.Mixture, *, everywhere: bool = False) -> Callable[[Dataset], Tensor]:
    """A function for an ensemble's logits; ``everywhere`` as for :func:`client_app.plan.training.logits_of`.

    Raises:
        EnsembleError: the shares do not fit the slots, or the task's answers are not a distribution.
        PlanError: a coefficient is not 1, or there is no slot, or one twice.
    """
    for task in bench.data.each_task.values():
        if not kind_of(task.kind).probabilities:
            raise EnsembleError(f"task {task.task!r}: a {task.kind!r} has no probabilities to average")
    slots, coefficients = terms_of(mixture)
    if any(coefficient != 1.0 for coefficient in coefficients):
        raise PlanError("an ensemble's coefficients are 1: its shares say how much each slot counts")
    held, names = bench.slots[mixture.shares], loaded(bench, slots)
    by_input = held.layout.modules == BY_INPUT
    shares = _by_input(bench.model, held, names) if by_input else shares_of(held, names)
    return partial(log_probabilities, bench.model, slots, shares, everywhere=everywhere)


def equal_shares(model: PersonalModel, slots: Sequence[str]) -> Adapter:
    """A slot of shares, ``1 / len(slots)`` each."""
    return slot_of(model, {_MODULE: torch.full((len(slots),), 1 / len(slots))})


def shares_of(found: Adapter, slots: Sequence[str]) -> Tensor:
    """The numbers of a slot of shares, float64.

    Raises:
        EnsembleError: there are not as many as slots, or they are negative.
    """
    if found.layout.modules != (_MODULE,) or found.layout.size != len(slots) or not bool((found.vector >= 0).all()):
        raise EnsembleError(f"{found.layout.size} numbers of {', '.join(found.layout.modules)} for {len(slots)} slots")
    return found.vector.double()


@torch.no_grad()
def attribute(model: PersonalModel, slots: Sequence[str], shares: Tensor, data: Dataset) -> Tensor:
    """How much of each example belongs to each slot, in proportion to ``share exp(-loss)``: ``[n, C]`` float64.

    Args:
        model: with the slots loaded.
        slots: C of them.
        shares: ``[C]``.
        data: n examples.
    """
    return torch.softmax(log_shares(shares) - example_losses_by(model, slots, data), dim=1)


@torch.no_grad()
def example_losses_by(model: PersonalModel, slots: Sequence[str], data: Dataset) -> Tensor:
    """Each example's loss under each slot alone, ``[n, C]`` float64."""
    model.module.eval()
    kind = kind_of(data.kind)
    size = min(kind.evaluation_batch, model.micro_batch or kind.evaluation_batch)
    columns = []
    for slot in slots:
        model.activate({slot: 1.0})
        losses = []
        for indices in torch.split(torch.arange(len(data)), size):
            tick("attribute", int(indices[0]), len(data))
            batch = data.batch(indices)
            with autocast(model.device):
                logits = logits_of(model, batch).float()
            losses.append(example_losses(data.kind, logits, batch.labels.to(model.device)).cpu())
        columns.append(torch.cat(losses))
    return torch.stack(columns, dim=1).double()


def log_shares(shares: Tensor) -> Tensor:
    """Logarithms; of a share of 0, that of a very small one."""
    return shares.clamp_min(1e-30).log()


def _by_input(model: PersonalModel, held: Adapter, slots: Sequence[str]) -> Callable[[Dataset], Tensor]:
    """``log share_c(x) = log sum_m pi(m, c) N(z; mean_m, variance_m)``, normalised: a function of batches."""
    pi, means, variances, along = (held[name, Factor.GATE].double() for name in BY_INPUT)
    if pi.shape[1] != len(slots):
        raise EnsembleError(f"shares of {pi.shape[1]} slots for {len(slots)} slots")

    def found(batch: Dataset) -> Tensor:
        densities = log_densities(features(model, batch, along), means, variances)
        return (log_shares(pi) + densities[:, :, None]).logsumexp(dim=1).log_softmax(dim=1)

    return found


@torch.no_grad()
def log_probabilities(
    model: PersonalModel, slots: Sequence[str], shares: Shares, batch: Dataset, *, everywhere: bool = False
) -> Tensor:
    """``log sum_c share_c softmax(logits_c)``: logits of the average of the slots' probabilities."""
    logs = log_shares(shares / shares.sum())[None] if isinstance(shares, Tensor) else shares(batch)
    if len(logs) > 1 and kind_of(batch.kind).generative and not everywhere:  # there, logits are of targets, row by row
        logs = logs.repeat_interleave(target_mask(batch.labels).sum(dim=1).cpu(), dim=0)
    parts = []
    for slot, share in zip(slots, logs.float().unbind(dim=1), strict=True):
        model.activate({slot: 1.0})
        found = logits_of(model, batch, everywhere=everywhere).float().log_softmax(dim=-1)
        parts.append(found + share.to(found.device).view(-1, *[1] * (found.ndim - 1)))
    return torch.logsumexp(torch.stack(parts), dim=0)


def loaded(bench: Workbench, slots: Iterable[str]) -> list[str]:
    """Load these slots into the model, each once."""
    found = list(slots)
    if not found or len(set(found)) < len(found):
        raise PlanError(f"slots {found}, expected at least one and none twice")
    for slot in found:
        activate_slot(bench, slot)
    return found
