"""Every registered strategy over real clients: two rounds, real training of a tiny model, no message ever rejected.

Clients share one model in memory and keep their slots on disk; what a client runs is the interpreter itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.supercore.task_identity import TaskIdentity

from client_app.data.dataset import ClientData, Dataset
from client_app.guard.privacy import PrivacyError, require_private_steps
from client_app.model.personal import PersonalModel
from client_app.plan.interpreter import Interpreter
from client_app.plan.sketch import ReferenceModel
from client_app.plan.slots import SlotStore
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.parts import layouts_of_plan
from fedalloy_adapters.wire.codec import decode
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.clients.rehearsal import why_not_for_private_clients
from strategies import STRATEGIES
from strategies.framework.answers import client_from
from strategies.framework.exchange import MAX_NUMBER
from strategies.framework.limits import Limits
from strategies.framework.steps import Training
from tests.fedalloy_adapters.tiny_vit import base_of, images
from tests.strategies.conftest import FakeGrid, FakeNode, layout_of

NAMES = ("ada", "ben", "cyd")
TRAINING = Training(
    local_steps=6, batch_size=32, learning_rate=0.01, evaluate_split="validation",
    uplink_encoding="int8", downlink_encoding="int8",
)  # fmt: skip
"""Encoded, which most tests are not."""


def data_of(index: int) -> ClientData:
    """Two classes by the brightness of the upper half, which one client sees the other way round."""
    splits = {}
    for number, (split, count) in enumerate((("train", 16 + 4 * index), ("validation", 16), ("test", 4))):
        pixels = images(count, seed=10 * index + number)
        bright = (pixels[:, 0, :4].mean(dim=(1, 2)) > 0).long()
        splits[split] = Dataset({"pixel_values": pixels}, 1 - bright if index == 2 else bright)
    return ClientData("toy", "image-classification", splits)


@pytest.fixture(scope="module")
def model() -> PersonalModel:
    torch.set_num_threads(1)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # what Flower's process start sets
    return PersonalModel(base_of(), 2, 4.0)


class RealNode(FakeNode):
    """A node whose plans are carried out by the client's own interpreter."""

    def __init__(self, index: int, model: PersonalModel, folder: Path) -> None:
        super().__init__(NAMES[index], model.layout, len(data_of(index).splits["train"]))
        self.data, self.model = data_of(index), model
        self.store = SlotStore(folder / self.name, "tiny", lambda: model.heads, own_layout=model.own_layout)
        self.folder = folder / self.name
        self.reports: list[report_pb2.Report] = []

    def registration(self) -> report_pb2.Registration:
        found = super().registration()
        found.tasks[0].kind = "image-classification"
        found.reference.CopyFrom(ReferenceModel(self.model).layout.to_proto())
        return found

    def run(self, plan: plan_pb2.Plan, blobs: Mapping[str, bytes]) -> tuple[report_pb2.Report, dict[str, bytes]]:
        with self.store.transaction(plan.round) as slots:
            report, uploads = Interpreter(self.name, self.model, self.data, slots).run(plan, blobs)
        self.plans.append(plan)
        self.reports.append(report)
        return report, uploads


def said_of_privacy(name: str) -> bool | None:
    """Whether a strategy works under differential privacy, by docs/site.md; None where it does not say."""
    page = (Path(__file__).parents[2] / "docs" / "site.md").read_text()
    (words,) = re.findall(r"So a strategy works if (.*?are refused)\.", page, re.DOTALL)
    work, refused = (set(re.findall(r"`([a-z-]+)`", part)) & set(STRATEGIES) for part in words.split("says it for"))
    assert min(len(work), len(refused)) >= 8
    return True if name in work else False if name in refused else None


def is_private(plan: plan_pb2.Plan) -> bool:
    """Whether a client under differential privacy carries the plan out."""
    try:
        require_private_steps(plan)
    except PrivacyError:
        return False
    return True


def losses_of_training(node: RealNode) -> list[report_pb2.TrainResult]:
    """Results of what was trained on labels: where outputs alone are the target, the labels' loss may rise."""
    found = []
    for plan, report in zip(node.plans, node.reports, strict=True):
        for step, result in zip(plan.steps, report.results, strict=True):
            if step.HasField("train"):
                found.append(result.train)
            if step.HasField("distill") and (step.distill.label_weight or not step.distill.HasField("label_weight")):
                found.append(result.distill.train)
    return [train for train in found if train.steps]


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_two_rounds_with_real_clients(
    name: str, model: PersonalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("strategies.framework.flower.log", lambda level, text, *args: warnings.append(text % args))
    model.unload_all()
    nodes = [RealNode(index, model, tmp_path) for index in range(3)]
    strategy = STRATEGIES[name](training=TRAINING, seed=3)
    result = strategy.start(FakeGrid(nodes), initial_arrays=ArrayRecord(), num_rounds=2)
    assert sorted(result.evaluate_metrics_clientapp) == [1, 2]
    assert not [line for line in warnings if not line.startswith("\t")]
    for node in nodes:
        assert len(node.reports) == 4  # two rounds, each with its delivery
        assert (node.folder / "adapter").is_dir()
        losses = [
            result.evaluate.metrics["loss"]
            for report in node.reports
            for result in report.results
            if result.HasField("evaluate") and result.evaluate.label == "personal"
        ]
        assert losses[-1] != losses[0]  # the model is no longer the base
    trains = [train for node in nodes for train in losses_of_training(node)]
    assert len(trains) >= 6
    # Every batch is the whole split, so that these are the same loss before and after.
    longer = [train for train in trains if train.steps > 1]
    assert sum(train.last_loss < train.first_loss for train in longer) >= 0.8 * len(longer)
    private = all(is_private(plan) for node in nodes for plan in node.plans)
    assert said_of_privacy(name) in (None, private)
    again = STRATEGIES[name](training=TRAINING, seed=3, rounds=2)
    asked = why_not_for_private_clients(again, client_from(nodes[0].registration(), model.layout, 1))
    assert bool(asked) != private, asked


class Huge(FakeNode):
    """Sends the largest numbers that the server accepts, and looks at what it is sent."""

    largest = 0.0

    def run(self, plan: plan_pb2.Plan, blobs: Mapping[str, bytes]) -> tuple[report_pb2.Report, dict[str, bytes]]:
        known = layouts_of_plan(self.layout, plan.steps)
        for blob in blobs.values():
            sent = decode(blob, layouts=known)
            assert sent.is_finite
            self.largest = max(self.largest, float(sent.vector.abs().max()))
        return super().run(plan, blobs)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_nobody_is_sent_what_the_server_would_not_take(name: str) -> None:
    """If all clients send such numbers, with alternating signs, no bound relative to the others helps."""
    layout = layout_of()

    def move(who: str, round_: int, received: Adapter) -> Adapter:
        return Adapter(received.layout, torch.full_like(received.vector, 9e8 * (-1) ** (round_ // 2)))

    nodes = [Huge(who, layout, 10 * (index + 1), move) for index, who in enumerate(NAMES)]
    exact = replace(TRAINING, uplink_encoding="fp32", downlink_encoding="fp32")  # such numbers are too large for fp16
    strategy = STRATEGIES[name](training=exact, seed=3)
    strategy.limits = Limits(max_update_ratio=0.0)
    strategy.start(FakeGrid(nodes), initial_arrays=ArrayRecord(), num_rounds=3)
    assert max(node.largest for node in nodes) <= MAX_NUMBER
