from __future__ import annotations

from pathlib import Path

import pytest

from server_app.run.known_runs import known_runs, note_run
from server_app.tools.who import last_registrations
from tests.server_app.run.ending.test_late_delivery import absent_at_the_end


def test_runs_that_were_written_elsewhere_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_runs(tmp_path / "home") == []
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    _, run = absent_at_the_end(tmp_path / "else where")
    assert run.path.resolve() in known_runs(tmp_path / "home")
    note_run(tmp_path / "gone")
    assert known_runs(tmp_path / "home")[-1] == tmp_path / "gone"
    assert set(last_registrations(tmp_path / "runs", known_runs(tmp_path / "home"))) == {"ada", "ben", "cyd"}


def test_nothing_depends_on_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fedalloy").write_text("a file where a folder should be")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    note_run(tmp_path / "run")
    assert known_runs(tmp_path) == []
    monkeypatch.delenv("FLWR_HOME")
    note_run(tmp_path / "run")
