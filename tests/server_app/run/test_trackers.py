"""Trackers get what ``rounds.jsonl`` has; a tracker that fails, hangs or is missing does not stop the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from server_app.run import trackers
from server_app.run.options import RunOptions
from server_app.run.trackers import Trackers, values_of
from strategies.framework.options import OptionError
from tests.server_app.conftest import Runner

RECORD = {
    "phase": "train",
    "round": 2,
    "seconds": 3.0,
    "clients": {
        "ada": {"status": "ok", "seconds": 1.0, "train_loss": [9.0, 2.0], "metrics": {"personal": {"accuracy": 0.5}}},
        "bob": {"status": "ok", "seconds": 2.0, "train_loss": [None], "metrics": {"personal": {"accuracy": 0.75}}},
        "cleo": {"status": "late", "reason": "no answer"},
    },
    "settled": {"weights": {"ada": {"weight": 0.25, "flag": "one", "odd": float("nan")}, "bob": [0.5, 0.5]}},
}


class Memory:
    """A tracker that keeps what it is told."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        made.append(self)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.told.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


made: list[Memory] = []


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Memory]:
    made.clear()
    monkeypatch.setitem(trackers.OPENERS, "trackio", Memory)
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(trackers, "log", lambda level, text, *words: lines.append(text % words))
    return lines


def test_every_finite_number_of_a_record_has_a_name() -> None:
    found = dict(values_of(RECORD, {("ada", "up"): 10, ("bob", "up"): 5, ("ada", "down"): 7}))
    assert found.pop("server/peak_memory_mb") > 1
    assert found == {
        "client/ada/accuracy": 0.5, "client/ada/train_loss": 2.0, "client/ada/seconds": 1.0,
        "client/bob/accuracy": 0.75, "client/bob/seconds": 2.0,
        "mean/accuracy": 0.625, "mean/train_loss": 2.0, "mean/seconds": 1.5,
        "weight/ada/weight": 0.25, "weight/bob/0": 0.5, "weight/bob/1": 0.5,
        "bytes/ada/up": 10.0, "bytes/bob/up": 5.0, "bytes/ada/down": 7.0, "bytes/up": 15.0, "bytes/down": 7.0,
        "server/seconds": 3.0,
    }  # fmt: skip


def test_a_delivered_model_has_names_of_its_own_because_it_is_scored_on_other_examples() -> None:
    found = dict(values_of({**RECORD, "phase": "deliver"}, {}))
    assert found["delivered/ada/accuracy"] == 0.5
    assert found["delivered-mean/accuracy"] == 0.625
    assert not any(name.startswith(("client/", "mean/")) for name in found)


def test_one_that_fails_hangs_or_is_missing_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    never = Event()

    class Fails(Memory):
        def write(self, step: int, values: Mapping[str, float]) -> None:
            raise ConnectionError("no route")

    class Hangs(Memory):
        def write(self, step: int, values: Mapping[str, float]) -> None:
            never.wait()

    def missing(folder: Path, name: str, config: Mapping[str, Any]) -> Memory:
        raise ModuleNotFoundError("No module named 'wandb'")

    for name, opener in (("tensorboard", Fails), ("mlflow", Hangs), ("wandb", missing)):
        monkeypatch.setitem(trackers.OPENERS, name, opener)
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 1.0)
    monkeypatch.setattr(trackers, "WAITING", 2)
    with Trackers("tensorboard, mlflow, wandb, trackio", tmp_path, {}) as found:
        for _ in range(3):
            found.take(RECORD, {})
        found.take({"phase": "register", "round": 0, "clients": {}}, {})
    never.set()
    (good,) = [sink for sink in made if type(sink) is Memory]
    assert good.told
    assert any(
        "tracker tensorboard failed and gets no more numbers: ConnectionError: no route" in line for line in said
    )
    assert any("tracker mlflow has not finished" in line for line in said)
    assert any("pip install 'fedalloy[wandb]'" in line for line in said)


def test_a_run_tells_its_rounds_and_its_numbers_are_those_of_a_run_that_tells_nobody(run: Runner) -> None:
    told, quiet = (run(2, run_name=name, trackers=names) for name, names in (("told", "trackio"), ("quiet", "")))
    summaries = [json.loads((done.path / "summary.json").read_text())["clients"] for done in (told, quiet)]
    assert summaries[0] == summaries[1]
    (sink,) = made
    assert sink.closed
    assert [step for step, _ in sink.told] == [1, 2, 3]
    last = told.rounds()[-1]["clients"]
    for name, client in last.items():
        assert sink.told[-1][1][f"delivered/{name}/accuracy"] == client["metrics"]["personal"]["accuracy"]
    assert sink.told[-1][1]["bytes/up"] > sink.told[0][1]["bytes/up"] > 0
    assert not (quiet.path / "tensorboard").exists()


def test_tensorboards_files_have_the_numbers(tmp_path: Path) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed (extra tensorboard)",
    )
    with Trackers("tensorboard", tmp_path, {"strategy": "ditto"}) as found:
        found.take(RECORD, {})
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("mean/accuracy")] == [(2, 0.625)]


def test_mlflows_files_have_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed (extra mlflow)")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Trackers("mlflow", tmp_path, {"strategy": "ditto"}) as found:
        found.take(RECORD, {})
    (file,) = (tmp_path / "mlflow").glob("*/*/metrics/mean/accuracy")
    assert file.read_text().split()[1:] == ["0.625", "2"]


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(OptionError, match="did you mean 'tensorboard'"):
        RunOptions(trackers="tensorbord")
