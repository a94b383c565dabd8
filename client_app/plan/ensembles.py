"""Several slots that predict together: who explains which example, and the average of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from client_app.data.dataset import Dataset
from client_app.data.task_kinds import example_losses, kind_of
from client_app.model.personal import PersonalModel
from client_app.plan.progress import tick
from client_app.plan.training import autocast, logits_of
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Entry, Factor, Layout

_MODULE = "shares"


class EnsembleError(ValueError):
    """Shares do not belong to these slots, or are no shares."""


def equal_shares(model: PersonalModel, slots: Sequence[str]) -> Adapter:
    """A slot of shares, ``1 / len(slots)`` each."""
    layout = Layout((Entry(_MODULE, Factor.GATE, (len(slots),)),), {}, model.base.fingerprint)
    return Adapter(layout, torch.full((len(slots),), 1 / len(slots)))


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
    return torch.softmax(shares.clamp_min(1e-30).log() - torch.stack(columns, dim=1).double(), dim=1)


@torch.no_grad()
def log_probabilities(model: PersonalModel, slots: Sequence[str], shares: Tensor, batch: Dataset) -> Tensor:
    """``log sum_c share_c softmax(logits_c)``: logits of the average of the slots' probabilities."""
    parts = []
    for slot, share in zip(slots, (shares / shares.sum()).clamp_min(1e-30).log().tolist(), strict=True):
        model.activate({slot: 1.0})
        parts.append(logits_of(model, batch).float().log_softmax(dim=-1) + share)
    return torch.logsumexp(torch.stack(parts), dim=0)
