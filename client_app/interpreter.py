"""Carries out a plan, step by step. It knows steps and slots, and no algorithm."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping

import torch
from google.protobuf.message import Message
from torch import Tensor, nn

from adapters.adapter import Adapter, joined
from adapters.algebra import Coefficient, precision_mean, stack, truncate, weighted_sum
from adapters.codec import decode, encode, encoding_from_proto
from adapters.layout import Factor, Layout
from adapters.parts import layout_of_part, layouts_of_plan
from client_app import ensembles, evaluation, training
from client_app.co_lora import Gate, GateError
from client_app.data import ClientData, Dataset
from client_app.measures import Measures, PlanError
from client_app.model import OWN_HEAD, PersonalModel
from client_app.progress import tick
from client_app.slots import SlotError, SlotStore
from proto.fedalloy.v1 import plan_pb2, report_pb2

SLOT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Interpreter(Measures):
    """One client's model, data and slots; :meth:`run` carries out one plan.

    Args:
        client_id: this client; a plan for another one is refused.
        model: the base model with the client's layout.
        data: the client's splits.
        slots: the client's slots, inside a transaction.
        starts: adapters that slots of these names start from when they are created from a seed.
    """

    def __init__(
        self,
        client_id: str,
        model: PersonalModel,
        data: ClientData,
        slots: SlotStore,
        starts: Mapping[str, Adapter] | None = None,
    ) -> None:
        self.client_id = client_id
        self.model = model
        self.data = data
        self.slots = slots
        self.starts = starts or {}
        self._received: dict[str, Adapter] = {}
        self._uploads: dict[str, bytes] = {}
        self._attributions: dict[str, Tensor] = {}
        self._plan = plan_pb2.Plan()
        self._index = 0
        self._steps: dict[str, Callable[..., Message]] = {
            "initialise": self._initialise,
            "train": self._train,
            "merge": self._merge,
            "evaluate": self._evaluate,
            "save": self._save,
            "send": self._send,
            "fisher": self._fisher,
            "distance": self._distance,
            "sketch": self._sketch,
            "select": self._select,
            "gram": self._gram,
            "attribute": self._attribute,
        }

    def run(self, plan: plan_pb2.Plan, blobs: Mapping[str, bytes]) -> tuple[report_pb2.Report, dict[str, bytes]]:
        """Install what was received, run the steps in order; the report and the uploads by slot.

        Leading ``initialise`` steps run before the received adapters are installed, so that a received part finds its
        slot.

        Raises:
            PlanError: the plan does not fit this client; names the step.
            CodecError: a received blob cannot be decoded.
        """
        started = time.monotonic()
        if plan.client_id != self.client_id:
            raise PlanError(f"client {self.client_id!r} got the plan of client {plan.client_id!r}")
        _require_slot_names(plan, blobs)
        self._plan, self._uploads, self._attributions = plan, {}, {}
        report = report_pb2.Report(
            version=1,
            run_name=plan.run_name,
            client_id=self.client_id,
            round=plan.round,
            examples=len(self.data.splits["train"]),
        )
        leading = 0
        while leading < len(plan.steps) and plan.steps[leading].WhichOneof("kind") == "initialise":
            leading += 1
        for index, step in enumerate(plan.steps):
            if index == leading:
                self._install(blobs)
            report.results.append(self._run_step(index, step))
        if leading == len(plan.steps):
            self._install(blobs)
        report.seconds = time.monotonic() - started
        return report, self._uploads

    def _run_step(self, index: int, step: plan_pb2.Step) -> report_pb2.StepResult:
        kind = step.WhichOneof("kind")
        if kind is None or kind not in self._steps:
            known = ", ".join(self._steps)
            raise PlanError(
                f"client {self.client_id!r} does not know step {index} of the plan; it knows {known} "
                "(is the client older than the server?)"
            )
        self._index = index
        tick(kind)
        try:
            result = self._steps[kind](getattr(step, kind))
        except (PlanError, SlotError, GateError, ValueError) as error:
            raise PlanError(f"client {self.client_id!r}, step {index} ({kind}): {error}") from error
        outcome = report_pb2.StepResult()
        getattr(outcome, kind).CopyFrom(result)
        return outcome

    def _install(self, blobs: Mapping[str, bytes]) -> None:
        known = layouts_of_plan(self.model.layout, self._plan.steps)
        self._received = {}
        for slot, blob in blobs.items():
            adapter = decode(blob, layouts=known)
            if adapter.layout.base_fingerprint != self.model.layout.base_fingerprint:
                difference = self.model.layout.describe_difference(adapter.layout)
                raise PlanError(f"client {self.client_id!r} received slot {slot!r} with {difference}")
            self._received[slot] = adapter
            if slot in self.slots and adapter.layout.digest != self.slots[slot].layout.digest:
                if self.slots[slot].layout.contains(adapter.layout):
                    adapter = self.slots[slot].with_part(adapter)
            elif slot not in self.slots and _is_partial(adapter.layout, self.model.layout):
                raise PlanError(
                    f"client {self.client_id!r} received a part of slot {slot!r}, which it does not hold "
                    f"(it holds {', '.join(self.slots.names()) or 'none'})"
                )
            self.slots[slot] = adapter

    def _initialise(self, step: plan_pb2.InitialiseStep) -> report_pb2.InitialiseResult:
        created = not (step.keep_existing and step.slot in self.slots)
        if created and step.copy_of:
            self.slots[step.slot] = self.slots[step.copy_of].clone()
        elif created and step.gate:
            if step.gate not in plan_pb2.GateKind.values():
                raise PlanError(f"unknown kind of gate {step.gate}, expected one of {plan_pb2.GateKind.keys()}")
            looks = step.gate == plan_pb2.GATE_KIND_INPUT
            self.slots[step.slot] = Adapter.zeros(self.model.gate_layout(looks_at_input=looks))
        elif created:
            start = self.starts.get(step.slot)
            self.slots[step.slot] = start.clone() if start else self.model.initial(step.seed)
        return report_pb2.InitialiseResult(created=created)

    def _train(self, step: plan_pb2.TrainStep) -> report_pb2.TrainResult:
        if step.steps < 1 or step.batch_size < 1 or not step.learning_rate > 0:
            raise PlanError(
                f"{step.steps} steps of {step.batch_size} examples at learning rate {step.learning_rate:g}; "
                "expected at least one of each and a positive rate"
            )
        data = self._split(step.split)
        if step.HasField("fold"):
            data = self._fold(data, step.fold, step.split)
        self._activate(step.mixture)
        parameters: dict[str, nn.Parameter] = {}
        anchor: dict[str, Tensor] = {}
        for slot in step.slots:
            layout = self.slots[slot].layout
            is_gates = any(entry.factor is Factor.GATE for entry in layout.entries)
            part = layout if is_gates else layout_of_part(layout, step.part)
            for name, parameter in self.model.trainable(slot, part).items():
                parameters[f"{slot}:{name}"] = parameter
            if step.HasField("proximal") and not is_gates:
                pulled = training.tensors_by_entry(self.slots[step.proximal.slot].part(part), self.model.device)
                anchor |= {f"{slot}:{name}": tensor for name, tensor in pulled.items()}
        if not parameters:
            raise PlanError("nothing to train: no slot is named")
        gates = {term.gate.slot for term in step.mixture.terms if term.HasField("gate")}
        missing = set(step.slots) - {term.slot for term in step.mixture.terms} - gates
        if missing:
            raise PlanError(f"slot {sorted(missing)[0]!r} is to be trained but is not in the mixture")
        own = [OWN_HEAD] if self.model.own_layout is not None else []
        for slot in own:
            for name, parameter in self.model.trainable(slot, self.slots[slot].layout).items():
                parameters[f"{slot}:{name}"] = parameter
        seed = training.seed_of(self._plan.seed, self.client_id, self._plan.round, self._index)
        teach = self._teacher(step, parameters) if step.HasField("distillation") else None
        weights = self._attributed(step) if step.attributed_to else None
        result = training.train(self.model, step, parameters, data, seed, anchor or None, teach, weights)
        for slot in [*step.slots, *own]:
            self.slots[slot] = self.model.read(slot)
        return result

    def _teacher(self, step: plan_pb2.TrainStep, parameters: Mapping[str, nn.Parameter]) -> Callable[[Dataset], Tensor]:
        lesson = step.distillation
        if not 0 <= lesson.weight <= 1 or not lesson.temperature > 0:
            raise PlanError(
                f"distillation with weight {lesson.weight:g} at temperature {lesson.temperature:g}, expected 0 to 1 "
                "and a positive one"
            )
        trained, teacher = (dict(zip(*self._terms(mix), strict=True)) for mix in (step.mixture, lesson.teacher))
        for slot in [*teacher, *(c.slot for c in teacher.values() if isinstance(c, Gate))]:
            if slot not in trained:
                self.model.load(slot, self.slots[slot])

        def teach(batch: Dataset) -> Tensor:
            self.model.activate(teacher)
            self.model.module.eval()
            with torch.no_grad(), training.autocast(self.model.device):
                found = training.logits_of(self.model, batch)
            self.model.module.train()
            self.model.activate(trained)
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            return found

        return teach

    def _attributed(self, step: plan_pb2.TrainStep) -> Tensor:
        found = self._attributions.get(step.attributed_to)
        if found is None or step.HasField("fold") or len(found) != len(self._split(step.split)):
            raise PlanError(f"the split that is trained on was not attributed to slot {step.attributed_to!r}")
        return found

    def _ensemble(self, mixture: plan_pb2.Mixture) -> Callable[[Dataset], Tensor]:
        slots, coefficients = self._terms(mixture)
        if any(coefficient != 1.0 for coefficient in coefficients):
            raise PlanError("an ensemble's coefficients are 1: its shares say how much each slot counts")
        shares = ensembles.shares_of(self.slots[mixture.shares], self._loaded(slots))
        return lambda batch: ensembles.log_probabilities(self.model, slots, shares, batch)

    def _merge(self, step: plan_pb2.MergeStep) -> report_pb2.MergeResult:
        if any(term.WhichOneof("coefficient") == "precision" for term in step.mixture.terms):
            return self._merge_by_precision(step)
        slots, coefficients = self._fixed_terms(step.mixture)
        adapters = [self.slots[slot] for slot in slots]
        if step.space == plan_pb2.MERGE_SPACE_DELTA:
            merged = stack(adapters, coefficients)
            if step.truncate_rank:
                ranks = dict.fromkeys(self.model.layout.lora_modules, step.truncate_rank)
                merged = truncate(merged, self.model.layout.with_ranks(ranks))
        elif step.space == plan_pb2.MERGE_SPACE_FACTOR:
            merged = weighted_sum(adapters, coefficients)
        else:
            raise PlanError(f"unknown merge space {step.space}, expected delta or factor")
        self.slots[step.target] = merged
        return report_pb2.MergeResult(max_rank=max(merged.layout.ranks.values(), default=0))

    def _merge_by_precision(self, step: plan_pb2.MergeStep) -> report_pb2.MergeResult:
        terms = step.mixture.terms
        if step.space != plan_pb2.MERGE_SPACE_FACTOR or any(not term.precision for term in terms):
            raise PlanError("precisions merge in factor space only, and need one in every term")
        merged = precision_mean(
            [self.slots[term.slot] for term in terms], [self.slots[term.precision] for term in terms]
        )
        self.slots[step.target] = merged
        return report_pb2.MergeResult(max_rank=max(merged.layout.ranks.values(), default=0))

    def _fold(self, data: Dataset, fold: plan_pb2.Fold, split: str) -> Dataset:
        if not fold.index < fold.count <= len(data):
            raise PlanError(f"part {fold.index} of {fold.count} of {len(data)} examples: there is no such part")
        generator = torch.Generator().manual_seed(training.seed_of(self._plan.seed, self.client_id, "fold", split))
        return data.subset(torch.randperm(len(data), generator=generator)[fold.index :: fold.count])

    def _evaluate(self, step: plan_pb2.EvaluateStep) -> report_pb2.EvaluateResult:
        started = time.monotonic()
        data, forward = self._split(step.split), None
        if step.mixture.shares:
            forward = self._ensemble(step.mixture)
        else:
            self._activate(step.mixture)
        metrics = evaluation.evaluate(self.model, data, self.data, forward)
        return report_pb2.EvaluateResult(
            label=step.label,
            split=step.split,
            examples=len(data),
            metrics=metrics,
            seconds=time.monotonic() - started,
        )

    def _save(self, step: plan_pb2.SaveStep) -> report_pb2.SaveResult:
        slots, terms = self._terms(step.mixture)
        if step.mixture.shares or self._looks_at_input(terms):
            beside = {term.slot for term in terms if isinstance(term, Gate)} | ({step.mixture.shares} - {""})
            gates = {slot: self.slots[slot] for slot in sorted(beside)}
            own = [OWN_HEAD] if self.model.own_layout is not None else []
            digest = self.slots.save_parts({slot: self.slots[slot] for slot in [*slots, *own]}, gates, step.mixture)
            return report_pb2.SaveResult(content_digest=digest, in_parts=True)
        slots, coefficients = self._fixed_terms(step.mixture)
        alone = len(slots) == 1 and coefficients[0] == 1.0
        adapter = self.slots[slots[0]] if alone else stack([self.slots[slot] for slot in slots], coefficients)
        self.slots.save_personal(joined(adapter, self.slots[OWN_HEAD]) if self.model.own_layout else adapter)
        return report_pb2.SaveResult(content_digest=adapter.digest)

    def _send(self, step: plan_pb2.SendStep) -> report_pb2.SendResult:
        if step.slot in self._uploads:
            raise PlanError(f"slot {step.slot!r} is sent twice")
        part = layout_of_part(self.slots[step.slot].layout, step.part)
        adapter, reference = self.slots[step.slot].part(part), None
        if step.relative_to_received:
            if step.slot not in self._received or not self._received[step.slot].layout.contains(part):
                raise PlanError(f"nothing was received for slot {step.slot!r} that an upload could be relative to")
            reference = self._received[step.slot].part(part)
            residual = self.slots.residual(step.slot)
            if residual is not None and residual.layout.digest == part.digest:
                adapter = Adapter(part, adapter.vector + residual.vector)
        encoded = encode(adapter, encoding_from_proto(step.encoding), reference=reference, include_layout=False)
        if step.relative_to_received:
            self.slots.set_residual(step.slot, Adapter(part, adapter.vector - encoded.decoded.vector))
        self._uploads[step.slot] = encoded.blob
        return report_pb2.SendResult(slot=step.slot, content_digest=encoded.decoded.digest)

    def _looks_at_input(self, coefficients: list[Coefficient | Gate]) -> bool:
        gates = [self.slots[gate.slot] for gate in coefficients if isinstance(gate, Gate)]
        return any(entry.shape != (1,) for gate in gates for entry in gate.layout.entries)

    def _fixed_terms(self, mixture: plan_pb2.Mixture) -> tuple[list[str], list[Coefficient]]:
        """The terms with numbers for gates: what the gates are now."""
        if mixture.shares:
            raise PlanError("an ensemble is no sum of adapters")
        slots, coefficients = self._terms(mixture)
        if self._looks_at_input(coefficients):
            raise PlanError("gates that look at the input cannot be folded into one adapter")
        fixed: list[Coefficient] = []
        for coefficient in coefficients:
            if isinstance(coefficient, Gate):
                logits = {e.module: float(t) for e, t in self.slots[coefficient.slot].to(torch.float64).items()}
                sign = -1 if coefficient.complement else 1
                coefficient = {module: 1 / (1 + math.exp(-sign * logit)) for module, logit in logits.items()}
            fixed.append(coefficient)
        return slots, fixed


def _require_slot_names(plan: plan_pb2.Plan, blobs: Mapping[str, bytes]) -> None:
    """Slot names become folder names and PEFT adapter names: nothing that leaves the folder, no dots."""
    named = set(blobs)
    for step in plan.steps:
        body = getattr(step, step.WhichOneof("kind") or "initialise")
        named |= {
            getattr(body, field) for field in ("slot", "target", "first", "second", "shares") if hasattr(body, field)
        }
        named |= {name for name in (getattr(body, field, "") for field in ("keep_first", "keep_second")) if name}
        named |= set(getattr(body, "slots", ()))
        if hasattr(body, "mixture"):
            named |= {term.slot for term in body.mixture.terms} | ({body.mixture.shares} - {""})
            named |= {term.precision for term in body.mixture.terms if term.WhichOneof("coefficient") == "precision"}
            named |= {term.gate.slot for term in body.mixture.terms if term.HasField("gate")}
        if getattr(body, "copy_of", ""):
            named.add(body.copy_of)
        if hasattr(body, "distillation"):
            named |= {term.slot for term in body.distillation.teacher.terms}
        if hasattr(body, "proximal") and body.HasField("proximal"):
            named.add(body.proximal.slot)
        if step.WhichOneof("kind") is None:
            named.discard("")
    for name in sorted(named):
        if not SLOT_NAME.fullmatch(name):
            raise PlanError(f"slot name {name[:80]!r}: expected 1 to 64 letters, digits, '_' or '-'")
        if name == OWN_HEAD:
            raise PlanError(f"slot {name!r} is the client's own: its heads are in no plan and never leave the client")


def _is_partial(found: Layout, full: Layout) -> bool:
    return found.digest != full.digest and full.contains(found)
