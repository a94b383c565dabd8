"""``fedalloy run``: nothing starts if something is wrong, and the exit code says how the run ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from server_app.run.run_directory import RunDirectory
from server_app.tools.cli import app
from server_app.tools.cluster.superlink import ClusterError, RunOutcome, SuperLink
from server_app.tools.compare.processes import in_process
from tests.server_app.tools.live.test_state import record

Script = Callable[[RunDirectory], str]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Runs the command with a SuperLink that plays a script: it writes what a run would, and says how it ended."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)

    def command(script: Script, run_config: str = "", *options: str, online: int = 2) -> Result:
        def run(
            self: SuperLink, config: Mapping[str, Any], watch: Callable[[], object], stops: Callable[[], bool]
        ) -> RunOutcome:
            made = RunDirectory.create(Path(config["runs-dir"]), config["run-name"], "num-server-rounds = 2\n")
            (tmp_path / "log").write_text("one line\n")
            try:
                status = script(made)
            except KeyboardInterrupt:
                (tmp_path / "told").write_text(str(stops()))
                raise
            watch()
            return RunOutcome("1", status, tmp_path / "log")

        monkeypatch.setattr(SuperLink, "run", run)
        monkeypatch.setattr(SuperLink, "online", lambda self: online)
        words = ["run", run_config, "--connection", "somewhere", "--runs-dir", str(tmp_path / "runs"), *options]
        return CliRunner().invoke(app, words, env={"COLUMNS": "300"})

    return command


def succeeds(run: RunDirectory) -> str:
    run.append_round(record("train", 1))
    run.write_summary({"mean_accuracy": 0.75, "worst_accuracy": 0.5, "clients": {"a": {}}})
    return "finished:completed"


def stops_itself(run: RunDirectory) -> str:
    run.append_round(record("stopped", 0, clients={}, reason="1 of at least 2 clients answered"))
    return "finished:failed"


def raises(run: RunDirectory) -> str:
    traceback = "Traceback (most recent call last):\n  File x\nValueError: what the ServerApp said\n"
    (run.path.parents[1] / "log").write_text(traceback)
    return "finished:failed"


def interrupted(run: RunDirectory) -> str:
    raise KeyboardInterrupt


def test_a_run_that_succeeds_ends_with_0_and_its_scores(played: Callable[..., Result], tmp_path: Path) -> None:
    for name in ("fedavg-digits", "fedavg-digits-2"):
        result = played(succeeds)
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        assert lines[0].endswith(f"runs/{name}")
        assert lines[-1] == "finished: mean accuracy 0.750, worst 0.500"
    assert "the run waits for 5" in played(succeeds, "min-clients=5").output


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (stops_itself, "1 of at least 2 clients answered"),
        (raises, "error: ValueError: what the ServerApp said"),
        (lambda run: "finished:completed", "the run ended as finished:completed"),  # and left no summary
    ],
)
def test_a_run_that_fails_ends_with_1_and_the_cause(played: Callable[..., Result], script: Script, said: str) -> None:
    result = played(script)
    assert result.exit_code == 1
    assert said in result.output


def test_what_is_wrong_is_said_before_anything_starts(played: Callable[..., Result], tmp_path: Path) -> None:
    def never(run: RunDirectory) -> str:
        raise AssertionError("it started")

    clients = tmp_path / "clients.toml"
    clients.write_text('[ada]\ndata-path = "nowhere.jsonl"\n')
    result = played(never, "strategy='fedavgg' lora-r=0", "--clients-file", str(clients))
    assert result.exit_code == 1
    for part in ("did you mean 'fedavg'", "lora-r = 0", "client 'ada'"):
        assert part in result.output
    played(succeeds, "run-name='mine'")
    assert "already holds a run" in played(never, "run-name='mine'").output


@pytest.mark.parametrize(("wish", "stopped"), [("stop", "True"), ("leave", "False"), ("ask", "True")])
def test_ctrl_c_stops_the_run_or_leaves_it(
    played: Callable[..., Result], tmp_path: Path, wish: str, stopped: str
) -> None:
    result = played(interrupted, "", "--on-interrupt", wish)
    assert result.exit_code == 130
    assert (tmp_path / "told").read_text() == stopped
    assert ("fedalloy watch" in result.output) == (wish == "leave")


def test_without_a_cluster_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["run"], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert "fedalloy cluster up" in result.output
    assert issubclass(ClusterError, Exception)


def test_a_run_without_a_network_can_be_watched_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_dir: Path
) -> None:
    """A client notes its steps where ``fedalloy watch`` looks; its numbers are those of a run without notes."""
    from client_app.plan import progress_file
    from server_app.tools.live.state import read_state

    seen: list[tuple[int, int]] = []
    summaries = []
    write = progress_file.write_lightly

    def spy(path: Path, found: Any) -> None:
        write(path, found)
        if found["activity"] == "train" and found["done"]:
            client = read_state(runs_dir / "with").clients[0]
            seen.append((client.done, client.total))

    monkeypatch.setattr(progress_file, "write_lightly", spy)
    for name, seconds in (("with", 1e-9), ("without", 0.0)):

        def look() -> None:
            state = read_state(runs_dir / name)  # noqa: B023
            assert state.state == "running"

        config = {"strategy": "fedavg", "num-server-rounds": 1, "local-steps": 3, "min-clients": 2, "run-name": name}
        in_process(config | {"client.progress-seconds": seconds}, 2, runs_dir, look)
        summaries.append(read_state(runs_dir / name).summary["clients"])
    assert summaries[0] == summaries[1]
    assert (2, 3) in seen
    assert not (runs_dir / "with" / "progress.json").exists()
