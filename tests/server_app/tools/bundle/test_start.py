from __future__ import annotations

import io
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.control_pb2 import StartRunResponse, StreamLogsResponse

from server_app.tools.bundle import start

ROOT = Path(__file__).resolve().parents[4]


class Control:
    """Stands for the SuperLink's control API."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def StartRun(self, request: Any) -> StartRunResponse:
        self.requests.append(request)
        return StartRunResponse(run_id=7)

    def close(self) -> None:
        pass


def test_flowers_own_command_sends_the_packed_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, control = import_module(start.COMMAND), Control()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("LICENSE", ".info/CONTENT", "client_app/app.py", "server_app/app.py"):
            archive.writestr(name, name)
        archive.writestr("pyproject.toml", (ROOT / "pyproject.toml").read_text())
    monkeypatch.setattr(command, "build_fab_from_disk", lambda folder: buffer.getvalue())
    monkeypatch.setattr(command, "init_http_client_from_connection", lambda connection: control)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text('[superlink.somewhere]\naddress = "127.0.0.1:1"\ninsecure = true\n')
    with pytest.raises(SystemExit) as ended:
        start.flwr_run([str(ROOT), "somewhere", "--run-config", "seed=3"])
    assert ended.value.code == 0
    (request,) = control.requests
    assert request.override_config["seed"].sint64 == 3
    with zipfile.ZipFile(io.BytesIO(request.fab.content)) as archive:
        assert "fedalloy_bundle/sources" in archive.namelist()
        assert "client_app/app.py" not in archive.namelist()
    assert command.build_fab_from_disk(ROOT) == buffer.getvalue()  # as it was


class Failing(Control):
    """This control API raises when a run is started."""

    def StreamLogs(self, request: Any) -> Any:
        raised = "Traceback (most recent call last):\n  File x\nserver_app.a.B: seed = -1\nERROR : Exit Code: 201\n"
        for text in ("INFO : begun\n", "ERROR : ServerApp raised an exception\n", raised):
            yield StreamLogsResponse(log_output=text, latest_timestamp=1.0)


@pytest.mark.parametrize("more", [[], ["--verbose"]])
def test_a_failed_run_is_one_line_and_exit_code_1(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = import_module(start.COMMAND)
    monkeypatch.setattr(start, "packed", lambda plain: b"")
    monkeypatch.setattr(command, "build_fab_from_disk", lambda folder: b"")
    monkeypatch.setattr(command, "init_http_client_from_connection", lambda connection: Failing())
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text('[superlink.somewhere]\naddress = "127.0.0.1:1"\ninsecure = true\n')
    with pytest.raises(SystemExit) as ended:
        start.flwr_run([str(ROOT), "somewhere", "--stream", *more])
    said = capsys.readouterr().out
    assert ("Exit Code: 201" in said) == bool(more)
    assert ("error: seed = -1\n" in said) != bool(more)
    assert "INFO : begun\n" in said
    assert ended.value.code == 1
