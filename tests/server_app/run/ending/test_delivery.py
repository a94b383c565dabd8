"""A model that became worse is named, and its client gets the model of the best round."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from server_app.run.run_directory import RunDirectory
from strategies import STRATEGIES
from tests.faults.nodes import NodeGrid, nodes, run_nodes
from tests.server_app.conftest import Runner
from tests.strategies.conftest import FakeNode

TARGET = 3.0
NOTHING_HELD = ("local", "local-all", "local-twice", "dare", "fedpae", "fisher-merge", "nan", "regmean", "samerging",
                "task-arithmetic", "ties")  # fmt: skip
"""Their clients are sent nothing, or nothing before the end."""


def towards(name: str, round_: int, adapter: Adapter, far: int = 30) -> Adapter:
    """Each number moves by one; in rounds 1 to 3 towards the target, then away from it, fast."""
    return Adapter(adapter.layout, torch.full_like(adapter.vector, float(round_ if round_ < 4 else far * round_)))


def distance(adapter: Adapter) -> dict[str, float]:
    return {"loss": float((adapter.vector - TARGET).abs().mean())}


def grid(far: int = 30) -> NodeGrid:
    found: dict[int, FakeNode] = nodes()
    for node in found.values():
        node.move, node.metrics = partial(towards, far=far), distance
    return NodeGrid(found)


def summary(directory: RunDirectory) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory.path / "summary.json").read_text())
    return found


def test_clients_get_the_models_of_the_best_round_and_the_last_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flwr, found = logging.getLogger("flwr"), grid()
    flwr.addHandler(caplog.handler)
    try:
        directory = run_nodes(tmp_path, found, num_server_rounds=6, keep_checkpoints=1, max_update_ratio=0.0)
    finally:
        flwr.removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records]
    assert any(
        "[train 5] ada began this round with a worse model: validation loss 117 after 4 rounds" in m for m in said
    )
    assert "became worse: ada (validation loss 177, " in said[-1]
    assert "it has the model after round 3)" in said[-1]
    assert summary(directory)["diverged"]["ben"]["delivered_round"] == 3
    assert summary(directory)["clients"]["cyd"]["loss"] == 0.0
    assert {float(node.saved.vector.mean()) for node in found.nodes.values() if node.saved} == {TARGET}
    # The best state and the newest one are on the disk, and clients were told from which round on to keep theirs.
    assert [path.name for path in sorted((directory.path / "checkpoints").iterdir())] == ["round-0003", "round-0006"]
    pins = [(plan.round, plan.pinned_round) for plan in found.nodes[1].plans if plan.HasField("pinned_round")]
    assert pins == [(2, 0), (3, 1), (4, 2), (5, 3), (6, 3), (7, 3), (4, 3)]
    newest = directory.newest_checkpoint()
    assert newest is not None
    assert float(newest.state.tensors["model"].mean()) == 180.0


def test_the_last_models_stay_where_that_is_asked_for_and_late_deliveries_fall_back_too(tmp_path: Path) -> None:
    found = grid()
    directory = run_nodes(tmp_path, found, num_server_rounds=4, on_divergence="last", max_update_ratio=0.0)
    assert summary(directory)["diverged"]["ada"]["delivered_round"] == 4
    assert summary(directory)["clients"]["ada"]["loss"] == 117.0
    run_nodes(tmp_path, found, num_server_rounds=4, resume=str(directory.path), deliver="ada", max_update_ratio=0.0)
    after = summary(directory)
    assert (after["diverged"]["ada"]["delivered_round"], after["diverged"]["ben"]["delivered_round"]) == (3, 4)
    assert (after["clients"]["ada"]["loss"], after["clients"]["ben"]["loss"]) == (0.0, 117.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_delivers_an_earlier_state_beside_what_clients_hold(strategy: str, tmp_path: Path) -> None:
    """With a lossy downlink a checkpoint has more tensors than the strategy's."""
    encodings = {"downlink_encoding": "int8", "uplink_encoding": "int8"}
    config = encodings | {"strategy": strategy, "num_server_rounds": 6, "max_update_ratio": 0.0}
    directory = run_nodes(tmp_path, grid(far=10), **config)
    delivered = next(record for record in directory.rounds() if record["phase"] == "deliver")["clients"]
    assert {name: record["status"] for name, record in delivered.items()} == dict.fromkeys(("ada", "ben", "cyd"), "ok")
    assert all(record["state"] < 6 for record in delivered.values()), "the last rounds are worse for every strategy"
    newest = directory.newest_checkpoint()
    assert newest is not None
    assert any(name.startswith("holdings/") for name in newest.state.tensors) != (strategy in NOTHING_HELD)


def test_a_real_client_goes_back_to_its_slots_of_then(run: Runner) -> None:
    directory = run(
        strategy="local", clients=2, num_server_rounds=3, keep_checkpoints=1, learning_rate=1.0, local_steps=2
    )
    records = directory.rounds()
    first = next(record for record in records if record["phase"] == "train")["clients"]["client-0"]
    last = next(record for record in records if record["phase"] == "deliver")["clients"]["client-0"]
    assert summary(directory)["diverged"]["client-0"]["delivered_round"] == last["state"] == 0
    assert last["metrics"]["held-out"]["loss"] == first["metrics"]["personal"]["loss"]
    assert last["evaluated"]["personal"]["split"] == "test"
