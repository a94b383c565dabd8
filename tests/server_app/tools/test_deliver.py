"""``fedalloy deliver`` over nodes without a model, and who is who in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server_app.run.run_directory import RunDirectoryError
from server_app.tools.cli import app
from server_app.tools.cluster.superlink import ClusterError, RunOutcome
from server_app.tools.deliver import adopt, deliver
from server_app.tools.who import last_registrations, registrations
from tests.faults.nodes import NodeGrid, run_nodes
from tests.server_app.run.ending.test_adoption import DAN, finished
from tests.server_app.run.ending.test_late_delivery import absent_at_the_end


class InProcess:
    """Stands for a SuperLink: the run that it is asked for happens here."""

    def __init__(self, grid: NodeGrid) -> None:
        self.grid = grid

    def run(self, config: dict[str, Any]) -> RunOutcome:
        try:
            run_nodes(Path(config["runs-dir"]), self.grid, **{key.replace("-", "_"): v for key, v in config.items()})
        except Exception:
            return RunOutcome("1", "finished:failed", Path("log"))
        return RunOutcome("1", "finished:completed", Path("log"))


def test_deliver_says_who_has_its_model_and_why_not(tmp_path: Path) -> None:
    grid, run = absent_at_the_end(tmp_path)
    superlink: Any = InProcess(grid)
    with pytest.raises(ClusterError, match="cyd did not come within 1 s"):
        deliver(run.path, "", superlink)
    grid.online.add(3)
    assert deliver(run.path, "", superlink) == ["cyd"]
    assert deliver(run.path, "", superlink) == []
    assert deliver(run.path, "ada,cyd", superlink) == ["ada", "cyd"]
    assert registrations(run)["cyd"]["node"] == "3"
    assert set(last_registrations(tmp_path)) == {"ada", "ben", "cyd"}


@pytest.mark.parametrize("command", ["deliver", "adopt"])
def test_without_a_cluster_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    _, run = finished(tmp_path)
    result = CliRunner().invoke(app, [command, str(run.path)], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert "no cluster was started from" in result.output
    assert "--connection NAME" in result.output


def test_adopt_says_what_each_newcomer_has_been_given_and_why_not(tmp_path: Path) -> None:
    grid, run = finished(tmp_path)
    superlink: Any = InProcess(grid)
    grid.online.discard(DAN)
    with pytest.raises(ClusterError, match="nobody is new"):
        adopt(run.path, "", superlink, {})
    grid.online.add(DAN)
    said = adopt(run.path, "dan", superlink, {"adopt-examples": 5})
    assert list(said) == ["dan"]
    assert said["dan"].startswith("1 x model delivered; loss ")
    assert "on 5 examples" in said["dan"]
    with pytest.raises(RunDirectoryError, match="ada trained in the run"):
        adopt(run.path, "ada", superlink, {})
