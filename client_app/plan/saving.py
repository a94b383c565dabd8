"""Saves the personal model: as one adapter, or in parts if a mixture is not a single adapter."""

from __future__ import annotations

from client_app.model.co_lora import Gate
from client_app.plan.mixtures import fixed_terms, looks_at_input, terms_of
from client_app.plan.workbench import Workbench
from fedalloy_adapters.algebra import stack
from proto.fedalloy.v1 import plan_pb2, report_pb2


def carry_out(bench: Workbench, step: plan_pb2.SaveStep) -> report_pb2.SaveResult:
    """Mark the mixture to be written to ``adapter/`` at the end of the plan."""
    slots, terms = terms_of(step.mixture)
    named = {step.mixture.shares, step.mixture.likeness} - {""}
    if named or looks_at_input(bench.slots, terms):
        beside = {term.slot for term in terms if isinstance(term, Gate)} | named
        gates = {slot: bench.slots[slot] for slot in sorted(beside)}
        parts = {slot: bench.slots.whole(slot) for slot in slots}
        digest = bench.slots.save_parts(parts, gates, step.mixture)
        return report_pb2.SaveResult(content_digest=digest, in_parts=True)
    slots, coefficients = fixed_terms(bench, step.mixture)
    alone = len(slots) == 1 and coefficients[0] == 1.0
    wholes = [bench.slots.whole(slot) for slot in slots]
    adapter = wholes[0] if alone else stack(wholes, coefficients)
    bench.slots.save_personal(adapter)
    return report_pb2.SaveResult(content_digest=adapter.digest)
