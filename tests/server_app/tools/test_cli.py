"""The command line: errors are one clear line, tables fit a terminal, export copies all or nothing."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from server_app.tools.cli import app
from server_app.tools.cluster.local import ClusterError, LocalCluster, Process, Settings, running, started, stop
from server_app.tools.cluster.superlink import SuperLink, literal
from server_app.tools.commands.arguments import parse_run_config, read_clients_file
from server_app.tools.demo import DemoResult, free_name, table
from server_app.tools.handover.export import ExportError, export_adapter
from strategies.framework.options import OptionError

runner = CliRunner()


def test_help_fits_80_columns_and_names_every_command() -> None:
    shown = runner.invoke(app, ["--help"], env={"COLUMNS": "80", "TERM": "dumb"}).output
    assert all(len(line) <= 80 for line in shown.splitlines())
    for command in ("demo", "compare", "cluster", "traffic", "export", "options", "--version", "Look at a run"):
        assert command in shown
    assert "─ Commands ─" not in shown  # each has a group


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["comapre"], "did you mean 'compare'?"),
        (["cluster", "stats"], "did you mean 'status'?"),
        (["site", "sho"], "mean 'show'?"),
        (["x"], "there are"),
    ],
)
def test_a_command_that_does_not_exist_is_told_the_nearest(words: list[str], said: str) -> None:
    result = runner.invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert said in result.output


def test_versions_are_said() -> None:
    assert "flwr 1.39" in runner.invoke(app, ["--version"]).output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--strategies", "fedavgg"], "--strategies = 'fedavgg' (did you mean 'fedavg'?)"),
        (["compare", "digits", "--strategies", "dito"], "--strategies = 'dito' (did you mean 'ditto'?)"),
        (["compare", "digit"], "SCENARIO = 'digit' (did you mean 'digits'?)"),
        (["compare", "--set", "ditto.pul=1"], "unknown run-config key 'ditto.pul'; did you mean 'ditto.pull'?"),
        (["compare", "--cluster", "--jobs", "2"], "--jobs = 2 with --cluster"),
        (["options", "fedmerge.model=3"], "unknown run-config key 'fedmerge.model'; did you mean 'fedmerge.models'?"),
        (["options", "seed='x'"], "seed = 'x' is str, expected int"),
        (["options", "strategy='fedavgg'"], "did you mean 'fedavg'?"),
        (["options", "fedavg.space='deltas'"], "fedavg.space = 'deltas' (did you mean 'delta'?)"),
        (["options", "nonsense"], "cannot read 'nonsense'"),
        (["export", "nowhere", "berlin", "out"], "nowhere has no clients/ folder"),
        (["cluster", "up", "--client-ids", "a,b/c"], "client id 'b/c', expected letters, digits and ._- only"),
        (["cluster", "up", "--client-ids", "a,b,a"], "client id 'a' occurs twice"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(arguments: list[str], said: str) -> None:
    result = runner.invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_comparison_on_a_federation_is_of_all_that_are_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SuperLink, "online", lambda self: 1)
    result = runner.invoke(app, ["compare", "--connection", "mine"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "error: --connection mine: SuperNodes online = 1, expected at least 2" in result.output


def test_valid_run_config_is_accepted_and_the_keys_are_listed() -> None:
    assert runner.invoke(app, ["options", "strategy='fedmerge' fedmerge.models=2 learning-rate=1e-2"]).exit_code == 0
    shown = runner.invoke(app, ["options"], env={"COLUMNS": "80"}).output
    assert "fedmerge.cluster-temperature" in shown
    few = runner.invoke(app, ["options", "evaluate-e"], env={"COLUMNS": "80"}).output
    assert "evaluate-every = 1\n    Clients evaluate their models in the first round" in few
    assert "learning-rate" not in few
    assert 'client.private-slots = ""' in runner.invoke(app, ["options", "private-slots"]).output


def test_run_config_text_is_read_as_flower_reads_it() -> None:
    assert parse_run_config("strategy='fedavg' seed=1 fedmerge.w-client-weight=true") == {
        "strategy": "fedavg",
        "seed": 1,
        "fedmerge.w-client-weight": True,
    }
    with pytest.raises(OptionError, match="expected pairs"):
        parse_run_config("= =")


def test_a_port_in_use_names_the_port_and_its_holder(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cluster = LocalCluster(tmp_path / "c", Settings(("a",), tmp_path / "runs", fleet_port=port))
        with pytest.raises(
            ClusterError, match=rf"port {port} for the Fleet link is in use by .* \(pid {os.getpid()}\)"
        ):
            cluster.up()
    assert not (tmp_path / "c" / "cluster.json").exists()


def test_a_cluster_that_was_never_started_is_said_to_be_none(tmp_path: Path) -> None:
    folder = ["--dir", str(tmp_path / "c")]
    status = runner.invoke(app, ["cluster", "status", *folder], env={"COLUMNS": "200"})
    assert (status.exit_code, "no cluster was started from" in status.output) == (1, True)
    down = runner.invoke(app, ["cluster", "down", *folder])
    assert (down.exit_code, down.output) == (0, "no cluster is running\n")


def test_help_says_what_arguments_are() -> None:
    """This depends on the versions of click and typer."""
    assert "A run directory." in runner.invoke(app, ["traffic", "--help"]).output


@pytest.mark.parametrize("module", ["server_app.tools.cli", "server_app.tools.bundle.start"])
def test_no_command_waits_for_torch_before_it_needs_it(module: str) -> None:
    loaded = subprocess.check_output([sys.executable, "-c", f"import sys, {module}; print('torch' in sys.modules)"])
    assert loaded.strip() == b"False"


def test_stop_never_touches_a_recycled_pid_and_twice_is_fine(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        state = {"processes": [{"name": "superlink", "pid": other.pid, "started": 1.0}]}
        (tmp_path / "cluster.json").write_text(json.dumps(state))
        assert running(tmp_path) == []
        assert stop(tmp_path) == 0
        assert stop(tmp_path) == 0
        assert other.poll() is None
        other.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems say when a process started")
def test_a_process_is_found_after_the_clock_was_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux rounds the time of the boot down to seconds: a correction of milliseconds can move it by one."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found = Process("x", child.pid, started(psutil.Process(child.pid)))
        before, boot = psutil.Process(child.pid).create_time(), psutil.boot_time()
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot + 1)
        assert psutil.Process(child.pid).create_time() == before + 1
        assert found.find() is not None
        child.kill()


def test_stop_ends_descendants_too(tmp_path: Path) -> None:
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    script = f"import subprocess, sys; {child}; input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as parent:
        family = psutil.Process(parent.pid)
        while not (children := family.children()):
            pass
        assert stop(tmp_path, [Process("x", parent.pid, started(family))]) == 2
        assert not children[0].is_running() or children[0].status() == psutil.STATUS_ZOMBIE


def test_the_table_fits_80_columns_and_shows_failures() -> None:
    summary = {
        "mean_accuracy": 0.91234,
        "worst_accuracy": 0.8,
        "bytes": {"up": {"wire": 12_345_678}, "down": {"wire": None}},
        "seconds": {"total": 61.4},
    }
    out = io.StringIO()
    results = [DemoResult("fedmerge", Path("r"), summary), DemoResult("local", Path("q"), None, "because")]
    Console(file=out, width=80).print(table(results))
    shown = out.getvalue()
    assert all(len(line) <= 80 for line in shown.splitlines())
    for text in ("0.912", "0.800", "12.35", "not measured", "61", "failed"):
        assert text in shown


def test_a_run_name_is_never_taken_twice(tmp_path: Path) -> None:
    assert free_name(tmp_path, "demo-local") == "demo-local"
    (tmp_path / "demo-local").mkdir()
    (tmp_path / "demo-local-2").mkdir()
    assert free_name(tmp_path, "demo-local") == "demo-local-3"


def test_export_copies_all_or_nothing_and_names_what_there_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    source = run / "clients" / "berlin" / "adapter"
    source.mkdir(parents=True)
    (run / "clients" / "paris").mkdir()
    with pytest.raises(ExportError, match="has no client 'rome'; it has berlin, paris"):
        export_adapter(run, "rome", tmp_path / "out")
    with pytest.raises(ExportError, match="client 'berlin' has no personal model yet"):
        export_adapter(run, "berlin", tmp_path / "out")
    (source / "adapter_config.json").write_text("{}")
    (source / "adapter_model.safetensors").write_bytes(b"x")
    export_adapter(run, "berlin", tmp_path / "deep" / "out")
    assert (tmp_path / "deep" / "out" / "adapter_model.safetensors").read_bytes() == b"x"
    with pytest.raises(ExportError, match="exists and is not an empty folder"):
        export_adapter(run, "berlin", tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.glob("**/.*")] == []


def test_values_reach_flower_as_they_are() -> None:
    """Paths with spaces and quotes, read back by Flower's own reader."""
    from flwr.common.config import parse_config_args

    values = {"a": "/data/my files/x.jsonl", "b": "/o'brien/x", "c": 'say "hi"', "d": True, "e": 1e-3, "f": "C:\\x"}
    text = " ".join(f"{key}={literal(value)}" for key, value in values.items())
    assert parse_config_args([text]) == values
    for impossible in ("'\"", "'\\", "a\nb"):
        with pytest.raises(ClusterError, match="cannot be given to Flower"):
            literal(impossible)


def test_a_clients_file_has_a_table_for_each_client(tmp_path: Path) -> None:
    path = tmp_path / "clients.toml"
    path.write_text("[berlin]\ndata-path = 'a.jsonl'\nlora-r = 4\ntrainer.resident = false\n[paris]\n")
    berlin = {"data-path": str(tmp_path / "a.jsonl"), "lora-r": 4, "trainer.resident": False}
    assert read_clients_file(path) == {"berlin": berlin, "paris": {}}
    for content, said in (("berlin = 1", "not a table"), ("[a]\nb = [1]", "a.b = "), ("[", "cannot be read")):
        path.write_text(content)
        with pytest.raises(OptionError, match=said):
            read_clients_file(path)


def test_paths_of_a_clients_file_are_relative_to_it_and_names_of_the_hub_stay(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    path = tmp_path / "clients.toml"
    path.write_text(
        "[a]\ndata-path = 'owner/set'\nbase-model = 'base'\n[b]\nbase-model = 'org/base'\nstate-dir = 's'\n"
    )
    assert read_clients_file(path) == {
        "a": {"data-path": "owner/set", "base-model": str(tmp_path / "base")},
        "b": {"base-model": "org/base", "state-dir": str(tmp_path / "s")},
    }


def test_misspelt_keys_of_a_clients_file_are_named_with_their_client(tmp_path: Path) -> None:
    path = tmp_path / "clients.toml"
    path.write_text("[a]\ndata-pth = 'x'\n[b]\nsplit-colum = 'part'\n")
    for command in (["cluster", "up"], ["compare"]):
        result = runner.invoke(app, [*command, "--clients-file", str(path)], env={"COLUMNS": "200"})
        assert result.exit_code == 1
        known = "; docs/options.md lists the known ones"
        assert result.output.splitlines() == [
            f"error: {path}: client 'a' has an unknown key: 'data-pth' (did you mean 'data-path'?){known}",
            f"error: {path}: client 'b' has an unknown key: 'split-colum' (did you mean 'split-column'?){known}",
        ]
