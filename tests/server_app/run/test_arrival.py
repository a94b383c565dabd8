"""Runs whose clients' data arrive over the rounds, and personal models on other clients' data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from client_app.data.arrival import StreamedDataset
from client_app.plan import training
from client_app.scenarios import digits_mixed, digits_multimodal
from client_app.settings import SettingsError
from server_app.tools.cli import app
from strategies.framework.options import OptionError
from tests.benchmarks.accuracy.self_others import load_clients, scores_of
from tests.server_app.conftest import Runner
from tests.toys.multi_task_toys import TINY

Batches = list[tuple[int, list[int]]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """What clients trained on: how many examples there were, and the classes of the batches."""
    found: Batches = []
    plain = training.train

    def train(*arguments: Any) -> Any:
        data, order = arguments[3], arguments[8]
        assert isinstance(data, StreamedDataset)
        found.append((len(data), torch.cat([data.labels[chosen] for chosen in order]).tolist()))
        return plain(*arguments)

    monkeypatch.setattr(training, "train", train)
    return found


def test_tasks_that_arrive_one_after_another_are_the_same_in_every_run(run: Runner, seen: Batches) -> None:
    dynamic = {"clients": 2, "num_server_rounds": 4, "task_arrival": "dynamic", "strategy": "local"}
    one, two = (run(run_name=name, **dynamic) for name in ("one", "two"))
    first, again = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert first == again
    for client in (0, 1):
        examples, classes = zip(*first[client::2], strict=True)
        assert list(examples) == sorted(set(examples))
        assert examples[-1] in (50, 90)
        assert len(set(classes[0])) <= 3 < len(set(classes[0]) | set(classes[1]) | set(classes[2]))
    adapters = [d.path / "clients" / "client-0" / "adapter" / "adapter_model.safetensors" for d in (one, two)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.parametrize("strategy", ["fedmosaic", "tap"])
def test_a_clients_tasks_come_one_after_another(
    run: Runner, seen: Batches, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """FedMosaic's dynamic setting: several tasks per client, replay, scores of all tasks from the first round on."""
    monkeypatch.setattr(digits_multimodal, "RECIPE", TINY)
    monkeypatch.setattr(digits_multimodal, "TESTED", dict.fromkeys(digits_multimodal.TESTED, 12))
    monkeypatch.setattr(digits_multimodal, "GENERATED", 2)
    options: dict[str, Any] = {"fedmosaic__sketch_batches": 1} if strategy == "fedmosaic" else {"tap__distill_steps": 1}
    directory = run(
        clients=2, scenario="digits-tasks", strategy=strategy, num_server_rounds=4, task_arrival="dynamic",
        local_steps=2, batch_size=8, lora_r=2, **options,
    )  # fmt: skip
    each_round = [set(classes) for _, classes in seen]
    assert len(each_round[0]) == 1
    assert len(set.union(*each_round)) == 4, "the labels of a client with several tasks are the tasks' numbers"
    records = [record for record in directory.rounds() if record["phase"] == "train"]
    assert all(record["settled"]["merged"] == 2 for record in records)
    scored = records[0]["clients"]["client-0"]["metrics"]["personal"]
    assert {name.split("/")[0] for name in scored if "/" in name} == {"number", "compare", "caption", "answer"}


def test_a_personal_model_is_tried_on_all_clients_data(run: Runner, runs_dir: Path) -> None:
    directory = run(clients=3, strategy="potara", potara__weight="half", evaluate_split="test")
    config = {"scenario": "digits", "seed": 0}
    scores = scores_of(directory.path, load_clients(runs_dir, [0, 1, 2], 3, config), "test")
    reported = json.loads((directory.path / "summary.json").read_text())["clients"]
    for name, value in scores.own.items():
        assert value == pytest.approx(reported[name]["accuracy"], abs=1e-6)
    others = scores.others["client-0"]
    assert others is not None
    assert others != pytest.approx(scores.own["client-0"])
    assert scores.mean("others") is not None


def test_a_model_of_several_tasks_is_tried_on_those_that_others_have_too(
    run: Runner, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ((("digit",), 0), (("digit", "number"), 1), (("caption",), 0))
    for name, value in (("RECIPE", TINY), ("CLIENTS", tasks), ("TESTED", dict.fromkeys(digits_multimodal.TESTED, 12))):
        monkeypatch.setattr(digits_multimodal, name, value)
    config: dict[str, Any] = {"scenario": "digits-multimodal", "lora_r": 2, "num_server_rounds": 1, "local_steps": 2}
    directory = run(clients=3, strategy="tap", tap__distill_steps=2, batch_size=4, **config)
    scores = scores_of(directory.path, load_clients(runs_dir, [0, 1, 2], 3, {"scenario": "digits-multimodal"}), "test")
    reported = json.loads((directory.path / "summary.json").read_text())["clients"]
    assert scores.own["client-0"] == pytest.approx(reported["client-0"]["accuracy"], abs=1e-6)
    assert scores.own["client-1"] == pytest.approx(reported["client-1"]["accuracy"], abs=1e-6)
    assert scores.others["client-0"] is not None
    assert scores.others["client-2"] is None  # nobody else writes captions


def test_a_model_with_p_and_q_and_gates_is_tried_as_it_was_saved(
    run: Runner, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, width, depth in (("SMALL", 16, 2), ("LARGE", 24, 3)):
        recipe = replace(getattr(digits_mixed, name), width=width, depth=depth, heads=2, mlp=2 * width, steps=3)
        monkeypatch.setattr(digits_mixed, name, recipe)
    directory = run(clients=4, scenario="digits-mixed", strategy="fedmosaic", lora_r=2, lora_blocks=1)
    scores = scores_of(directory.path, load_clients(runs_dir, [0, 1, 2, 3], 4, {"scenario": "digits-mixed"}), "test")
    reported = json.loads((directory.path / "summary.json").read_text())["clients"]
    assert scores.own == {name: pytest.approx(found["accuracy"], abs=0.005) for name, found in reported.items()}


def test_the_data_folder_is_named_on_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[Any] = []

    def compare(*arguments: Any, **options: Any) -> None:
        told.append(options["options"])
        raise OptionError("that is enough")

    monkeypatch.setattr("server_app.tools.compare.command.compare", compare)
    result = CliRunner().invoke(app, ["compare", "pacs", "--data", str(tmp_path), "--set", "seed=1"])
    assert result.exit_code == 1
    assert told == [{"seed": 1, "data-root": str(tmp_path)}]
    result = CliRunner().invoke(app, ["align", "mixed-arch"])
    assert "reads its data from a folder" in result.output


def test_there_are_three_ways_to_arrive() -> None:
    with pytest.raises(SettingsError, match=r"task-arrival = 'later', expected one of all, static, dynamic"):
        load_clients(Path(), [0], 1, {"task-arrival": "later"})
