"""Steps that only look: at data, at slots, at what others sent. What they find goes into reports, slots and uploads."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from adapters.adapter import Adapter, stack_vectors
from adapters.algebra import Coefficient, squared_distances
from adapters.codec import encode, encoding_from_proto
from client_app import ensembles, evaluation, fisher, training
from client_app.co_lora import Gate
from client_app.data import ClientData, Dataset
from client_app.inputs import improvement_weights, input_moments
from client_app.model import OWN_HEAD, PersonalModel
from client_app.sketch import ReferenceModel, take_sketch
from client_app.slots import SlotStore
from proto.fedalloy.v1 import plan_pb2, report_pb2

DEFAULT_GRADIENT_BYTES = 2**28


class PlanError(ValueError):
    """A plan cannot be carried out: an unknown step, a missing slot, or parts that do not fit."""


class Measures:
    """What the interpreter's measuring steps share: one client's model, data and slots, and the plan that is run."""

    client_id: str
    model: PersonalModel
    data: ClientData
    slots: SlotStore
    _uploads: dict[str, bytes]
    _attributions: dict[str, Tensor]
    _plan: plan_pb2.Plan
    _index: int

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

    def _sketch(self, step: plan_pb2.SketchStep) -> report_pb2.SketchResult:
        started = time.monotonic()
        if step.slot in self._uploads:
            raise PlanError(f"slot {step.slot!r} is sent twice")
        seed = training.seed_of(self._plan.seed, self.client_id, self._plan.round, self._index)
        data = self._split(step.split)
        sketch = take_sketch(ReferenceModel(self.model), step, data, self._held(step.slot), seed, self._plan.seed)
        self.slots[step.slot] = sketch.state
        encoded = encode(sketch.upload, encoding_from_proto(step.encoding), include_layout=False)
        self._uploads[step.slot] = encoded.blob
        seconds = time.monotonic() - started
        return report_pb2.SketchResult(slot=step.slot, examples=sketch.examples, norm=sketch.norm, seconds=seconds)

    def _select(self, step: plan_pb2.SelectStep) -> report_pb2.SelectResult:
        if not step.slots or step.rule not in (plan_pb2.SELECT_RULE_BEST, plan_pb2.SELECT_RULE_IMPROVEMENT):
            raise PlanError(f"rule {step.rule} over {len(step.slots)} slots, expected a known rule and at least one")
        data = self._drawn(step.split, step.samples)

        def loss(slot: str) -> float:
            self._activate(plan_pb2.Mixture(terms=[plan_pb2.Term(slot=slot, scalar=1.0)]))
            return evaluation.evaluate(self.model, data)["loss"]

        result = report_pb2.SelectResult(losses=[loss(slot) for slot in step.slots])
        if step.rule == plan_pb2.SELECT_RULE_BEST:
            best = min(range(len(step.slots)), key=lambda index: result.losses[index])
            result.weights.extend(float(index == best) for index in range(len(step.slots)))
            self.slots[step.target] = self.slots[step.slots[best]].clone()
            return result
        own = self.slots[step.target]
        result.target_loss = loss(step.target)
        moves = stack_vectors([own, *(self.slots[slot] for slot in step.slots)])[1:] - own.vector
        weights = improvement_weights(result.target_loss, torch.tensor(list(result.losses)).double(), moves)
        result.weights.extend(weights.tolist())
        self.slots[step.target] = Adapter(own.layout, own.vector + weights.to(moves.dtype) @ moves)
        return result

    def _gram(self, step: plan_pb2.GramStep) -> report_pb2.GramResult:
        if step.slot in self._uploads:
            raise PlanError(f"slot {step.slot!r} is sent twice")
        data = self._drawn(step.split, step.samples)
        self._activate(step.mixture)
        found = input_moments(self.model, data)
        self._uploads[step.slot] = encode(found, encoding_from_proto(step.encoding), include_layout=False).blob
        return report_pb2.GramResult(slot=step.slot, examples=len(data))

    def _attribute(self, step: plan_pb2.AttributeStep) -> report_pb2.AttributeResult:
        data, slots = self._split(step.split), self._loaded(step.slots)
        shares = self._held(step.shares) or ensembles.equal_shares(self.model, slots)
        found = ensembles.attribute(self.model, slots, ensembles.shares_of(shares, slots), data)
        self._attributions = {slot: found[:, index] for index, slot in enumerate(slots)}
        self.slots[step.shares] = Adapter(shares.layout, found.mean(dim=0).float())
        return report_pb2.AttributeResult(examples=len(data))

    def _loaded(self, slots: Iterable[str]) -> list[str]:
        """Slots that the model holds from now on, each once."""
        found = list(slots)
        if not found or len(set(found)) < len(found):
            raise PlanError(f"slots {found}, expected at least one and none twice")
        for slot in found:
            self._activate(plan_pb2.Mixture(terms=[plan_pb2.Term(slot=slot, scalar=1.0)]))
        return found

    def _drawn(self, split: str, samples: int) -> Dataset:
        """All examples of a split, or so many drawn without replacement."""
        data = self._split(split)
        if not samples or samples >= len(data):
            return data
        seed = training.seed_of(self._plan.seed, self.client_id, self._plan.round, self._index)
        return data.subset(next(training.batches(len(data), samples, 1, seed)))

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
        return self.data.splits[name]

    def _held(self, slot: str) -> Adapter | None:
        if slot not in self.slots:
            return None
        return self.slots[slot]
