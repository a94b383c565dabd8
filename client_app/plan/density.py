r"""Attributes examples to slots and to Gaussians over features together, and reports the Gaussians' moments.

For the features z of an example, its loss under slot c, and M Gaussians (:mod:`client_app.plan.features`)

.. math:: q_n(m, c) \propto \pi(m, c) \, N(z_n; \mu_m, v_m) \, e^{-loss_n(c)}, \qquad \pi \leftarrow mean_n q_n

:math:`\pi` and the Gaussians become the slot of shares. An ensemble with such a slot has shares that depend on the
input: :math:`share_c(x) \propto \sum_m \pi(m, c) N(z; \mu_m, v_m)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from client_app.plan.ensembles import BY_INPUT, EnsembleError, example_losses_by, loaded, log_shares
from client_app.plan.features import directions, features_of, log_densities
from client_app.plan.mixtures import slot_of
from client_app.plan.names import PlanError
from client_app.plan.workbench import Workbench
from fedalloy_adapters.layout import Factor
from proto.fedalloy.v1 import plan_pb2, report_pb2

MAX_GAUSSIANS, MAX_DIMENSIONS = 64, 256
_LEAST_VARIANCE = 1e-12


def carry_out(bench: Workbench, step: plan_pb2.DensityStep) -> report_pb2.DensityResult:
    """Attribute each example of a split, keep shares and Gaussians, and report the moments of what was attributed.

    Without Gaussians in the step there is one, with the split's own moments.

    Raises:
        EnsembleError: the shares do not fit the slots.
        FeaturesError: the examples have no features.
        PlanError: the Gaussians are not valid, there is no slot, or one twice, or the client has several tasks.
    """
    if bench.data.tasks:
        raise PlanError("examples of several tasks cannot be divided among Gaussians, expected one task")
    means, variances = _gaussians_of(step)
    data, slots = bench.split(step.split), loaded(bench, step.slots)
    along = directions(bench.model, step.dimensions, step.seed)
    z = features_of(bench.model, data, along)
    if not len(means):
        means, variances = z.mean(dim=0, keepdim=True), z.var(dim=0, keepdim=True, correction=0)
    variances = variances.clamp_min(_LEAST_VARIANCE)
    losses = example_losses_by(bench.model, slots, data)
    shares = _held(bench, step.shares, len(means), len(slots))
    densities = log_densities(z, means, variances)
    logits = log_shares(shares) + densities[:, :, None] - losses[:, None]  # [n, M, C]
    q = logits.flatten(1).softmax(dim=1).view_as(logits)
    bench.attributions = {slot: q[:, :, index].sum(dim=1) for index, slot in enumerate(slots)}
    kept = zip(BY_INPUT, (q.mean(dim=0), means, variances, along), strict=True)
    bench.slots[step.shares] = slot_of(bench.model, dict(kept))
    return report_pb2.DensityResult(
        examples=len(data),
        log_density=float((log_shares(shares.sum(dim=1)) + densities).logsumexp(dim=1).mean()),
        shares=q.mean(dim=0).sum(dim=0).tolist(),
        gaussians=[
            plan_pb2.Gaussian(weight=weight, mean=mean.tolist(), variance=variance.tolist())
            for weight, mean, variance in moments(z, logits.logsumexp(dim=2), bench.min_examples)
        ],
    )


def moments(z: Tensor, logits: Tensor, least: int) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Weight, mean and variance of each Gaussian's part of the examples ``z [n, d]``; zeros for one that is left out.

    A Gaussian with fewer than ``least`` examples (the effective number, ``(sum r)^2 / sum r^2``) would tell of single
    ones. It is left out, and the others share its examples: so all together do not tell of these either.

    Args:
        z: the examples.
        logits: of how much of each belongs to each Gaussian, ``[n, M]``.
        least: the owner's bound.
    """
    r = logits.softmax(dim=1)
    effective = r.sum(dim=0).square() / r.square().sum(dim=0).clamp_min(1e-300)
    kept = effective >= least
    if not kept.any():
        kept[r.sum(dim=0).argmax()] = True
    r = logits.masked_fill(~kept, -math.inf).softmax(dim=1)
    for part, stays in zip(r.unbind(dim=1), kept.tolist(), strict=True):
        total = part.sum().clamp_min(1e-300)
        mean = part @ z / total if stays else torch.zeros_like(z[0])
        variance = part @ (z - mean).square() / total if stays else torch.zeros_like(z[0])
        yield float(part.mean()), mean, variance


def _gaussians_of(step: plan_pb2.DensityStep) -> tuple[Tensor, Tensor]:
    """The plan's means and variances, ``[M, d]`` each, float64."""
    if not 1 <= step.dimensions <= MAX_DIMENSIONS or len(step.gaussians) > MAX_GAUSSIANS:
        raise PlanError(
            f"{len(step.gaussians)} Gaussians in {step.dimensions} dimensions, expected at most {MAX_GAUSSIANS} in 1 "
            f"to {MAX_DIMENSIONS}"
        )
    for gaussian in step.gaussians:
        sizes = {len(gaussian.mean), len(gaussian.variance)}
        valid = all(map(math.isfinite, gaussian.mean)) and all(0 < v < math.inf for v in gaussian.variance)
        if sizes != {step.dimensions} or not valid:
            raise PlanError(f"a Gaussian needs {step.dimensions} finite means and as many variances above 0")
    found = [[list(gaussian.mean), list(gaussian.variance)] for gaussian in step.gaussians]
    numbers = torch.tensor(found, dtype=torch.float64).reshape(-1, 2, step.dimensions)
    return numbers[:, 0], numbers[:, 1]


def _held(bench: Workbench, slot: str, gaussians: int, slots: int) -> Tensor:
    """The shares ``[M, C]`` of the step before; equal ones if there were other Gaussians or none."""
    found = bench.held(slot)
    if found is not None and found.layout.modules not in (BY_INPUT, BY_INPUT[:1]):
        raise EnsembleError(f"slot {slot!r} holds no shares")
    entry = found.layout.entries[0] if found is not None else None
    if found is None or entry is None or entry.shape != (gaussians, slots):
        return torch.full((gaussians, slots), 1 / (gaussians * slots), dtype=torch.float64)
    return found[BY_INPUT[0], Factor.GATE].double()
