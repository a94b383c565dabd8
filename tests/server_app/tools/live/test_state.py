"""The state of a run, read from its folder: in the terminal, as lines, in the list of runs, and as exit code."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from server_app.run.progress import Progress
from server_app.run.run_directory import RunDirectory
from server_app.tools.cli import app
from server_app.tools.live.follow import watch
from server_app.tools.live.state import read_state
from server_app.tools.live.table import as_table, line_of

NAMES = [f"a-client-with-a-long-name-{index}" for index in range(3)]


def answered(accuracy: float) -> dict[str, Any]:
    return {"status": "ok", "seconds": 9.5, "train_loss": [0.5], "metrics": {"personal": {"accuracy": accuracy}}}


def record(phase: str, round_: int, **more: Any) -> dict[str, Any]:
    clients = {name: answered(0.5 + 0.1 * index) for index, name in enumerate(NAMES)}
    return {"phase": phase, "round": round_, "seconds": 20.0, "clients": clients} | more


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "runs", "one", 'strategy = "ditto"\nnum-server-rounds = 4\n')
    made.append_round(record("register", 0, clients={name: {"status": "ok", "seconds": 1.0} for name in NAMES}))
    made.append_round(record("train", 1))
    return made


@contextmanager
def at_work(run: RunDirectory, activity: str = "train") -> Iterator[None]:
    """The run is carried out: in its second round two of three clients are asked, one has answered."""
    with run.alone():
        progress = Progress(run.path, 4)
        progress.phase("train", 2, NAMES)
        progress.answered(NAMES[0], {"status": "ok", "seconds": 3.0, "train_loss": [0.25]})
        progress._write()
        for name in NAMES[1:]:
            (run.path / "clients" / name).mkdir(parents=True, exist_ok=True)
        note = {"round": 2, "activity": activity, "done": 120, "total": 3000, "loss": 1.25, "time": time.time()}
        (run.path / "clients" / NAMES[1] / "progress.json").write_text(json.dumps(note))
        (run.path / "clients" / NAMES[2] / "progress.json").write_text(json.dumps(note | {"round": 1}))
        yield
        progress.remove()


def drawn(run: RunDirectory) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=80).print(as_table(read_state(run.path)))
    return out.getvalue().splitlines()


def test_a_run_that_goes_on_is_shown_in_80_columns(run: RunDirectory) -> None:
    with at_work(run):
        state = read_state(run.path)
        lines = drawn(run)
    assert (state.state, state.phase, state.round, state.rounds) == ("running", "train", 2, 4)
    assert state.left == pytest.approx(4 * 20.0, abs=5)  # three rounds and the delivery
    assert max(map(len, lines)) <= 80
    head, _, *rows = lines
    assert "round 2/4" in head
    assert "2 at work" in head
    first, second, third = sorted(rows, key=lambda row: "120/3000" not in row)
    assert first.split()[1:5] == ["train", "120/3000", "1.250", "0.600"]
    assert not any("120/3000" in row for row in (second, third))  # a note of an earlier round says nothing of this one
    assert any("ok 3.0 s" in row and "0.250" in row for row in rows)


def test_what_is_no_terminal_gets_a_line_for_each_phase(run: RunDirectory) -> None:
    out = io.StringIO()
    console = Console(file=out, width=80)

    def goes_on() -> None:
        run.append_round(record("train", 2, clients={"ada": answered(1.0), "bob": {"status": "late"}}))
        run.append_round(record("stopped", 2, clients={}, reason="2 of at least 3 clients are here"))
        lock.__exit__(None, None, None)

    lock = at_work(run)
    lock.__enter__()
    good, said = watch(run.path, console, goes_on)
    assert (good, said) == (False, "stopped: 2 of at least 3 clients are here")
    assert out.getvalue().splitlines() == [
        "clients register: 3 of 3 answered, 0:20",
        "round 1/4: 3 of 3 answered, loss 0.500, accuracy 0.600, 0:20",
        "round 2/4: 1 of 2 answered, loss 0.500, accuracy 1.000, 0:20, late: bob",
        "stopped, 0:20: 2 of at least 3 clients are here",
    ]


@pytest.mark.parametrize(
    ("end", "code", "state", "said"),
    [
        (lambda run: run.write_summary({"mean_accuracy": 0.75, "worst_accuracy": 0.5, "clients": {}}), 0, "finished",
         "finished: mean accuracy 0.750"),
        (lambda run: None, 1, "interrupted", "continue it with: flwr run"),
        (lambda run: run.append_round(record("stopped", 1, clients={}, reason="nobody came")), 1, "stopped",
         "stopped: nobody came"),
    ],
)  # fmt: skip
def test_exit_code_0_only_for_a_run_that_succeeded(
    run: RunDirectory, end: Callable[[RunDirectory], None], code: int, state: str, said: str
) -> None:
    end(run)
    (run.path / "progress.json").write_text("{")  # a kill left it
    result = CliRunner().invoke(app, ["watch", str(run.path)], env={"COLUMNS": "400"})
    assert result.exit_code == code
    assert said in result.output
    listed = CliRunner().invoke(app, ["runs", str(run.path.parent), "--json"])
    (row,) = json.loads(listed.output)
    assert (row["run"], row["strategy"], row["state"], row["rounds"]) == ("one", "ditto", state, "1/4")


def test_runs_are_listed_in_order_with_their_scores(run: RunDirectory) -> None:
    second = RunDirectory.create(run.path.parent, "two", 'strategy = "fedavg"\n')
    sizes = {"up": {"wire": 1_500_000}, "down": {"wire": 500_000}}
    second.write_summary({"mean_accuracy": 0.875, "worst_accuracy": 0.5, "clients": {}, "bytes": sizes})
    (run.path.parent / "no-run").mkdir()
    result = CliRunner().invoke(app, ["runs", str(run.path.parent)], env={"COLUMNS": "100"})
    assert [line.split()[:5] for line in result.output.splitlines()[1:]] == [
        ["one", "ditto", "interrupted", "1/4", "0:40"],
        ["two", "fedavg", "finished", "0/5", "0.875"],
    ]
    assert "2.000" in result.output
    missing = CliRunner().invoke(app, ["runs", str(run.path.parent / "none")])
    assert missing.exit_code == 1


def test_who_asks_whether_a_run_goes_on_does_not_keep_it_from_going_on(run: RunDirectory) -> None:
    for _ in range(50):
        read_state(run.path)
        with run.alone():
            assert read_state(run.path).state == "running"


def test_a_line_names_at_most_five_who_failed() -> None:
    clients = {f"c{index}": {"status": "failed"} for index in range(9)}
    assert line_of(record("train", 3, clients=clients), 4) == (
        "round 3/4: 0 of 9 answered, 0:20, failed: c0, c1, c2, c3, c4 ..."
    )
