"""Sends a slot, or a part of it, to the server; relative to what was received, if the plan says so."""

from __future__ import annotations

from client_app.plan.names import PlanError
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.parts import layout_of_part
from fedalloy_adapters.wire.codec import encode, encoding_from_proto
from proto.fedalloy.v1 import plan_pb2, report_pb2


def carry_out(bench: Workbench, step: plan_pb2.SendStep) -> report_pb2.SendResult:
    """Encode the step's slot; what a lossy encoding of a difference drops is added to the next upload.

    Raises:
        PlanError: the slot is sent twice, or nothing was received that the upload could be relative to.
    """
    bench.require_unsent(step.slot)
    part = layout_of_part(bench.slots[step.slot].layout, step.part)
    adapter, reference = bench.slots[step.slot].part(part), None
    if step.relative_to_received:
        if step.slot not in bench.received or not bench.received[step.slot].layout.contains(part):
            raise PlanError(f"nothing was received for slot {step.slot!r} that an upload could be relative to")
        reference = bench.received[step.slot].part(part)
        residual = bench.slots.residual(step.slot)
        if residual is not None and residual.layout.digest == part.digest:
            adapter = Adapter(part, adapter.vector + residual.vector)
    encoded = encode(adapter, encoding_from_proto(step.encoding), reference=reference, include_layout=False)
    norm = 0.0
    if step.relative_to_received:
        dropped = adapter.vector - encoded.decoded.vector
        bench.slots.set_residual(step.slot, Adapter(part, dropped))
        norm = float(dropped.double().norm())
    bench.uploads[step.slot] = encoded.blob
    bench.layouts[part.digest] = part
    return report_pb2.SendResult(slot=step.slot, content_digest=encoded.decoded.digest, residual_norm=norm)
