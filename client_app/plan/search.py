"""Looks for the best sum of slots by forward passes alone: for a client that never trained.

The loss is that of the base model with ``sum_j c_j slot_j``, plus a penalty on ``sum_j |c_j|``. Nothing is
differentiated, and few examples are enough, because there are only as many unknowns as slots. Huang et al., "LoraHub:
Efficient Cross-Task Generalization via Dynamic LoRA Composition" (COLM 2024, arXiv 2307.13269, section 3), has the
penalty (0.05) and the bound (1.5). Three departures: deltas are added, not factors, so that two slots do not make terms
that neither has; the search starts from the best of the first trials, not from zero; and coefficients are moved one
after another, where the paper has nevergrad's NGOpt, which fails with numpy 2.4 (nevergrad 1.0.12).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from client_app.model.personal import PersonalModel
from client_app.plan import evaluation
from client_app.plan.names import PlanError
from client_app.plan.progress import tick
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import stack
from proto.fedalloy.v1 import plan_pb2, report_pb2

FIRST_STEP, LAST_STEP = 0.5, 1 / 32
"""How far a coefficient is moved at first, and at last."""
Loss = Callable[[Sequence[float]], float]


def carry_out(bench: Workbench, step: plan_pb2.SearchStep) -> report_pb2.SearchResult:
    """Try sums of the step's slots, and put the best one into the target; the base alone is one of them.

    Raises:
        PlanError: there is no slot or one twice, or too few evaluations to try each slot and the base alone.
    """
    slots = list(step.slots)
    if not slots or len(set(slots)) != len(slots) or step.evaluations < len(slots) + 1:
        raise PlanError(
            f"a search over the slots {', '.join(slots) or 'none'} with {step.evaluations} evaluations, expected "
            "different ones, and one evaluation more than slots at least"
        )
    if not (0 < step.bound < math.inf and 0 <= step.penalty < math.inf):
        raise PlanError(f"a search with bound {step.bound:g} and penalty {step.penalty:g}, expected positive numbers")
    data = bench.drawn(step.split, step.samples)
    wholes = {slot: bench.slots.whole(slot) for slot in slots}
    for slot, adapter in wholes.items():
        bench.model.load(slot, adapter)

    def loss(coefficients: Sequence[float]) -> float:
        _activate(bench.model, dict(zip(slots, coefficients, strict=True)))
        return evaluation.evaluate(bench.model, data, bench.data, loss_only=True)["loss"]

    tried = Tried(loss, len(slots), step.evaluations, step.penalty, step.bound)
    try_first(tried)
    by_coordinate(tried)
    best = tried.best
    bench.slots.set_whole(step.target, _sum(wholes, best))
    return report_pb2.SearchResult(
        coefficients=best,
        loss=tried.losses[best],
        base_loss=tried.losses[(0.0,) * len(slots)],
        slot_losses=[tried.losses[alone] for alone in _units(len(slots))],
        evaluations=len(tried.losses),
        examples=len(data),
    )


@dataclass
class Tried:
    """Sums that were tried, and their losses; a loss that is not finite counts as the largest number.

    Args:
        loss: the function from coefficients ``[count]`` to the loss.
        count: how many slots there are.
        evaluations: how many sums may be tried.
        penalty: the factor on the sum of absolute values, which is added when sums are compared.
        bound: the largest absolute value.
    """

    loss: Loss
    count: int
    evaluations: int
    penalty: float
    bound: float
    losses: dict[tuple[float, ...], float] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """How many more may be tried."""
        return self.evaluations - len(self.losses)

    @property
    def best(self) -> tuple[float, ...]:
        """The best of all; the first one of equals."""
        return min(self.losses, key=self.cost_of)

    def cost_of(self, coefficients: tuple[float, ...]) -> float:
        """Loss and penalty of what has been tried."""
        return self.losses[coefficients] + self.penalty * sum(map(abs, coefficients))

    def cost(self, coefficients: Sequence[float]) -> float:
        """Try these, cut to the bound; if they have been tried before, that costs no evaluation."""
        inside = tuple(max(-self.bound, min(self.bound, float(number))) for number in coefficients)
        if inside not in self.losses:
            tick("search", len(self.losses), self.evaluations)
            found = self.loss(inside)
            self.losses[inside] = found if math.isfinite(found) else 1e60
        return self.cost_of(inside)


def try_first(tried: Tried) -> None:
    """Try the base alone, each slot alone, and their mean."""
    tried.cost([0.0] * tried.count)
    for alone in _units(tried.count):
        tried.cost(alone)
    if tried.count > 1 and tried.left:
        tried.cost([1 / tried.count] * tried.count)


def by_coordinate(tried: Tried) -> None:
    """Move one coefficient after another up or down; when none helps any more, by half as much.

    >>> tried = Tried(lambda c: (c[0] - 0.75) ** 2 + (c[1] + 0.25) ** 2, 2, 100, 0.0, 1.5)
    >>> try_first(tried); by_coordinate(tried); tried.best
    (0.75, -0.25)
    """
    at, step = list(tried.best), FIRST_STEP
    cost = tried.cost(at)
    while step >= LAST_STEP:
        moved = False
        for index in range(tried.count):
            for way in (step, -step):
                if not tried.left:
                    return
                there = [*at]
                there[index] += way
                found = tried.cost(there)
                if found < cost:
                    at, cost, moved = there, found, True
                    break
        step = step if moved else step / 2


def _units(count: int) -> list[tuple[float, ...]]:
    return [tuple(float(index == place) for place in range(count)) for index in range(count)]


def _activate(model: PersonalModel, coefficients: Mapping[str, float]) -> None:
    model.activate({slot: number for slot, number in coefficients.items() if number})


def _sum(wholes: Mapping[str, Adapter], coefficients: Sequence[float]) -> Adapter:
    """The sum of deltas; ranks add up. Slots with coefficient 0 are left out, but at least one stays."""
    found = [(adapter, number) for adapter, number in zip(wholes.values(), coefficients, strict=True) if number]
    found = found or [(next(iter(wholes.values())), 0.0)]
    return stack([adapter for adapter, _ in found], [number for _, number in found])
