"""A client over the tiny ViT that carries out plans, and what its slots hold afterwards."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from client_app.data.dataset import ClientData, Dataset
from client_app.model.personal import PersonalModel
from client_app.plan.interpreter import Interpreter
from client_app.plan.slots import SlotStore
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.framework import steps
from strategies.framework.steps import Training
from tests.fedalloy_adapters.samples import random_adapter
from tests.fedalloy_adapters.tiny_vit import CLASSES, images

EXAMPLES = 12
"""Of each split; all three are the same."""


def data_of(examples: int = EXAMPLES) -> Dataset:
    labels = torch.randint(CLASSES, (examples,), generator=torch.Generator().manual_seed(3))
    return Dataset({"pixel_values": images(examples)}, labels)


class Client:
    """Slots at random, one for each letter of ``names``, and plans over them."""

    def __init__(self, model: PersonalModel, folder: Path, names: str = "abc") -> None:
        model.unload_all()
        self.model, self.data = model, data_of()
        self.store = SlotStore(folder, "tiny", lambda: model.heads)
        self.slots = {name: random_adapter(model.layout, seed, scale=0.3) for seed, name in enumerate(names)}
        self.uploads: dict[str, bytes] = {}

    def run(self, *plan: plan_pb2.Step) -> list[report_pb2.StepResult]:
        splits = {"train": self.data, "validation": self.data, "test": self.data}
        with self.store.transaction(1) as slots:
            for name, adapter in self.slots.items():
                slots[name] = adapter
            interpreter = Interpreter("ada", self.model, ClientData("t", "image-classification", splits), slots)
            message = plan_pb2.Plan(version=1, run_name="r", client_id="ada", round=1, seed=1, steps=plan)
            report, self.uploads = interpreter.run(message, {})
            self.slots = {name: slots[name] for name in slots.names()}
        return list(report.results)

    def loss(self, slot: str) -> float:
        (result,) = self.run(steps.evaluate(Training(), steps.mixture(slot)))
        return float(result.evaluate.metrics["loss"])

    def logits(self, slot: str) -> Tensor:
        self.model.load(slot, self.slots[slot])
        self.model.activate({slot: 1.0})
        self.model.module.eval()
        with torch.no_grad():
            return self.model.logits(self.data.inputs)
