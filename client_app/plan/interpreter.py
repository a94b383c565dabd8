"""Carries out a plan, step by step. It knows kinds of steps, but no algorithm.

A new kind of step is a module here with a function ``carry_out(bench, step)``, and a line in :data:`STEPS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from google.protobuf.message import Message

from client_app.data.dataset import ClientData, MixedDataset
from client_app.guard.disclosure import told
from client_app.guard.policy import Policy, PolicyError
from client_app.guard.privacy import Budget, require_private_steps, spending_of
from client_app.guard.tally import Tally
from client_app.model.personal import PersonalModel
from client_app.plan import (
    density,
    distance,
    distillation,
    ensembles,
    evaluation,
    fisher,
    gram,
    initialisation,
    likeness,
    merging,
    replacement,
    saving,
    search,
    selection,
    sending,
    sketch,
    training,
)
from client_app.plan.names import PlanError, require_slot_names
from client_app.plan.private import PrivateTraining
from client_app.plan.progress import tick
from client_app.plan.slots import SlotStore
from client_app.plan.workbench import JOINED, Workbench
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Layout
from fedalloy_adapters.parts import layouts_of_plan
from fedalloy_adapters.wire.codec import CodecError, decode, encoding_from_proto, header_of
from proto.fedalloy.v1 import plan_pb2, report_pb2

STEPS: dict[str, Callable[[Workbench, Any], Message]] = {
    "initialise": initialisation.carry_out,
    "train": training.carry_out,
    "merge": merging.carry_out,
    "evaluate": evaluation.carry_out,
    "save": saving.carry_out,
    "send": sending.carry_out,
    "fisher": fisher.carry_out,
    "distance": distance.carry_out,
    "sketch": sketch.carry_out,
    "select": selection.carry_out,
    "gram": gram.carry_out,
    "attribute": ensembles.carry_out,
    "density": density.carry_out,
    "likeness": likeness.carry_out,
    "search": search.carry_out,
    "replace": replacement.carry_out,
    "distill": distillation.carry_out,
}
"""What carries out a step, by the step's kind."""


class Interpreter:
    """One client's model, data and slots; :meth:`run` carries out one plan.

    Args:
        client_id: this client; a plan for another one is refused.
        model: the base model with the client's layout.
        data: the client's splits.
        slots: the client's slots, inside a transaction.
        starts: adapters by slot name; a slot that is created from a seed starts from its adapter.
        policy: the bounds on what a plan may ask.
        secret: known to this client alone; decides noise.
        tally: counts what plans have used; None: nothing is counted.
        budget: the training examples' privacy budget; None: no differential privacy.
    """

    def __init__(
        self,
        client_id: str,
        model: PersonalModel,
        data: ClientData,
        slots: SlotStore,
        starts: Mapping[str, Adapter] | None = None,
        policy: Policy | None = None,
        secret: bytes = b"",
        tally: Tally | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.client_id = client_id
        self.model = model
        self.data = data
        self.slots = slots
        self.starts = starts or {}
        self.policy = policy or Policy()
        self.secret = secret
        self.tally = tally
        self.budget = budget
        self.layouts: dict[bytes, Layout] = {}
        """Layouts of the last plan's uploads, by digest."""

    def run(self, plan: plan_pb2.Plan, blobs: Mapping[str, bytes]) -> tuple[report_pb2.Report, dict[str, bytes]]:
        """Install what was received, and run the steps in order; returns the report and the uploads by slot.

        Leading ``initialise`` steps run before the received adapters are installed, so that a received part finds its
        slot.

        Raises:
            PlanError: the plan does not fit this client; names the step. One that it does not know is refused before
                the first is carried out.
            CodecError: a received blob cannot be decoded.
            PolicyError: the client's owner does not allow it.
        """
        started = time.monotonic()
        if plan.client_id != self.client_id:
            raise PlanError(f"client {self.client_id!r} got the plan of client {plan.client_id!r}")
        require_slot_names(plan, blobs)
        self.policy.require_plan(plan, blobs)
        _require_known(plan)
        bench = Workbench(plan, self.model, self.data, self.slots, self.starts, self.secret)
        bench.min_examples = self.policy.min_examples
        parts_of = partial(self._parts_of, bench)
        self.policy.require_examples(plan, lambda split: sum(parts_of(split)), parts_of)
        self._require_texts(plan)
        if self.budget is not None:
            require_private_steps(plan)
        if self.tally is not None:
            self.tally.begin(plan, self.policy, parts_of)
        self.slots.hidden = self.policy.require_private(plan, self.slots.hidden)
        report = report_pb2.Report(
            version=1,
            run_name=plan.run_name,
            client_id=self.client_id,
            round=plan.round,
            examples=len(self.data.splits["train"]),
        )
        if self.budget is not None:
            asked = spending_of(plan, self.budget.privacy, lambda split: sum(parts_of(split)))
            epsilon = self.budget.charge(asked)
            report.privacy.CopyFrom(self.budget.said(epsilon))
            bench.private = PrivateTraining(self.budget.privacy)
        report.results.extend(_run_steps(bench, blobs))
        report.seconds = time.monotonic() - started
        self.policy.require_small(self.client_id, bench.uploads)
        if self.tally is not None:
            self.tally.leave(plan, bench.uploads, self.policy)
        self.layouts = bench.layouts
        return report, bench.uploads

    def _parts_of(self, bench: Workbench, split: str) -> list[int]:
        """How many examples a split has of each task."""
        if not self.data.splits.keys() >= {*split.split(JOINED)}:
            return [2**31]  # the step itself will say that there is no such split
        data = bench.split(split)
        parts = data.parts.values() if isinstance(data, MixedDataset) else [data]
        return [len(part) for part in parts if len(part)]

    def _require_texts(self, plan: plan_pb2.Plan) -> None:
        """Refuse scores of too few texts, which would reveal them."""
        few = min((c.generate_examples for c in self.data.each_task.values() if c.generate_examples), default=0)
        scored = any(step.HasField("evaluate") and not step.evaluate.loss_only for step in plan.steps)
        if scored and 0 < few < self.policy.min_examples:
            raise PolicyError(
                f"client {plan.client_id!r} refuses: scores of {few} texts (generate-examples), its "
                f"client.min-examples is {self.policy.min_examples}"
            )


def _require_known(plan: plan_pb2.Plan) -> None:
    """Refuse a step or an encoding that this client does not know: now, and not after minutes of other steps."""
    for index, step in enumerate(plan.steps):
        kind = step.WhichOneof("kind")
        if kind is None or kind not in STEPS:
            raise PlanError(
                f"client {plan.client_id!r} does not know step {index} of the plan; it knows {', '.join(STEPS)} "
                "(is the client older than the server?)"
            )
        body = getattr(step, kind)
        if "encoding" in body.DESCRIPTOR.fields_by_name:
            try:
                encoding_from_proto(body.encoding)
            except CodecError as error:
                raise PlanError(f"client {plan.client_id!r}, step {index} ({kind}): {error}") from error


def _run_steps(bench: Workbench, blobs: Mapping[str, bytes]) -> list[report_pb2.StepResult]:
    """Carry out the plan; what was received is installed after its leading ``initialise`` steps."""
    steps, results = bench.plan.steps, list[report_pb2.StepResult]()
    leading = 0
    while leading < len(steps) and steps[leading].WhichOneof("kind") == "initialise":
        leading += 1
    for index, step in enumerate(steps):
        if index == leading:
            _install(bench, blobs)
        bench.index = index
        results.append(_run_step(bench, step))
    if leading == len(steps):
        _install(bench, blobs)
    return results


def _run_step(bench: Workbench, step: plan_pb2.Step) -> report_pb2.StepResult:
    client, kind = bench.plan.client_id, step.WhichOneof("kind")
    assert kind is not None, "refused by _require_known"
    tick(kind)
    started = time.monotonic()
    try:
        result = STEPS[kind](bench, getattr(step, kind))
    except ValueError as error:
        where = f"client {client!r}, step {bench.index} ({kind})"
        known = error.told if isinstance(error, PlanError) else told(error)
        raise PlanError(f"{where}: {error}", told=f"{where}: {known}") from error
    outcome = report_pb2.StepResult()
    getattr(outcome, kind).CopyFrom(result)
    outcome.seconds = time.monotonic() - started
    return outcome


def _install(bench: Workbench, blobs: Mapping[str, bytes]) -> None:
    """Put what was received into the slots."""
    client, model = bench.plan.client_id, bench.model
    known = layouts_of_plan(model.layout, bench.plan.steps)
    for slot, blob in blobs.items():
        kept = bench.slots.received(slot)
        adapter = decode(blob, layouts=known, references={} if kept is None else {kept.digest: kept})
        if adapter.layout.base_fingerprint != model.layout.base_fingerprint:
            difference = model.layout.describe_difference(adapter.layout)
            raise PlanError(f"client {client!r} received slot {slot!r} with {difference}")
        bench.received[slot] = adapter
        if kept is not None and not header_of(blob).reference_digest:
            bench.slots.set_residual(slot, None)  # the server starts anew, and so does what encodings have dropped
        if bench.plan.keep_received:
            bench.slots.set_received(slot, adapter)
        if slot in bench.slots and adapter.layout.digest != bench.slots[slot].layout.digest:
            if bench.slots[slot].layout.contains(adapter.layout):
                adapter = bench.slots[slot].with_part(adapter)
        elif slot not in bench.slots and _is_partial(adapter.layout, model.layout):
            raise PlanError(
                f"client {client!r} received a part of slot {slot!r}, which it does not hold "
                f"(it holds {', '.join(bench.slots.names()) or 'none'})"
            )
        bench.slots[slot] = adapter


def _is_partial(found: Layout, full: Layout) -> bool:
    return found.digest != full.digest and full.contains(found)
