"""Clients that never trained: what they are sent, whose adapters those are, and who decides it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedalloy_adapters.wire.flower_records import pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.federation import NotEnoughClientsError
from server_app.run.run_directory import RunDirectory, RunDirectoryError
from strategies.framework.options import OptionError
from tests.faults.nodes import NodeGrid, nodes, run_nodes, statuses
from tests.strategies.conftest import FakeNode

DAN = 4


def finished(folder: Path, *lenders: int, **config: Any) -> tuple[NodeGrid, RunDirectory]:
    """Ada, ben and cyd have trained; dan has come since."""
    found = nodes("ada", "ben", "cyd", "dan")
    for number in lenders:
        found[number].lends = True
    grid = NodeGrid(found)
    grid.online = {1, 2, 3}
    directory = run_nodes(folder, grid, **config)
    grid.online.add(DAN)
    return grid, directory


def summary(directory: RunDirectory) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory.path / "summary.json").read_text())
    return found


def adopt(grid: NodeGrid, directory: RunDirectory, names: str = "dan", **config: Any) -> dict[str, Any]:
    began = {key: value for key, value in directory.config().items() if key.startswith(("strategy", "fedmerge."))}
    same = {key.replace(".", "__").replace("-", "_"): value for key, value in began.items()}
    run_nodes(directory.path.parent, grid, resume=str(directory.path), adopt=names, **same, **config)
    return summary(directory)


def last_plan(node: FakeNode) -> plan_pb2.Plan:
    return node.plans[-1]


def test_a_newcomer_adopts_the_global_model_in_one_message_and_trains_nothing(tmp_path: Path) -> None:
    grid, directory = finished(tmp_path)
    assert "dan" not in summary(directory)["clients"]
    found = adopt(grid, directory)
    dan = grid.nodes[DAN]
    (plan,) = dan.plans
    assert [step.WhichOneof("kind") for step in plan.steps] == ["search", "save", "evaluate"]
    assert plan.steps[0].search.samples == 32
    assert plan.steps[0].search.split == "train"
    assert sorted(found["clients"]) == ["ada", "ben", "cyd", "dan"]
    said = found["adopted"]["dan"]
    assert said["coefficients"] == {"model delivered": 1.0}
    assert said["base_loss"] > said["loss"]
    assert statuses(directory, "deliver")[-1] == dict.fromkeys(["ada", "ben", "cyd", "dan"], "ok")
    state = directory.newest_checkpoint()
    assert state is not None
    assert [entry["id"] for entry in state.run["clients"]] == ["ada", "ben", "cyd"]  # the run's state stays
    assert dan.saved is not None
    assert dan.saved.digest == dan.slots["source-0"].digest
    assert [len(grid.nodes[number].plans) for number in (1, 2, 3)] == [3, 3, 3]  # nobody else was asked


def test_only_adapters_that_are_lent_are_given_and_each_is_asked_for_once(tmp_path: Path) -> None:
    grid, directory = finished(tmp_path, 1, 3, strategy="local")
    found = adopt(grid, directory)
    assert set(found["adopted"]["dan"]["coefficients"]) == {"client ada", "client cyd"}
    for number in (1, 3):
        plan = last_plan(grid.nodes[number])
        assert [step.WhichOneof("kind") for step in plan.steps] == ["initialise", "merge", "send"]
        assert plan.steps[-1].send.for_newcomers
    assert len(grid.nodes[2].plans) == 3
    given = {slot.digest for name, slot in grid.nodes[DAN].slots.items() if name.startswith("source-")}
    assert given == {grid.nodes[1].slots["lent"].digest, grid.nodes[3].slots["lent"].digest}
    grid.online = {DAN}  # what lenders sent is kept
    asked = [len(grid.nodes[number].plans) for number in (1, 3)]
    assert adopt(grid, directory)["adopted"] == found["adopted"]
    assert [len(grid.nodes[number].plans) for number in (1, 3)] == asked


def test_who_lends_no_more_is_not_given_and_its_adapter_is_removed(tmp_path: Path) -> None:
    grid, directory = finished(tmp_path, 1, 3, strategy="local")
    adopt(grid, directory)
    grid.nodes[1].lends = False
    assert set(adopt(grid, directory)["adopted"]["dan"]["coefficients"]) == {"client cyd"}
    assert [path.stem for path in directory.path.glob("lent/*/*")] == ["cyd"]


def test_without_any_source_a_newcomer_has_what_the_strategy_delivers(tmp_path: Path) -> None:
    grid, directory = finished(tmp_path, strategy="local")
    assert "adopted" not in adopt(grid, directory)
    assert not any(step.HasField("search") for step in last_plan(grid.nodes[DAN]).steps)
    assert "dan" in summary(directory)["clients"]


def test_fedmerges_models_are_sent_without_the_part_that_the_seed_makes(tmp_path: Path) -> None:
    grid, directory = finished(tmp_path, strategy="fedmerge", fedmerge__models=2)
    found = adopt(grid, directory)
    assert set(found["adopted"]["dan"]["coefficients"]) == {"model 0", "model 1"}
    kinds = [step.WhichOneof("kind") for step in last_plan(grid.nodes[DAN]).steps]
    assert kinds == ["initialise", "initialise", "search", "save", "evaluate"]
    few = adopt(grid, directory, adopt_sources=1, adopt_examples=5)
    assert set(few["adopted"]["dan"]["coefficients"]) == {"model 0"}
    assert few["adopted"]["dan"]["examples"] == 5


def test_the_app_adopts_who_registers_after_the_end(tmp_path: Path) -> None:
    grid, directory = finished(tmp_path)
    run_nodes(tmp_path, grid, resume=str(directory.path), deliver="missing")
    assert set(summary(directory)["adopted"]) == {"dan"}
    late = NodeGrid(nodes("ada", "ben", "cyd", "dan"))
    late.online = {1, 2, 3}

    def come(plan: plan_pb2.Plan, message: Any, honest: Any) -> list[Any]:
        if plan.round == 2:  # of two: it is there when models are delivered
            late.online.add(DAN)
        return [honest]

    late.misbehave[1] = come
    found = run_nodes(tmp_path, late, run_name="late")
    last = [record for record in found.rounds() if record["phase"] == "deliver"][-1]["clients"]
    assert last["dan"]["status"] == "ok"
    assert last["dan"]["adopted"]["coefficients"] == {"model delivered": 1.0}
    assert "adopted" not in last["ada"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda found: found.coefficients.append(0.5), "2 numbers in coefficients, expected one for each of 1"),
        (lambda found: found.slot_losses.pop(), "0 numbers in slot_losses"),
        (lambda found: found.coefficients.__setitem__(0, -2.0), "expected at most 1.5"),
    ],
)
def test_a_report_that_does_not_fit_is_rejected_and_its_client_delivered_as_the_others_are(
    tmp_path: Path, spoil: Callable[[report_pb2.SearchResult], Any], said: str
) -> None:
    grid, directory = finished(tmp_path)

    def lie(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        report, blobs = unpack(honest.content, "report", report_pb2.Report)
        if report.results[0].HasField("search"):
            spoil(report.results[0].search)
        return [Message(pack("report", report, blobs), reply_to=message)]

    grid.misbehave[DAN] = lie
    found = adopt(grid, directory)
    assert "adopted" not in found
    assert "dan" in found["clients"]
    record = [record for record in directory.rounds() if record["phase"] == "deliver"][-1]["clients"]["dan"]
    assert record["status"] == "ok"
    assert said in record["not_adopted"]


def test_adoption_names_what_is_wrong(tmp_path: Path) -> None:
    grid, directory = finished(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"ada trained in the run .* fedalloy deliver"):
        adopt(grid, directory, "dan,ada")
    with pytest.raises(OptionError, match="adopt = 'new' without resume"):
        run_nodes(tmp_path, grid, adopt="new")
    with pytest.raises(OptionError, match="expected one of them"):
        adopt(grid, directory, "new", deliver="all")
    assert set(adopt(grid, directory, "new")["adopted"]) == {"dan"}
    grid.online.discard(DAN)
    with pytest.raises(NotEnoughClientsError, match="nobody is new"):
        adopt(grid, directory, "new")
    (directory.path / "summary.json").unlink()
    with pytest.raises(RunDirectoryError, match="is not finished"):
        adopt(grid, directory)
