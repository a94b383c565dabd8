"""Creates a slot: from a seed or a given adapter, as a copy of another slot, or as gates of zeros."""

from __future__ import annotations

from client_app.plan.names import PlanError
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter
from proto.fedalloy.v1 import plan_pb2, report_pb2


def carry_out(bench: Workbench, step: plan_pb2.InitialiseStep) -> report_pb2.InitialiseResult:
    """Create the step's slot, unless it exists and should be kept.

    Raises:
        PlanError: an unknown kind of gate.
    """
    created = not (step.keep_existing and step.slot in bench.slots)
    if created and step.slot in bench.slots:
        bench.slots.set_optimizer(step.slot, {})
    if created and step.copy_of:
        bench.slots.set_whole(step.slot, bench.slots.whole(step.copy_of).clone())
    elif created and step.gate:
        if step.gate not in plan_pb2.GateKind.values():
            raise PlanError(f"unknown kind of gate {step.gate}, expected one of {plan_pb2.GateKind.keys()}")
        looks, per_token = step.gate != plan_pb2.GATE_KIND_SCALAR, step.gate == plan_pb2.GATE_KIND_TOKEN
        bench.slots[step.slot] = Adapter.zeros(bench.model.gate_layout(looks_at_input=looks, per_token=per_token))
    elif created:
        start = bench.starts.get(step.slot)
        fresh = start.clone() if start else bench.model.initial(step.seed)
        bench.slots.set_whole(step.slot, fresh, keep_own_heads=step.keep_own_heads)
    return report_pb2.InitialiseResult(created=created)
