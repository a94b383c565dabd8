"""Potara through the real round loop and the real client code: what crosses the wire, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from fedalloy_adapters.wire.flower_records import unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.run_directory import RunDirectory
from strategies.algorithms.potara_weights import MODES
from tests.server_app.conftest import Runner

POTARA: dict[str, Any] = {
    "strategy": "potara", "num_server_rounds": 3, "potara__federated_rounds": 1,
    "potara__search_points": 5, "potara__fisher_samples": 8,
}  # fmt: skip


def totals(directory: RunDirectory, direction: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory.path / "summary.json").read_text())["bytes"][direction]
    return found


def last(directory: RunDirectory, phase: str) -> dict[str, Any]:
    return [record for record in directory.rounds() if record["phase"] == phase][-1]


def personal(directory: RunDirectory, client: str) -> dict[str, bytes]:
    folder = directory.path / "clients" / client / "adapter"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_local_adapter_never_leaves_and_training_costs_fewer_bytes_than_fedavg(run: Runner) -> None:
    sent: list[tuple[int, str]] = []

    def listen(node: int, message: Message, reply: Message | None) -> Message | None:
        if message.metadata.message_type.startswith("train"):
            plan, _ = unpack(message.content, "plan", plan_pb2.Plan)
            blobs = {} if reply is None else unpack(reply.content, "report", report_pb2.Report)[1]
            sent.extend((plan.round, name) for name in blobs)
        return reply

    fedavg = run(run_name="fedavg", num_server_rounds=3)
    potara = run(run_name="potara", tamper=listen, **POTARA)
    assert {round_ for round_, _ in sent} == {1}  # after the federated round nothing is uploaded
    assert {name for _, name in sent} == {"global"}
    up, down = totals(potara, "up"), totals(potara, "down")
    assert up["tensor"] * 3 == totals(fedavg, "up")["tensor"]  # one of three rounds
    assert down["tensor"] * 2 == totals(fedavg, "down")["tensor"]  # once, and the result, against three and the result
    assert up["message"] < totals(fedavg, "up")["message"]
    assert down["message"] < totals(fedavg, "down")["message"]


@pytest.mark.parametrize("space", ["delta", "factor"])
def test_merged_at_the_server_it_is_the_same_model_for_more_bytes(run: Runner, space: str) -> None:
    at_client = run(clients=2, run_name="client", potara__space=space, potara__weight="plugin", **POTARA)
    at_server = run(
        clients=2, run_name="server", potara__space=space, potara__merge_at="server", potara__weight="plugin", **POTARA
    )
    for client in ("client-0", "client-1"):
        assert personal(at_client, client) == personal(at_server, client)
    one = totals(at_client, "up")["tensor"]
    assert totals(at_server, "up")["tensor"] == 2 * one
    assert totals(at_server, "down")["tensor"] > totals(at_client, "down")["tensor"]


def test_the_personal_model_is_one_peft_adapter_of_twice_the_rank(run: Runner) -> None:
    from peft import PeftModel

    from client_app.scenarios import load_scenario

    directory = run(potara__weight="half", **POTARA)  # a line search may find an endpoint, of rank r
    folder = directory.path / "clients" / "client-1" / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 16
    base, data = load_scenario("digits", 1, 3, 0, directory.path.parent / ".cache")
    model = PeftModel.from_pretrained(base.model, str(folder)).eval()  # type: ignore[arg-type]
    test = data.splits["test"]
    with torch.no_grad():
        loss = float(torch.nn.functional.cross_entropy(model(**test.inputs).logits, test.labels))
    reported = last(directory, "deliver")["clients"]["client-1"]["metrics"]["personal"]["loss"]
    assert loss == pytest.approx(reported, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_logs_what_its_weight_is_made_of(run: Runner, mode: str) -> None:
    directory = run(clients=2, run_name=mode, potara__weight=mode, **POTARA)
    logged = last(directory, "train")["settled"]["weights"]
    for client in ("client-0", "client-1"):
        found = logged[client]
        assert {"weight", "raw", "q", "searched", "search_losses"} <= set(found)
        assert ({"a", "b", "c", "D"} <= set(found)) == (mode not in ("half", "line-search"))
        assert ("samples" in found) == (mode in ("client-fisher", "client-fisher-clipped", "server-scalar"))
        assert 0 <= found["weight"] <= 1
        assert found["q"] > 0
        metrics = last(directory, "deliver")["clients"][client]["metrics"]
        assert set(metrics) == {"local", "half", "federated", "searched", "personal", "held-out"}
        if mode in ("half", "line-search"):
            assert metrics["personal"] == metrics["half" if mode == "half" else "searched"]


def test_per_parameter_weights_and_truncation_run(run: Runner) -> None:
    parameter = {"potara__granularity": "parameter", "potara__space": "factor", "potara__weight": "client-fisher"}
    first = run(clients=2, run_name="parameter", **parameter, **POTARA)
    second = run(clients=2, run_name="truncated", potara__space="delta-truncated", potara__weight="half", **POTARA)
    for directory in (first, second):
        config = json.loads(personal(directory, "client-0")["adapter_config.json"])
        assert config["r"] == 8


def test_runs_stay_on_disk_where_a_stranger_finds_them(run: Runner, runs_dir: Path) -> None:
    directory = run(run_name="halves", potara__weight="plugin", **POTARA)
    slots = runs_dir / "halves" / "clients" / "client-0" / "slots"
    assert {"global", "local", "half-0", "half-1"} <= {path.name for path in slots.iterdir()}
    assert directory.path == runs_dir / "halves"
