"""Mixtures of slots as plans write them: their terms, and a model that runs one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from client_app.model.co_lora import Gate
from client_app.model.personal import PersonalModel
from client_app.plan.names import PlanError
from client_app.plan.slots import SlotStore
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import Coefficient
from fedalloy_adapters.layout import Entry, Factor, Layout
from proto.fedalloy.v1 import plan_pb2


def terms_of(mixture: plan_pb2.Mixture) -> tuple[list[str], list[Coefficient | Gate]]:
    """A mixture's slots and their coefficients.

    Raises:
        PlanError: a term without a coefficient, or a slot that occurs twice.
    """
    slots: list[str] = []
    coefficients: list[Coefficient | Gate] = []
    for term in mixture.terms:
        kind = term.WhichOneof("coefficient")
        if kind not in ("scalar", "per_module", "gate"):
            raise PlanError(f"slot {term.slot!r} in a mixture has no coefficient")
        if term.slot in slots:
            raise PlanError(f"slot {term.slot!r} occurs twice in a mixture")
        slots.append(term.slot)
        if kind == "gate":
            coefficients.append(Gate(term.gate.slot, term.gate.complement))
            continue
        coefficients.append(term.scalar if kind == "scalar" else dict(term.per_module.values))
    return slots, coefficients


def fixed_terms(bench: Workbench, mixture: plan_pb2.Mixture) -> tuple[list[str], list[Coefficient]]:
    """The same, with the gates' present values as numbers.

    Raises:
        PlanError: the mixture is not a sum of adapters with fixed coefficients.
    """
    if mixture.shares or mixture.likeness:
        raise PlanError("an ensemble is not a sum of adapters")
    slots, coefficients = terms_of(mixture)
    if looks_at_input(bench.slots, coefficients):
        raise PlanError("gates that look at the input cannot be folded into one adapter")
    fixed: list[Coefficient] = []
    for coefficient in coefficients:
        if isinstance(coefficient, Gate):
            logits = {e.module: float(t) for e, t in bench.slots[coefficient.slot].to(torch.float64).items()}
            sign = -1 if coefficient.complement else 1
            coefficient = {module: 1 / (1 + math.exp(-sign * logit)) for module, logit in logits.items()}
        fixed.append(bench.model.for_own_heads(coefficient))
    return slots, fixed


def looks_at_input(slots: SlotStore, coefficients: Iterable[Coefficient | Gate]) -> bool:
    """Whether a gate among the coefficients depends on the input: it has more than one number in a module."""
    gates = [slots[gate.slot] for gate in coefficients if isinstance(gate, Gate)]
    return any(entry.shape != (1,) for gate in gates for entry in gate.layout.entries)


def activate(bench: Workbench, mixture: plan_pb2.Mixture) -> None:
    """Load a mixture's slots with their own heads, and its gates, and make the model this mixture.

    Raises:
        PlanError: the mixture is an ensemble, or weighs by example.
    """
    if mixture.likeness:
        raise PlanError("a mixture that weighs by likeness can be evaluated and saved, not trained, merged or measured")
    if mixture.shares:
        raise PlanError("an ensemble can be evaluated and saved, not trained, merged or measured")
    slots, coefficients = terms_of(mixture)
    for slot in [*slots, *{gate.slot for gate in coefficients if isinstance(gate, Gate)}]:
        bench.model.load(slot, bench.slots.whole(slot))
    bench.model.activate(dict(zip(slots, coefficients, strict=True)))


def activate_slot(bench: Workbench, slot: str) -> None:
    """Make the model this slot alone."""
    activate(bench, plan_pb2.Mixture(terms=[plan_pb2.Term(slot=slot, scalar=1.0)]))


def slot_of(model: PersonalModel, parts: Mapping[str, Tensor]) -> Adapter:
    """A slot that holds these numbers by name, for a mixture that depends on more than its terms."""
    entries = tuple(Entry(name, Factor.GATE, tuple(part.shape)) for name, part in parts.items())
    vector = torch.cat([part.flatten() for part in parts.values()]).float()
    return Adapter(Layout(entries, {}, model.base.fingerprint), vector)
