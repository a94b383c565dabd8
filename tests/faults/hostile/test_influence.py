"""What one client of several can do by default: neither size nor a claimed count makes it everybody's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank, Storage
from fedalloy_adapters.wire.codec import decode, encode
from fedalloy_adapters.wire.flower_records import pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.ending.summary import headline, summary_of
from server_app.run.federation import NotEnoughClientsError
from server_app.run.options import RunOptions
from server_app.run.run_directory import RunDirectory, RunDirectoryError
from strategies.framework.exchange import MAX_NUMBER, State
from strategies.framework.limits import Limits, unsound, within_round
from strategies.framework.options import OptionError
from tests.faults.nodes import NodeGrid, nodes, run_nodes, statuses
from tests.faults.reports import LAYOUT
from tests.strategies.conftest import FakeNode


def scaled(number: float) -> Any:
    """An upload whose largest number is this one."""

    def lie(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        report, blobs = unpack(honest.content, "report", report_pb2.Report)
        for slot, blob in blobs.items():
            adapter = decode(blob, layouts={LAYOUT.digest: LAYOUT})
            vector = adapter.vector / adapter.vector.abs().max() * number
            blobs[slot] = encode(Adapter(LAYOUT, vector), include_layout=False).blob
        return [Message(pack("report", report, blobs), reply_to=message)]

    return lie


def state_of(directory: RunDirectory) -> dict[str, torch.Tensor]:
    found = directory.newest_checkpoint()
    assert found is not None
    return dict(found.state.tensors)


def four(examples: int = 30) -> dict[int, FakeNode]:
    return nodes("ada", "ben", "cyd") | {4: FakeNode("dan", LAYOUT, examples)}


@pytest.mark.parametrize("config", [{"strategy": "flexlora"}, {"fedavg.space": "delta"}, {}])
def test_one_upload_of_the_largest_numbers_keeps_the_run_going_and_nobody_else_out(
    config: dict[str, Any], tmp_path: Path
) -> None:
    grid = NodeGrid(four(), {4: scaled(9e8)})
    directory = run_nodes(tmp_path, grid, num_server_rounds=3, **{k.replace(".", "__"): v for k, v in config.items()})
    assert [set(found.values()) for found in statuses(directory)] == [{"ok"}] * 3
    assert max(float(tensor.abs().max()) for tensor in state_of(directory).values()) < 1e3
    for record in [found for found in directory.rounds() if found["phase"] == "train"]:
        assert record["clients"]["dan"]["clipped"]["global"] > 1e6
        assert all("clipped" not in record["clients"][name] for name in ("ada", "ben", "cyd"))


def test_what_the_server_would_refuse_it_does_not_keep_either(tmp_path: Path) -> None:
    """Of two clients there is no median: the round is not merged, and the next ones are as if it had not been."""
    two = {1: FakeNode("ada", LAYOUT, 10), 2: FakeNode("ben", LAYOUT, 10)}
    lie = scaled(9e8)
    first = {2: lambda plan, message, honest: lie(plan, message, honest) if plan.round == 1 else [honest]}
    directory = run_nodes(tmp_path, NodeGrid(two, first), num_server_rounds=2, strategy="flexlora")
    settled = [record["settled"] for record in directory.rounds() if record["phase"] == "train"]
    assert "expected at most 1e+09" in settled[0]["unsound"]
    assert "unsound" not in settled[1]
    assert [set(found.values()) for found in statuses(directory)] == [{"ok"}] * 2
    assert max(float(tensor.abs().max()) for tensor in state_of(directory).values()) < MAX_NUMBER


def test_numbers_in_the_files_of_the_bank_are_looked_at_too(tmp_path: Path) -> None:
    storage = Storage()
    storage.spill_to(tmp_path / "bank", 0)
    bank = Bank(storage)
    bank["ada"] = Adapter(LAYOUT, torch.ones(LAYOUT.size))
    state = State()
    state.keep("merge", bank)
    assert list(state.rows) == ["merge/ada"], "not in memory"
    assert unsound(state) is None
    bank["ben"] = Adapter(LAYOUT, torch.full((LAYOUT.size,), 2e9))
    state.keep("merge", bank)
    assert unsound(state) == "merge/ben has numbers up to 2e+09, expected at most 1e+09"


def test_a_claim_of_examples_counts_for_ten_times_the_median_at_most(tmp_path: Path) -> None:
    lied = run_nodes(tmp_path, NodeGrid(four(9 * 10**18)), run_name="lied")
    honest = run_nodes(tmp_path, NodeGrid(four(250)), run_name="honest")  # the median of 10, 20, 30 and 250 is 25
    assert all(torch.equal(tensor, state_of(honest)[name]) for name, tensor in state_of(lied).items())


def test_an_update_is_compared_with_the_median_and_cut_in_its_direction(tmp_path: Path) -> None:
    from strategies.framework.exchange import Answer

    def answer(length: float) -> Answer:
        vector = torch.ones(LAYOUT.size) * length
        return Answer({"s": Adapter(LAYOUT, vector)}, {"s": Adapter.zeros(LAYOUT)}, {}, 1, report_pb2.Report())

    given = {name: answer(length) for name, length in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("d", 100.0))}
    kept = within_round(Limits(max_update_ratio=2.0), given)
    assert {name: float(found.adapters["s"].vector[0]) for name, found in kept.items()} == {
        "a": 1.0, "b": 2.0, "c": 3.0, "d": 5.0,
    }  # fmt: skip
    assert list(kept["d"].clipped) == ["s"]
    assert within_round(Limits(max_update_ratio=0.0), given) == given
    two = {name: given[name] for name in ("a", "d")}
    assert within_round(Limits(), two) == two
    with pytest.raises(OptionError, match=r"max-update-ratio = 0\.5"):
        Limits(max_update_ratio=0.5)


METRICS = {
    "accuracy beyond one": ({"loss": 1.0, "accuracy": 1e9}, "accuracy = 1e+09, expected 0 to 1"),
    "a task's accuracy": ({"loss": 1.0, "a/accuracy": -0.5}, "a/accuracy = -0.5, expected 0 to 1"),
    "a label's area": ({"loss": 1.0, "auroc:film": 2.0}, "auroc:film = 2, expected 0 to 1"),
    "a negative loss": ({"loss": -1.0}, "loss = -1, expected 0"),
    "a script": ({"loss": 1.0, "<script>": 1.0}, "a metric '<script>', expected a name like"),
    "a formula": ({"loss": 1.0, "=HYPERLINK(1)": 1.0}, "a metric '=HYPERLINK(1)'"),
    "an escape": ({"loss": 1.0, "\x1b[2J": 1.0}, "expected a name like"),
    "thousands": ({"loss": 1.0} | {f"m{number}": 1.0 for number in range(1000)}, "1001 metrics, expected at most 1000"),
}


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_that_cannot_be_is_refused(kind: str, tmp_path: Path) -> None:
    metrics, words = METRICS[kind]

    def lie(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        report, blobs = unpack(honest.content, "report", report_pb2.Report)
        for result in report.results:
            if result.HasField("evaluate"):
                result.evaluate.metrics.clear()
                result.evaluate.metrics.update(metrics)
        return [Message(pack("report", report, blobs), reply_to=message)]

    directory = run_nodes(tmp_path, NodeGrid(nodes(), {3: lie}), num_server_rounds=1)
    record = next(found for found in directory.rounds() if found["phase"] == "train")["clients"]
    assert (record["cyd"]["status"], record["ada"]["status"]) == ("rejected", "ok")
    assert words in record["cyd"]["reason"]
    summary = json.loads((directory.path / "summary.json").read_text())
    assert set(summary["clients"]) == {"ada", "ben"}


def test_a_metric_that_a_client_leaves_out_is_shown_as_missing() -> None:
    clients = {"ada": {"loss": 1.0, "accuracy": 0.5}, "ben": {"loss": 1.0}}
    summary = summary_of(RunOptions(), clients, 1.0, {}, ({}, None), {})
    assert summary["without_accuracy"] == ["ben"]
    assert headline(summary) == "mean accuracy 0.500, worst 0.500; ben gave none"
    texts = summary_of(RunOptions(), {"ada": {"loss": 1.0}}, 1.0, {}, ({}, None), {})
    assert "without_accuracy" not in texts


@pytest.mark.parametrize("spoil", [lambda data: data[:-9], lambda data: data[:9] + b"\xff" * 9 + data[18:]])
def test_a_damaged_registration_is_named_when_a_run_resumes(spoil: Any, tmp_path: Path) -> None:
    grid = NodeGrid(nodes())
    with pytest.raises(NotEnoughClientsError):
        run_nodes(tmp_path, NodeGrid(nodes(), {n: lambda *_: [] for n in (1, 2, 3)}))
    path = tmp_path / "run" / "registrations" / "ada.pb"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(RunDirectoryError, match=r"registration of client 'ada' in .*not the one"):
        run_nodes(tmp_path, grid, resume=str(tmp_path / "run"))
