"""A client's work is bound to the run that began it, and recorded before it leaves; refusals are recorded, too."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from client_app.guard.policy import PolicyError
from client_app.guard.record import Record
from client_app.plan.progress import OutOfTimeError, tick, within
from client_app.session import Executor
from client_app.settings import read_settings
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import steps
from strategies.framework.steps import Training
from tests.toys import tiny_models, toy_data

TRAINING = Training(local_steps=2, batch_size=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_bert(tmp_path_factory.mktemp("base") / "bert", toy_data.VOCABULARY)


@pytest.fixture
def where(tmp_path: Path, base: Path) -> Context:
    data = toy_data.write_jsonl(tmp_path / "a.jsonl", toy_data.opinions(24, 0))
    node = {"client-id": "ada", "data-path": str(data), "base-model": str(base), "state-dir": str(tmp_path / "state")}
    return Context(1, 7, node, RecordDict(), {})


def plan_of(*found: plan_pb2.Step, key: bytes = b"key", run: str = "run", round_: int = 1) -> plan_pb2.Plan:
    return plan_pb2.Plan(version=1, run_name=run, client_id="ada", round=round_, steps=found, run_key=key)


def lines_of(where: Context) -> list[dict[str, Any]]:
    path = Path(str(where.node_config["state-dir"])) / "records" / "ada.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_plan_gets_at_the_slots_of_its_own_run_only(where: Context) -> None:
    executor, settings = Executor(), read_settings(where)
    again, leave = (
        steps.initialise("local", 2, keep_existing=False),
        steps.send(TRAINING, "local", relative_to_received=False),
    )
    executor.carry_out(settings, plan_of(steps.initialise("local", 1)), {})
    before = {path: path.read_bytes() for path in settings.run_directory("run").rglob("*") if path.is_file()}
    for key in (b"", b"other"):
        for asked in (plan_of(leave, key=key, round_=2), plan_of(again, key=key, round_=99_999)):
            with pytest.raises(PolicyError, match="slots of an earlier run 'run', and this plan has another key"):
                executor.carry_out(settings, asked, {})
    assert {path: path.read_bytes() for path in before} == before
    _, uploads = executor.carry_out(settings, plan_of(leave, round_=2), {})
    assert set(uploads) == {"local"}
    executor.carry_out(settings, plan_of(steps.initialise("local", 1), key=b"other", run="another"), {})


def test_what_left_and_what_was_refused_is_on_record(where: Context) -> None:
    executor, settings = Executor(), read_settings(where)
    executor.register(settings)
    leave = steps.send(TRAINING, "local", relative_to_received=False)
    report, uploads = executor.carry_out(settings, plan_of(steps.initialise("local", 1), leave), {})
    one = steps.train(Training(local_steps=1, batch_size=1), steps.mixture("local"), ["local"])
    with pytest.raises(PolicyError, match=r"client\.min-examples is 2"):
        executor.carry_out(settings, plan_of(one, round_=2), {})
    registered, layout, left, refused = lines_of(where)
    assert registered["event"] == "registered"
    assert registered["values"]["tasks"][0]["examples"]["train"] == "20"
    assert (left["event"], left["run"], left["round"], left["steps"]) == ("left", "run", 1, ["initialise", "send"])
    sent, numbers = left["slots"]["local"], 4 * sum(math.prod(shape) for shape in layout["shapes"].values())
    assert (sent["bytes"], sent["numbers"], sent["encoding"]) == (len(uploads["local"]), numbers, "fp32")
    assert sent["sha256"] == hashlib.sha256(uploads["local"]).hexdigest()
    assert sent["layout"] == layout["layout"]
    assert left["report"]["bytes"] == len(report.SerializeToString())
    assert left["report"]["values"]["results"][1]["send"]["slot"] == "local"
    assert (refused["event"], refused["steps"]) == ("refused", ["train"])
    assert "PolicyError" in refused["error"]
    path = settings.state_dir / "records" / "ada.jsonl"
    raw = path.read_bytes().splitlines()
    assert [line["previous"] for line in (registered, layout, left, refused)] == [
        "",
        *(hashlib.sha256(line).hexdigest() for line in raw[:3]),
    ]


def test_nothing_leaves_that_cannot_be_recorded(where: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Record, event: str, **said: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Record, "append", full)
    with pytest.raises(OSError, match="No space left"):
        Executor().carry_out(read_settings(where), plan_of(steps.initialise("local", 1)), {})


def test_a_torn_line_does_not_take_the_next_one_along(tmp_path: Path) -> None:
    record = Record(tmp_path, "ada")
    record.append("left", round=1)
    with record.path.open("ab") as file:
        file.write(b'{"torn')
    record.append("left", round=2)
    lines = record.path.read_bytes().splitlines()
    assert len(lines) == 3
    found = json.loads(lines[2])
    assert [found["previous"], found["torn"]] == [hashlib.sha256(line).hexdigest() for line in lines[:2]]
    assert record.newest == hashlib.sha256(lines[2]).hexdigest()


def test_a_plan_ends_when_its_time_is_over() -> None:
    with within(1e-9), pytest.raises(OutOfTimeError, match=r"longer than client\.max-seconds, 1e-09"):
        tick("train")
    with within(0.0):
        tick("train")
