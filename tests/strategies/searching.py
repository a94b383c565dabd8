"""A search as a client without a model plays it."""

from __future__ import annotations

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
