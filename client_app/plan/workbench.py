"""The shared state of a plan's steps. A step kind's ``carry_out(bench, step)`` reads and changes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from client_app.data.arrival import StreamedDataset
from client_app.data.dataset import ClientData, Dataset, MixedDataset
from client_app.data.joined import join
from client_app.guard.policy import shown_of
from client_app.model.personal import PersonalModel
from client_app.plan.names import PlanError
from client_app.plan.seeds import batches, seed_of
from client_app.plan.slots import SlotStore
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Layout
from fedalloy_adapters.wire.codec import encode, encoding_from_proto
from proto.fedalloy.v1 import adapter_pb2, plan_pb2

if TYPE_CHECKING:
    from client_app.plan.private import PrivateTraining

JOINED = "+"
"""Joins the names of splits that a step uses together."""


@dataclass
class Workbench:
    """One client's model, data and slots, the current plan, and the results of its earlier steps."""

    plan: plan_pb2.Plan
    model: PersonalModel
    data: ClientData
    slots: SlotStore
    starts: Mapping[str, Adapter] = field(default_factory=dict)
    """Adapters by slot name; a slot that is created from a seed starts from its adapter."""
    secret: bytes = field(default=b"", repr=False)
    """Known to this client alone; decides noise that the server must not know."""
    received: dict[str, Adapter] = field(default_factory=dict)
    """What the server sent, by slot."""
    uploads: dict[str, bytes] = field(default_factory=dict)
    """What the client sends back, by slot."""
    layouts: dict[bytes, Layout] = field(default_factory=dict)
    """Layouts of what the client sends back, by digest."""
    private: PrivateTraining | None = None
    """How training keeps single examples private; None: not at all."""
    min_examples: int = 0
    """If a step would leave out fewer examples than this, it looks at all of them."""
    attributions: dict[str, Tensor] = field(default_factory=dict)
    """How much of each training example belongs to a slot, ``[n]`` float64, by slot."""
    replaced: bool = False
    """Whether a replace step has copied something."""
    index: int = 0
    """The number of the current step."""

    @property
    def seed(self) -> int:
        """The seed of the current step's draws, unless the step says otherwise."""
        return seed_of(self.plan.seed, self.plan.client_id, self.plan.round, self.index)

    def held(self, slot: str) -> Adapter | None:
        """The adapter in a slot; None if there is no such slot."""
        if slot not in self.slots:
            return None
        return self.slots[slot]

    def split(self, name: str) -> Dataset:
        """A split of the client's data, as far as it has arrived by the plan's round; ``"a+b"`` joins two splits.

        Raises:
            PlanError: the client has no such split.
        """
        if JOINED in name:
            return join([self.split(part) for part in name.split(JOINED)])
        if name not in self.data.splits:
            raise PlanError(f"no split {name!r}; this client has {', '.join(self.data.splits)}")
        data = self.data.splits[name]
        return data.until(self.plan.round) if isinstance(data, StreamedDataset) else data

    def drawn(self, split: str, samples: int) -> Dataset:
        """``samples`` examples of a split, drawn without replacement; all of them for 0, or if there are no more."""
        data = self.split(split)
        if shown_of(len(data), samples, self.min_examples) >= len(data):
            return data
        return data.subset(next(batches(len(data), samples, 1, self.seed)))

    def shown(self, split: str, examples: int) -> Dataset:
        """At most ``examples`` examples of each of a split's tasks (0: all), the same in every round."""
        data = self.split(split)
        seed = seed_of(self.plan.seed, self.plan.client_id, "evaluate", split)

        def some(part: Dataset) -> Dataset:
            if shown_of(len(part), examples, self.min_examples) >= len(part):
                return part
            return part.subset(next(batches(len(part), examples, 1, seed)).sort().values)

        if isinstance(data, MixedDataset):
            return MixedDataset.of({name: some(part) for name, part in data.parts.items()})
        return some(data)

    def fold(self, data: Dataset, fold: plan_pb2.Fold, split: str) -> Dataset:
        """One of several disjoint parts of a split's data; the parts are the same in every round.

        Raises:
            PlanError: there is no such part, or fewer examples than parts.
        """
        if not fold.index < fold.count <= len(data):
            raise PlanError(f"part {fold.index} of {fold.count} of {len(data)} examples: there is no such part")
        seed = seed_of(self.plan.seed, self.plan.client_id, "fold", split)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        return data.subset(order[fold.index :: fold.count])

    def require_unsent(self, slot: str) -> None:
        """Require that a slot is uploaded only once.

        Raises:
            PlanError: the slot is in the uploads already.
        """
        if slot in self.uploads:
            raise PlanError(f"slot {slot!r} is sent twice")

    def upload(self, slot: str, adapter: Adapter, encoding: adapter_pb2.Encoding) -> None:
        """Encode an adapter and send it under a slot's name."""
        self.layouts[adapter.layout.digest] = adapter.layout
        self.uploads[slot] = encode(adapter, encoding_from_proto(encoding), include_layout=False).blob
