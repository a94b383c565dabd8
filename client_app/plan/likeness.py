r"""Two slots whose coefficients differ by example: the first counts the more, the more an example is like others.

With unit features :math:`\hat z` (:mod:`client_app.plan.features`: all of them, seen with the first slot beside the
base) of an example and of S others, the first coefficient is

.. math:: u(x) = most \cdot \max(0, \frac{1}{S} \sum_s \hat z(x) \cdot \hat z_s)

and the second one minus that. The sum over s is a product with one vector, the mean of the others' unit features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from client_app.data.dataset import Dataset
from client_app.plan.features import features, features_of
from client_app.plan.mixtures import activate_slot, slot_of, terms_of
from client_app.plan.names import PlanError
from client_app.plan.training import logits_of
from client_app.plan.workbench import Workbench
from fedalloy_adapters.layout import Factor
from proto.fedalloy.v1 import plan_pb2, report_pb2

_NAMES = ("likeness", "most")


def carry_out(bench: Workbench, step: plan_pb2.LikenessStep) -> report_pb2.LikenessResult:
    """Keep the mean of some examples' unit features.

    Raises:
        FeaturesError: the examples have no features.
        PlanError: the largest coefficient is not between 0 and 1, or the client has several tasks.
    """
    if bench.data.tasks:
        raise PlanError("examples of several tasks cannot be weighed by likeness, expected one task")
    if not 0 <= step.most <= 1:
        raise PlanError(f"a largest coefficient of {step.most:g}, expected 0 to 1")
    data = bench.drawn(step.split, step.samples)
    activate_slot(bench, step.source)
    mean = normalize(features_of(bench.model, data, slot=step.source), dim=1).mean(dim=0)
    bench.slots[step.slot] = slot_of(bench.model, dict(zip(_NAMES, (mean, torch.tensor([step.most])), strict=True)))
    return report_pb2.LikenessResult(examples=len(data))


def forward_of(bench: Workbench, mixture: plan_pb2.Mixture) -> Callable[[Dataset], Tensor]:
    """A function for the logits of batches.

    Raises:
        PlanError: the mixture has not two terms with the coefficient 1, or the slot holds no likeness.
    """
    slots, coefficients = terms_of(mixture)
    held = bench.slots[mixture.likeness]
    if coefficients != [1.0, 1.0] or held.layout.modules != _NAMES:
        raise PlanError(f"slot {mixture.likeness!r} and {len(slots)} terms, expected a likeness and two with 1")
    for slot in slots:
        activate_slot(bench, slot)
    mean, most = (held[name, Factor.GATE].double() for name in _NAMES)

    def forward(batch: Dataset) -> Tensor:
        seen = normalize(features(bench.model, batch, slot=slots[0]), dim=1)
        found = []
        for index, share in enumerate((most * seen @ mean).clamp(0, 1).tolist()):
            bench.model.activate({slots[0]: share, slots[1]: 1 - share})
            found.append(logits_of(bench.model, _one(batch, index)))
        return torch.cat(found)

    return forward


def _one(batch: Dataset, index: int) -> Dataset:
    """One example of a batch, as wide as the batch."""
    if batch.rows:
        return batch.batch(torch.tensor([index]))
    inputs = {name: tensor[index : index + 1] for name, tensor in batch.inputs.items()}
    return Dataset(inputs, batch.labels[index : index + 1], batch.kind, batch.task)
