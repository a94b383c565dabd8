"""Clients with several tasks on a tiny FLAVA with random weights: no training beforehand, milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from client_app.data.dataset import Base, ClientData, Dataset
from client_app.guard.policy import Policy
from client_app.model.bases.multi_task import TaskSpec, multi_task_base
from client_app.model.personal import PersonalModel
from client_app.plan.interpreter import Interpreter
from client_app.plan.slots import SlotStore
from client_app.scenarios import digits_multimodal as scenario
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.parts import layouts_of_plan
from fedalloy_adapters.wire.codec import decode, encode
from proto.fedalloy.v1 import plan_pb2, report_pb2

TINY = replace(scenario.RECIPE, name="toy-flava", width=16, layers=1, heads=2, mlp=16, steps=0)
WORDS = len(scenario.VOCABULARY.words)


def base_of(tasks: Sequence[TaskSpec]) -> Base:
    return multi_task_base("toy", TINY.fingerprint, scenario._build(TINY), tasks, (2, 0))


def examples_of(task: TaskSpec, count: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = {}, torch.randint(2, (count,), generator=generator)
    if "image" in task.modalities:
        inputs["pixel_values"] = torch.randn(count, 1, 8, 8, generator=generator)
    if "text" in task.modalities:
        inputs["input_ids"] = torch.randint(3, WORDS, (count, 5), generator=generator)
        inputs["attention_mask"] = torch.ones(count, 5, dtype=torch.long)
        inputs["attention_mask"][::2, 4:] = 0
        inputs["input_ids"][::2, 4:] = 0
    if task.kind in ("causal-lm", "image-text-to-text"):
        labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
        labels[:, :2] = -100
    return Dataset(inputs, labels, task.kind)


def data_of(tasks: Sequence[TaskSpec], counts: Sequence[int], seed: int = 0) -> ClientData:
    found = []
    for number, (task, count) in enumerate(zip(tasks, counts, strict=True)):
        splits = {
            split: examples_of(task, size, 100 * seed + 10 * number + index)
            for index, (split, size) in enumerate({"train": count, "validation": 3, "test": 4}.items())
        }
        decode_ = scenario.VOCABULARY.decode if task.kind in ("causal-lm", "image-text-to-text") else None
        found.append(
            ClientData(task.name, task.kind, splits, decode=decode_, modalities=task.modalities, groups=task.groups)
        )
    return ClientData.of_tasks(found)


SPECS = {task: scenario.spec_of(task) for task in scenario.TASKS}


@dataclass
class ToyClient:
    """A client whose slots lie in ``folder``; :meth:`run` carries out one plan as the executor does."""

    folder: Path
    tasks: Sequence[str] = ("digit", "number")
    counts: Sequence[int] = (9, 7)
    name: str = "ada"
    dropout: float = 0.0
    seed: int = 0
    model: PersonalModel = field(init=False)
    data: ClientData = field(init=False)
    uploads: dict[str, bytes] = field(default_factory=dict)
    report: report_pb2.Report = field(default_factory=report_pb2.Report)

    def __post_init__(self) -> None:
        specs = [SPECS[task] for task in self.tasks]
        self.model = PersonalModel(base_of(specs), 2, 4.0, self.dropout)
        self.data = data_of(specs, self.counts, self.seed)

    def run(
        self, round_: int, steps: Iterable[plan_pb2.Step], adapters: Mapping[str, Adapter] | None = None, seed: int = 3
    ) -> dict[str, Adapter]:
        """The slots after the plan."""
        plan = plan_pb2.Plan(version=1, run_name="run", client_id=self.name, round=round_, seed=seed, steps=steps)
        blobs = {slot: encode(adapter).blob for slot, adapter in (adapters or {}).items()}
        store = SlotStore(self.folder, "toy", lambda: self.model.heads)
        with store.transaction(round_) as slots:
            # Its tests look at single examples, which an owner's default policy refuses.
            interpreter = Interpreter(self.name, self.model, self.data, slots, policy=Policy(min_examples=1))
            self.report, self.uploads = interpreter.run(plan, blobs)
            found = {slot: slots[slot].clone() for slot in slots.names()}
            self.losses = {name: dict(losses) for name, losses in slots.losses.items()}
        self.model.unload_all()
        self.sent = {
            slot: decode(blob, layouts=layouts_of_plan(self.model.layout, plan.steps))
            for slot, blob in self.uploads.items()
        }
        return found

    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    sent: dict[str, Adapter] = field(default_factory=dict)
