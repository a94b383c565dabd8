"""Merges slots into one: as a sum of deltas or of factors, or by precisions."""

from __future__ import annotations

from client_app.plan.mixtures import fixed_terms
from client_app.plan.names import PlanError
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter, joined
from fedalloy_adapters.algebra import precision_mean, stack, truncate, weighted_sum
from proto.fedalloy.v1 import plan_pb2, report_pb2


def carry_out(bench: Workbench, step: plan_pb2.MergeStep) -> report_pb2.MergeResult:
    """Put the merge of a mixture's slots into the step's target.

    Raises:
        PlanError: the mixture cannot be merged in this space, or the merge is not finite.
    """
    if step.own_heads_only:
        return _own_heads(bench, step)
    if any(term.WhichOneof("coefficient") == "precision" for term in step.mixture.terms):
        merged = _by_precision(bench, step)
    else:
        merged = _by_weight(bench, step)
    bench.slots.set_whole(step.target, merged)
    return report_pb2.MergeResult(max_rank=max(merged.layout.ranks.values(), default=0))


def _own_heads(bench: Workbench, step: plan_pb2.MergeStep) -> report_pb2.MergeResult:
    """The target's own heads become the mixture's; its adapter stays."""
    target, own = bench.slots[step.target], bench.model.own_layout
    slots, coefficients = fixed_terms(bench, step.mixture)
    if own is not None:
        heads = weighted_sum([bench.slots.whole(slot).part(own) for slot in slots], coefficients)
        bench.slots.set_whole(step.target, joined(target, heads))
    return report_pb2.MergeResult(max_rank=max(target.layout.ranks.values(), default=0))


def _by_weight(bench: Workbench, step: plan_pb2.MergeStep) -> Adapter:
    slots, coefficients = fixed_terms(bench, step.mixture)
    adapters = [bench.slots.whole(slot) for slot in slots]
    if step.space == plan_pb2.MERGE_SPACE_DELTA:
        merged = stack(adapters, coefficients)
        if step.truncate_rank:
            ranks = dict.fromkeys(bench.model.layout.lora_modules, step.truncate_rank)
            merged = truncate(merged, bench.model.whole_layout.with_ranks(ranks))
    elif step.space == plan_pb2.MERGE_SPACE_FACTOR:
        merged = weighted_sum(adapters, coefficients)
    else:
        raise PlanError(f"unknown merge space {step.space}, expected delta or factor")
    if not merged.is_finite:
        raise PlanError(f"the merge of {', '.join(slots)} is not finite; are its weights too large?")
    return merged


def _by_precision(bench: Workbench, step: plan_pb2.MergeStep) -> Adapter:
    terms = step.mixture.terms
    if step.space != plan_pb2.MERGE_SPACE_FACTOR or any(not term.precision for term in terms):
        raise PlanError("precisions merge in factor space only, and need one in every term")
    slots = [term.slot for term in terms]
    merged = precision_mean([bench.slots[slot] for slot in slots], [bench.slots[term.precision] for term in terms])
    own = bench.model.own_layout
    if own is None:  # own heads have no precisions
        return merged
    heads = [bench.slots.whole(slot).part(own) for slot in slots]
    return joined(merged, weighted_sum(heads, [1 / len(heads)] * len(heads)))
