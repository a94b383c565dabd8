"""Squared distances between two slots, module by module."""

from __future__ import annotations

from client_app.plan.workbench import Workbench
from fedalloy_adapters.algebra import squared_distances
from proto.fedalloy.v1 import plan_pb2, report_pb2


def carry_out(bench: Workbench, step: plan_pb2.DistanceStep) -> report_pb2.DistanceResult:
    """One number for each module, in the layout's order."""
    squared = squared_distances(bench.slots[step.first], bench.slots[step.second])
    return report_pb2.DistanceResult(squared=[squared[module] for module in bench.model.layout.modules])
