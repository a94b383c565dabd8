"""``fedalloy report``: clients, models, refusals, also of a run that goes on, in 80 columns."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from server_app.run.run_directory import RunDirectory, RunDirectoryError
from server_app.tools.cli import app
from server_app.tools.print_run import print_report, report_of
from server_app.tools.who import ago
from tests.faults.nodes import NodeGrid, nodes, run_nodes
from tests.server_app.run.clients.test_enrolment import grid as one_is_refused
from tests.server_app.run.ending.test_delivery import grid as gets_worse


def printed(run: Path, metric: str = "") -> str:
    out = io.StringIO()
    print_report(run, Console(file=out, width=80), metric)
    text = out.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines() if ":" not in line)  # sentences are the terminal's to wrap
    return text


def test_models_who_is_who_and_who_was_refused(tmp_path: Path) -> None:
    run = run_nodes(tmp_path, one_is_refused(), min_clients=2).path
    text = printed(run)
    assert "run: the delivered models, each on its client's test examples" in text
    assert "refused: shop: DataError: line 17, column 'label'" in text
    table = text[text.index("Who is who") :].splitlines()
    assert table[1].split() == ["client", "node", "key", "examples", "task", "base", "model", "seen"]
    assert table[2].split()[:6] == ["ada", "1", "same", "10", "toy", "toy"]
    assert next(line for line in table if line.startswith("shop")).split()[-1] == "refused"


def test_a_run_that_goes_on_is_reported_by_the_models_that_its_last_round_began_with(tmp_path: Path) -> None:
    run = run_nodes(tmp_path, NodeGrid(nodes())).path
    lines = (run / "rounds.jsonl").read_text().splitlines()
    train = [line for line in lines if json.loads(line)["phase"] in ("register", "train")]
    (run / "rounds.jsonl").write_text("".join(f"{line}\n" for line in train))
    (run / "summary.json").unlink()
    text = " ".join(printed(run).split())
    assert "not finished. The models that round 2 of 2 began with, before its training" in text
    assert "validation examples" in text
    found = json.loads(CliRunner().invoke(app, ["report", str(run), "--json"]).output)
    assert (found["finished"], found["delivered"], found["round"]) == (False, False, 2)
    assert set(found["who"]) == {"ada", "ben", "cyd"}
    (run / "rounds.jsonl").write_text(train[0] + "\n")
    with pytest.raises(RunDirectoryError, match="no client has evaluated a model yet; it has reached register 0"):
        report_of(run)


def test_metrics_can_be_chosen_and_models_that_became_worse_are_named(tmp_path: Path) -> None:
    directory: RunDirectory = run_nodes(tmp_path, gets_worse(), num_server_rounds=4, max_update_ratio=0.0)
    assert report_of(directory.path)["metric"] == "loss"
    with pytest.raises(RunDirectoryError, match="no metric 'chrf'; it has loss"):
        report_of(directory.path, "chrf")
    assert "became worse: ada: validation loss 117, " in printed(directory.path, "loss")
    assert "the model after round 3" in printed(directory.path)


def test_how_long_ago() -> None:
    now = datetime(2026, 1, 2, 12, tzinfo=UTC)
    times = ("2026-01-02T11:59:30", "2026-01-02T11:00:00", "2026-01-01T11:00:00")
    assert [ago(f"{time}+00:00", now) for time in times] == ["30 s ago", "1 h ago", "1 d ago"]
    assert ago("", now) == ""
