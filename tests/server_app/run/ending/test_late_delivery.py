"""A client that was absent at delivery gets its model later; a finished run goes on with more rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from server_app.run.federation import NotEnoughClientsError
from server_app.run.run_directory import RunDirectory, RunDirectoryError
from strategies.framework.options import OptionError
from tests.faults.nodes import NodeGrid, nodes, run_nodes, statuses


def summary(directory: RunDirectory) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory.path / "summary.json").read_text())
    return found


def absent_at_the_end(tmp_path: Path) -> tuple[NodeGrid, RunDirectory]:
    """Cyd trains in both rounds, and is away when models are delivered."""
    grid = NodeGrid(nodes())

    def leave(plan: Any, message: Any, honest: Any) -> list[Any]:
        if plan.round == 2:
            grid.online.discard(3)
        return [honest]

    grid.misbehave[3] = leave
    return grid, run_nodes(tmp_path, grid)


def test_who_was_absent_gets_its_model_later_and_what_was_done_stays(tmp_path: Path) -> None:
    grid, directory = absent_at_the_end(tmp_path)
    assert summary(directory)["not_delivered"] == ["cyd"]
    before = [record for record in directory.rounds() if record["phase"] == "train"]
    with pytest.raises(NotEnoughClientsError, match=r"cyd did not come within 1 s \(startup-timeout\)"):
        run_nodes(tmp_path, grid, resume=str(directory.path), deliver="missing")
    grid.online = {3}  # it alone is needed
    run_nodes(tmp_path, grid, resume=str(directory.path), deliver="missing")
    after = summary(directory)
    assert (sorted(after["clients"]), after["not_delivered"]) == (["ada", "ben", "cyd"], [])
    assert statuses(directory, "deliver")[-1] == {"ada": "ok", "ben": "ok", "cyd": "ok"}
    assert [record for record in directory.rounds() if record["phase"] == "train"] == before


def test_late_delivery_names_what_is_not_there(tmp_path: Path) -> None:
    grid, directory = absent_at_the_end(tmp_path)
    with pytest.raises(RunDirectoryError, match="has no client 'dan'; it has ada, ben, cyd"):
        run_nodes(tmp_path, grid, resume=str(directory.path), deliver="dan")
    (directory.path / "summary.json").unlink()
    with pytest.raises(RunDirectoryError, match="is not finished; continue it with"):
        run_nodes(tmp_path, grid, resume=str(directory.path), deliver="ada")
    with pytest.raises(OptionError, match="without resume"):
        run_nodes(tmp_path, grid, deliver="ada")


def test_a_finished_run_goes_on_with_more_rounds_as_if_it_had_begun_with_them(tmp_path: Path) -> None:
    directory = run_nodes(tmp_path, NodeGrid(nodes()), num_server_rounds=2)
    run_nodes(tmp_path, NodeGrid(nodes()), num_server_rounds=4, resume=str(directory.path))
    whole = run_nodes(tmp_path, NodeGrid(nodes()), num_server_rounds=4, run_name="whole")
    for run in (directory, whole):
        assert [record["round"] for record in run.rounds() if record["phase"] == "train"] == [1, 2, 3, 4]
        assert len(statuses(run, "deliver")) == 1
    states = [run.newest_checkpoint() for run in (directory, whole)]
    assert all(state is not None and state.round == 4 for state in states)
    assert torch.equal(states[0].state.tensors["model"], states[1].state.tensors["model"])  # type: ignore[union-attr]
    assert directory.config()["num-server-rounds"] == 4
    with pytest.raises(RunDirectoryError, match="finished after 4 rounds"):
        run_nodes(tmp_path, NodeGrid(nodes()), num_server_rounds=4, resume=str(directory.path))


def test_who_does_not_take_part_is_given_nothing_unasked(tmp_path: Path) -> None:
    grid = NodeGrid(nodes())
    asked: list[int] = []

    def note(plan: Any, message: Any, honest: Any) -> list[Any]:
        asked.append(plan.round)
        return [honest]

    grid.misbehave[3] = note  # cyd's node
    some = {"clients": "ada, b*", "min_clients": 2}
    directory = run_nodes(tmp_path, grid, **some)
    assert asked == []
    found = summary(directory)
    assert (sorted(found["clients"]), found["not_delivered"]) == (["ada", "ben"], [])
    assert statuses(directory, "deliver") == [{"ada": "ok", "ben": "ok"}]
    run_nodes(tmp_path, grid, **some, resume=str(directory.path), deliver="missing")
    assert (asked, statuses(directory, "deliver")) == ([], [{"ada": "ok", "ben": "ok"}])
    run_nodes(tmp_path, grid, **some, resume=str(directory.path), deliver="all")
    assert asked == []
    run_nodes(tmp_path, grid, **some, resume=str(directory.path), deliver="cyd")  # who asks by name gets it
    assert sorted(summary(directory)["clients"]) == ["ada", "ben", "cyd"]
