"""One run as a page and as a table: both have what its records have."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server_app.ledger.store import Ledger
from server_app.run.run_directory import RunDirectory
from server_app.tools.cli import app
from server_app.tools.live import page
from server_app.tools.live.state import read_state
from tests.server_app.tools.live.test_state import answered, record


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path / "runs", "one", 'strategy = "potara"\nnum-server-rounds = 2\n')
    Ledger(made.path / "ledger.sqlite", "one").close()
    weights = {"ada": {"weight": 0.25, "a": 1.5}, "bob": [0.5, 0.125]}
    for round_ in (1, 2):
        clients = {"ada": answered(0.5 + round_ / 10), "bob": {"status": "late", "seconds": 600.0}}
        made.append_round(record("train", round_, clients=clients, settled={"weights": weights} if round_ == 2 else {}))
    choice = {"given": "local", "why": "validation loss: merged 2.0, local 1.0 <b>"}
    made.append_round(record("deliver", 3, clients={"ada": answered(0.875) | {"choice": choice}}))
    return made


def test_a_page_has_clients_curves_weights_who_was_late_and_the_slowest(run: RunDirectory, tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed (extra report)")
    result = CliRunner().invoke(app, ["report", str(run.path), "--page", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "page.html").read_text()
    for title in (
        "Clients",
        "Learning curves",
        "Training loss",
        "What was merged",
        "Who was late",
        "What took the time",
    ):
        assert f"<h2>{title}</h2>" in text
    assert "0: 0.600 1: 0.700 2: 0.875" in text
    assert "local 1.0 &lt;b&gt;" in text
    assert "local 1.0 <b>" not in text
    assert "src=" not in text.replace('src="data:', "").split("</script>")[-2]  # nothing is fetched


def test_its_tables(run: RunDirectory) -> None:
    records = read_state(run.path).records
    assert page.outcomes(records)[1] == [["bob", 0, 2, 0, 0, 0, 0, 0]]
    assert page.weights(records)[1] == [["ada", "weight 0.25, a 1.5"], ["bob", "0.5, 0.125"]]
    assert page.seconds(records)[1][0][:3] == ["train 1", "0:20", "bob (600.0 s)"]
    heads, rows = page.clients(read_state(run.path))
    assert dict(zip(heads, rows[0], strict=True))["given"] == "local"


def test_metrics_as_csv(run: RunDirectory, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(run.path), "--csv", str(tmp_path / "run.csv")])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "run.csv").open()))
    assert [(row["client"], row["round"], row["status"], row["accuracy"]) for row in rows] == [
        ("ada", "1", "ok", "0.6"), ("bob", "1", "late", ""), ("ada", "2", "ok", "0.7"), ("bob", "2", "late", ""),
        ("ada", "3", "ok", "0.875"),
    ]  # fmt: skip
