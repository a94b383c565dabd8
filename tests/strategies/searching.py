"""Searches and moments of features, as a client without a model plays them."""

from __future__ import annotations

import random
from collections.abc import Mapping

from proto.fedalloy.v1 import plan_pb2, report_pb2


def best_alone(
    step: plan_pb2.SearchStep, losses: Mapping[str, float], examples: int, result: report_pb2.SearchResult
) -> str:
    """Fill in a result in which one slot alone is best, and return that slot; ``losses`` has the loss of each slot."""
    best = min(step.slots, key=lambda slot: losses[slot])
    result.coefficients.extend(float(slot == best) for slot in step.slots)
    result.slot_losses.extend(losses[slot] for slot in step.slots)
    result.loss, result.base_loss = losses[best], 2 * losses[best]
    result.evaluations, result.examples = len(step.slots) + 1, min(examples, step.samples)
    return best


def look(step: plan_pb2.DensityStep, name: str, result: report_pb2.DensityResult) -> None:
    """Moments of features that nobody has computed: the same in every round, and for every Gaussian."""
    count, draw = max(1, len(step.gaussians)), random.Random(name)
    mean = [draw.gauss() for _ in range(step.dimensions)]
    moments = plan_pb2.Gaussian(weight=1 / count, mean=mean, variance=[0.5] * step.dimensions)
    shares = [1 / len(step.slots)] * len(step.slots)
    result.MergeFrom(report_pb2.DensityResult(examples=5, log_density=-1.0, shares=shares, gaussians=[moments] * count))
