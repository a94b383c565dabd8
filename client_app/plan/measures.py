"""Steps that compare slots on data, and what ensembles need; a part of the interpreter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from client_app.data.dataset import ClientData, Dataset
from client_app.model.co_lora import Gate
from client_app.model.personal import PersonalModel
from client_app.plan import ensembles, evaluation, training
from client_app.plan.gram import improvement_weights, input_moments
from client_app.plan.names import PlanError
from client_app.plan.slots import SlotStore
from fedalloy_adapters.adapter import Adapter, stack_vectors
from fedalloy_adapters.algebra import Coefficient
from fedalloy_adapters.codec import encode, encoding_from_proto
from proto.fedalloy.v1 import plan_pb2, report_pb2


class Measures:
    """One client's model, data and slots, and the plan that is run; see :mod:`client_app.plan.interpreter`."""

    client_id: str
    model: PersonalModel
    data: ClientData
    slots: SlotStore
    _uploads: dict[str, bytes]
    _attributions: dict[str, Tensor]
    _plan: plan_pb2.Plan
    _index: int

    @abstractmethod
    def _activate(self, mixture: plan_pb2.Mixture) -> None:
        """Make the model this mixture."""

    @abstractmethod
    def _terms(self, mixture: plan_pb2.Mixture) -> tuple[list[str], list[Coefficient | Gate]]:
        """Slots and coefficients."""

    @abstractmethod
    def _split(self, name: str) -> Dataset:
        """A split of the client's data."""

    @abstractmethod
    def _held(self, slot: str) -> Adapter | None:
        """A slot, where there is one."""

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
