"""Carries out a plan, step by step. It knows steps and slots, and no algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from google.protobuf.message import Message
from torch import Tensor, nn

from client_app.data.arrival import StreamedDataset
from client_app.data.dataset import ClientData, Dataset
from client_app.model.co_lora import Gate, GateError
from client_app.model.personal import OWN_HEAD, PersonalModel
from client_app.plan import evaluation, fisher, replacement, training
from client_app.plan.distillation import MixtureTeacher
from client_app.plan.measures import Measures
from client_app.plan.names import PlanError, require_slot_names
from client_app.plan.progress import tick
from client_app.plan.sketch import ReferenceModel, take_sketch
from client_app.plan.slots import SlotError, SlotStore
from client_app.settings import Policy
from fedalloy_adapters.adapter import Adapter, joined
from fedalloy_adapters.algebra import Coefficient, precision_mean, squared_distances, stack, truncate, weighted_sum
from fedalloy_adapters.codec import decode, encode, encoding_from_proto
from fedalloy_adapters.layout import Factor, Layout
from fedalloy_adapters.parts import layout_of_part, layouts_of_plan
from proto.fedalloy.v1 import plan_pb2, report_pb2

DEFAULT_GRADIENT_BYTES = 2**28


class Interpreter(Measures):
    """One client's model, data and slots; :meth:`run` carries out one plan.

    Args:
        client_id: this client; a plan for another one is refused.
        model: the base model with the client's layout.
        data: the client's splits.
        slots: the client's slots, inside a transaction.
        starts: adapters that slots of these names start from when they are created from a seed.
        policy: what this client lets a plan ask of it.
    """

    def __init__(
        self,
        client_id: str,
        model: PersonalModel,
        data: ClientData,
        slots: SlotStore,
        starts: Mapping[str, Adapter] | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.client_id = client_id
        self.model = model
        self.data = data
        self.slots = slots
        self.starts = starts or {}
        self.policy = policy or Policy()
        self._received: dict[str, Adapter] = {}
        self._uploads: dict[str, bytes] = {}
        self._plan = plan_pb2.Plan()
        self._index = 0
        self._replaced = False
        self._attributions: dict[str, Tensor] = {}
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
            "replace": self._replace,
            "distill": self._distill,
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
        require_slot_names(plan, blobs)
        self._require_allowed(plan)
        self._plan, self._uploads, self._replaced, self._attributions = plan, {}, False, {}
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
        self._require_small_uploads()
        return report, self._uploads

    def _require_allowed(self, plan: plan_pb2.Plan) -> None:
        """Before anything is done: this client's owner decides what a plan may ask."""
        for index, step in enumerate(plan.steps):
            kind = step.WhichOneof("kind")
            asked = [kind] if kind != "distill" else [kind, "train"]  # which it contains, with weights that may be 0
            missing = [name for name in asked if name is not None and name not in self.policy.allowed]
            if missing:
                raise PlanError(
                    f"client {self.client_id!r} refuses step {index} ({kind}); its client.allow-steps has "
                    f"{', '.join(self.policy.allowed)}, and not {' and '.join(missing)}"
                )

    def _require_small_uploads(self) -> None:
        size, most = sum(map(len, self._uploads.values())), self.policy.max_upload_mb * 10**6
        if most and size > most:
            raise PlanError(
                f"client {self.client_id!r} does not send {size / 10**6:.3f} MB ({', '.join(sorted(self._uploads))}); "
                f"its client.max-upload-mb is {self.policy.max_upload_mb:g}"
            )

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

    def _train(self, step: plan_pb2.TrainStep, teacher: training.Teacher | None = None) -> report_pb2.TrainResult:
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
        seed = training.seed_of_step(self._plan, self._index, step, replaced=self._replaced)
        weights = self._attributed(step) if step.attributed_to else None
        try:
            pull, order = anchor or None, self._order(step, data)
            result = training.train(self.model, step, parameters, data, seed, pull, teacher, weights, order)
        except training.TrainingError:
            if not step.keep_on_divergence:
                raise
            self.slots.losses.pop(step.record, None)
            return report_pb2.TrainResult(diverged=True)
        _name_tasks(result, self.data)
        if step.record:
            share = step.record_batch_share
            found = {task: loss.batch_share if share else loss.mean for task, loss in result.task_losses.items()}
            self.slots.losses[step.record] = self.slots.losses.get(step.record, {}) | found
        for slot in [*step.slots, *own]:
            self.slots[slot] = self.model.read(slot)
        return result

    def _replace(self, step: plan_pb2.ReplaceStep) -> report_pb2.ReplaceResult:
        result = replacement.carry_out(step, self.data, self.model.layout, self.slots)
        self._replaced = self._replaced or any(task.replaced for task in result.tasks)
        return result

    def _distill(self, step: plan_pb2.DistillStep) -> report_pb2.DistillResult:
        self._activate(step.teacher)  # which loads it
        slots, coefficients = self._terms(step.teacher)
        taught = dict(zip(slots, coefficients, strict=True))
        if set(step.train.slots) & set(slots):
            raise PlanError("a slot that is trained cannot be its own teacher")
        teacher = MixtureTeacher(self.model, taught, step, self.data.task)
        result = self._train(step.train, teacher)
        return report_pb2.DistillResult(train=result, divergences=teacher.divergences())

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
        if not merged.is_finite:
            raise PlanError(f"the merge of {', '.join(slots)} is not finite; are its weights too large?")
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

    def _fisher(self, step: plan_pb2.FisherStep) -> report_pb2.FisherResult:
        if step.samples < 1 or not step.relative_damping >= 0:
            raise PlanError(
                f"{step.samples} samples and damping {step.relative_damping:g}, expected one sample and no less than 0"
            )
        layout = self.model.layout
        pair = tuple(self.slots[slot] for slot in (step.first, step.second))
        for slot, adapter in zip((step.first, step.second), pair, strict=True):
            if adapter.layout.digest != layout.digest:
                raise PlanError(f"slot {slot!r} has {layout.describe_difference(adapter.layout)}")
            self.model.load(slot, adapter)
        found = fisher.moments(
            self.model,
            (step.first, step.second),
            layout,
            self._split(step.split),
            samples=step.samples,
            seed=training.seed_of(self._plan.seed, self.client_id, self._plan.round, self._index),
            max_bytes=step.max_bytes or DEFAULT_GRADIENT_BYTES,
        )
        damping = fisher.damping_of(found, step.relative_damping)
        blind = (found.first + found.second + damping == 0).float()  # neither knows anything: equal precisions
        for slot, information in ((step.keep_first, found.first), (step.keep_second, found.second)):
            if slot:
                self.slots[slot] = Adapter(layout, information + damping + blind)
        return fisher.result(pair, found, damping, in_delta_space=step.in_delta_space)

    def _distance(self, step: plan_pb2.DistanceStep) -> report_pb2.DistanceResult:
        squared = squared_distances(self.slots[step.first], self.slots[step.second])
        return report_pb2.DistanceResult(squared=[squared[module] for module in self.model.layout.modules])

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
        if step.record:
            names = {task: f"{task}/loss" if self.data.tasks else "loss" for task in self.data.each_task}
            losses = {task: metrics[name] for task, name in names.items() if math.isfinite(metrics.get(name, math.inf))}
            self.slots.losses[step.record] = losses
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

    def _sketch(self, step: plan_pb2.SketchStep) -> report_pb2.SketchResult:
        started = time.monotonic()
        if step.slot in self._uploads:
            raise PlanError(f"slot {step.slot!r} is sent twice")
        seed = training.seed_of(self._plan.seed, self.client_id, self._plan.round, self._index)
        readings = self.data.for_reference
        data = readings[step.split] if step.split in readings else self._split(step.split)
        sketch = take_sketch(ReferenceModel(self.model), step, data, self._held(step.slot), seed, self._plan.seed)
        self.slots[step.slot] = sketch.state
        encoded = encode(sketch.upload, encoding_from_proto(step.encoding), include_layout=False)
        self._uploads[step.slot] = encoded.blob
        seconds = time.monotonic() - started
        return report_pb2.SketchResult(slot=step.slot, examples=sketch.examples, norm=sketch.norm, seconds=seconds)

    def _held(self, slot: str) -> Adapter | None:
        if slot not in self.slots:
            return None
        return self.slots[slot]

    def _activate(self, mixture: plan_pb2.Mixture) -> None:
        if mixture.shares:
            raise PlanError("an ensemble can be evaluated and saved, not trained, merged or measured")
        slots, coefficients = self._terms(mixture)
        if self.model.own_layout is not None:
            if OWN_HEAD not in self.slots:
                self.slots[OWN_HEAD] = Adapter.zeros(self.model.own_layout)
            self.model.load(OWN_HEAD, self.slots[OWN_HEAD])
        for slot in [*slots, *{gate.slot for gate in coefficients if isinstance(gate, Gate)}]:
            self.model.load(slot, self.slots[slot])
        self.model.activate(dict(zip(slots, coefficients, strict=True)))

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

    def _terms(self, mixture: plan_pb2.Mixture) -> tuple[list[str], list[Coefficient | Gate]]:
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

    def _split(self, name: str) -> Dataset:
        if name not in self.data.splits:
            raise PlanError(f"no split {name!r}; this client has {', '.join(self.data.splits)}")
        data = self.data.splits[name]
        return data.until(self._plan.round) if isinstance(data, StreamedDataset) else data

    def _order(self, step: plan_pb2.TrainStep, data: Dataset) -> list[Tensor] | None:
        """The batches of data that arrive over the rounds."""
        if not isinstance(data, StreamedDataset):
            return None
        plans = plan_pb2.Plan(seed=self._plan.seed, client_id=self._plan.client_id)

        def seed_in(round_: int) -> int:
            plans.round = round_
            return training.seed_of_step(plans, self._index, step, replaced=self._replaced)

        return data.batches(step.batch_size, step.steps, self._plan.round, seed_in)


def _name_tasks(result: report_pb2.TrainResult, data: ClientData) -> None:
    """Batches of a client with one task bear no name."""
    if "" in result.task_losses:
        result.task_losses[data.task].CopyFrom(result.task_losses[""])
        del result.task_losses[""]


def _is_partial(found: Layout, full: Layout) -> bool:
    return found.digest != full.digest and full.contains(found)
