"""Chooses among slots by their losses: the best one, or FedFomo's step towards those that are better.

FedFomo: Zhang et al., "Personalized Federated Learning with First Order Model Optimization" (arXiv 2012.08565).
"""

from __future__ import annotations

import torch
from torch import Tensor

from client_app.plan import evaluation
from client_app.plan.mixtures import activate_slot
from client_app.plan.names import PlanError
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter, stack_vectors
from proto.fedalloy.v1 import plan_pb2, report_pb2


def carry_out(bench: Workbench, step: plan_pb2.SelectStep) -> report_pb2.SelectResult:
    """Evaluate the step's slots, combine them by its rule, and put the result into the target.

    Raises:
        PlanError: an unknown rule, or no slot.
    """
    if not step.slots or step.rule not in (plan_pb2.SELECT_RULE_BEST, plan_pb2.SELECT_RULE_IMPROVEMENT):
        raise PlanError(f"rule {step.rule} over {len(step.slots)} slots, expected a known rule and at least one")
    data = bench.drawn(step.split, step.samples)

    def loss(slot: str) -> float:
        activate_slot(bench, slot)
        return evaluation.evaluate(bench.model, data, bench.data, loss_only=True)["loss"]

    result = report_pb2.SelectResult(losses=[loss(slot) for slot in step.slots])
    if step.rule == plan_pb2.SELECT_RULE_BEST:
        best = min(range(len(step.slots)), key=lambda index: result.losses[index])
        result.weights.extend(float(index == best) for index in range(len(step.slots)))
        bench.slots.set_whole(step.target, bench.slots.whole(step.slots[best]).clone())
        return result
    own = bench.slots.whole(step.target)
    result.target_loss = loss(step.target)
    moves = stack_vectors([own, *(bench.slots.whole(slot) for slot in step.slots)])[1:] - own.vector
    weights = improvement_weights(result.target_loss, torch.tensor(list(result.losses)).double(), moves)
    result.weights.extend(weights.tolist())
    bench.slots.set_whole(step.target, Adapter(own.layout, own.vector + weights.to(moves.dtype) @ moves))
    return result


def improvement_weights(own: float, losses: Tensor, moves: Tensor) -> Tensor:
    """Weights ``[M]`` of candidates in proportion to ``max(0, (own - loss) / distance)``; they sum to 1, or are all 0.

    Args:
        own: the loss of the client's current model.
        losses: the candidates' losses ``[M]``.
        moves: each candidate minus the current model, ``[M, P]``; with a move of zero, or a loss that is not finite,
            the weight is 0.
    """
    distances = moves.double().norm(dim=1)
    gains = torch.where(distances > 0, (own - losses).clamp_min(0) / distances.clamp_min(1e-30), 0.0).nan_to_num(
        0, 0, 0
    )
    return gains / gains.sum() if gains.sum() > 0 else gains
