"""TAP over clients with different tasks, modalities and layouts: real round loop, real client code, a toy FLAVA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from client_app.model.personal import PersonalModel
from client_app.scenarios import ScenarioError, load_scenario
from client_app.scenarios import digits_multimodal as scenario
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.groups import union
from fedalloy_adapters.layout import Layout
from fedalloy_adapters.wire.codec import decode
from fedalloy_adapters.wire.flower_records import PLAN_TYPE, unpack
from proto.fedalloy.v1 import report_pb2
from server_app.run.run_directory import RunDirectory
from tests.in_process import FIRST_NODE
from tests.server_app.conftest import Runner
from tests.toys.multi_task_toys import TINY

TASKS = ((("digit",), 0), (("digit", "number"), 1), (("caption",), 0))
CLIENTS = len(TASKS)
TINY_RUN: dict[str, Any] = {
    "clients": CLIENTS, "scenario": "digits-multimodal", "num_server_rounds": 2, "local_steps": 2, "batch_size": 4,
    "lora_r": 2, "tap__distill_steps": 2, "learning_rate": 0.05, "on_divergence": "last",  # bytes of one delivery
}  # fmt: skip
INF = float("inf")


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenario, "RECIPE", TINY)
    monkeypatch.setattr(scenario, "CLIENTS", TASKS)
    monkeypatch.setattr(scenario, "TESTED", dict.fromkeys(scenario.TESTED, 12))
    monkeypatch.setattr(scenario, "GENERATED", 2)


def layouts(runs_dir: Path) -> list[Layout]:
    bases = [load_scenario("digits-multimodal", index, CLIENTS, 0, runs_dir / ".cache")[0] for index in range(CLIENTS)]
    return [PersonalModel(base, 2, 16.0).layout for base in bases]


def model_of(directory: RunDirectory) -> torch.Tensor:
    loaded = directory.newest_checkpoint()
    assert loaded is not None
    return loaded.state.tensors["model"]


def rounds(directory: RunDirectory, phase: str) -> list[dict[str, Any]]:
    return [record for record in directory.rounds() if record["phase"] == phase]


def moved(directory: RunDirectory) -> dict[str, int]:
    counted = json.loads((directory.path / "summary.json").read_text())["bytes"]
    return {way: counted[way]["tensor"] for way in ("up", "down")}


def test_the_server_sees_fedavg_whatever_the_margin_for_the_same_bytes(run: Runner, runs_dir: Path) -> None:  # T7, T22
    plain = run(run_name="plain", strategy="fedavg", **TINY_RUN)
    expected = model_of(plain)
    sizes = [layout.size for layout in layouts(runs_dir)]
    assert len(set(sizes)) == 3
    bytes_up = {"up": 4 * 2 * sum(sizes), "down": 4 * 3 * sum(sizes)}  # two rounds, and the delivery
    assert moved(plain) == bytes_up
    replaced = {}
    for margin in (-INF, 0.01, INF):
        found = run(run_name=f"margin-{margin}", strategy="tap", tap__margin=margin, tap__margins="", **TINY_RUN)
        assert torch.equal(model_of(found), expected)
        assert moved(found) == bytes_up
        records = rounds(found, "train")
        replaced[margin] = [record["settled"]["replaced"] for record in records]
        assert set(records[0]["settled"]["replacements"]) == {f"client-{index}" for index in range(CLIENTS)}
        assert set(records[0]["settled"]["replacements"]["client-1"]) == {"digit", "number"}
    assert replaced[-INF] == [4, 4]  # two clients with one task, one with two
    assert replaced[0.01][0] == 4  # nothing is known of the personal adapters yet
    assert replaced[INF] == [0, 0]
    metrics = rounds(found, "deliver")[0]["clients"]["client-1"]["metrics"]
    assert set(metrics) == {"global", "stage1", "finetuned", "distilled", "personal", "held-out"}
    assert {"digit/accuracy", "number/accuracy", "digit/loss", "number/loss", "loss", "accuracy"} == set(
        metrics["personal"]
    )
    captions = rounds(found, "deliver")[0]["clients"]["client-2"]["metrics"]["personal"]
    assert {"caption/exact_match", "caption/rouge_l", "caption/perplexity"} <= set(captions)


def test_every_number_is_the_average_over_the_clients_that_have_it(run: Runner, runs_dir: Path) -> None:  # T8
    uploads: dict[int, Adapter] = {}
    found = layouts(runs_dir)

    def listen(node: int, message: Message, reply: Message | None) -> Message | None:
        if reply is not None and message.metadata.message_type == PLAN_TYPE:
            _, blobs = unpack(reply.content, "report", report_pb2.Report)
            for blob in blobs.values():
                uploads[node - FIRST_NODE] = decode(blob, expected=found[node - FIRST_NODE])
        return reply

    directory = run(strategy="tap", tamper=listen, **(TINY_RUN | {"num_server_rounds": 1, "max_examples_ratio": 0.0}))
    model = Adapter(union(found), model_of(directory))
    examples = [
        sum(len(task.splits["train"]) for task in scenario.load_client(index, CLIENTS, 0).each_task.values())
        for index in range(CLIENTS)
    ]
    shares = set()
    for entry, tensor in model.items():
        owners = [index for index in range(CLIENTS) if entry.name in found[index].by_name]
        total = sum(examples[index] for index in owners)
        expected = sum(examples[i] / total * uploads[i][entry.module, entry.factor].double() for i in owners)
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
        shares.add(len(owners))
    assert shares == {1, 2, 3}  # from a head that one client has to the parts that all clients share


@pytest.mark.parametrize("strategy", ["local", "potara"])
def test_other_strategies_run_over_different_layouts(run: Runner, strategy: str) -> None:
    options: dict[str, Any] = {"potara__search_points": 3, "potara__fisher_samples": 3} if strategy == "potara" else {}
    directory = run(strategy=strategy, **TINY_RUN, **options)
    summary = json.loads((directory.path / "summary.json").read_text())
    assert len(summary["clients"]) == CLIENTS


def test_a_client_without_a_place_in_the_scenario(runs_dir: Path) -> None:
    with pytest.raises(ScenarioError, match="'digits-multimodal' is for 1 to 200 clients, got partition-id = 3 and"):
        load_scenario("digits-multimodal", 3, 3, 0, runs_dir / ".cache")
