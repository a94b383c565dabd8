"""``fedalloy compare --connection`` to its end, on SuperNodes that run already, and ``cluster status`` afterwards."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from server_app.tools.cli import app
from server_app.tools.cluster.local import CONNECTION, LocalCluster
from server_app.tools.compare import command as module

ASKED = ["--strategies", "fedavg", "--seeds", "1", "--rounds", "2", "--set", "local-steps=1"]


def types(*words: str) -> Result:
    return CliRunner().invoke(app, words, env={"COLUMNS": "80"})


@pytest.mark.skipif(
    os.environ.get("FEDALLOY_FAULTS") != "long", reason="several minutes; run it with FEDALLOY_FAULTS=long"
)
def test_a_comparison_on_a_federation_that_runs(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONTROLS", ())  # they are runs like any other, and cost as much
    for key in ("FLWR_HOME", "PATH"):
        monkeypatch.setenv(key, cluster.environment()[key])
    out = tmp_path / "comparison"
    done = types("compare", "digits", "--connection", CONNECTION, *ASKED, "--out", str(out))
    assert done.exit_code == 0, done.output
    assert re.search(r"fedavg, seed 0: finished, \d+ s.*, accuracy 0\.", done.output), done.output
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["strategy"], row["client"]) for row in rows} == {
        (strategy, client) for strategy in ("local", "fedavg") for client in cluster.settings.client_ids
    }
    assert all(int(row["up_wire_bytes"]) > 0 for row in rows if row["phase"] == "train")
    assert "fedavg" in (out / "report.html").read_text()
    said = types("cluster", "status", "--dir", str(cluster.directory)).output
    for client in cluster.settings.client_ids:  # the task may be folded
        assert re.search(rf"^{client} +\d+ +same +\d+ +image.* ago *$", said, re.M), said
