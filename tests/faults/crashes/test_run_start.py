"""A run directory is one run's from its first moment, and has the run-config as it was given."""

from __future__ import annotations

import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_app.run import run_directory
from server_app.run.options import as_toml
from server_app.run.run_directory import RunDirectory, RunDirectoryError, dotted

KEYS = st.sampled_from(["run-name", "data-path", "resume", "fedmerge.mu", "seed", "labels"])
VALUES = st.one_of(st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.text())
CONFIGS = st.dictionaries(KEYS, VALUES)


@given(CONFIGS)
def test_what_is_written_is_what_is_read(config: dict[str, Any]) -> None:
    assert dict(dotted(tomllib.loads(as_toml(config)))) == config


@given(st.text())
def test_a_value_adds_no_line_and_takes_none_away(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("runs")
    directory = RunDirectory.create(folder, "run", as_toml({"labels": text, "resume": "", "seed": 1}))
    found = tomllib.loads((directory.path / "resume.toml").read_text("utf-8"))
    assert found == {"labels": text, "resume": str(directory.path), "seed": 1}
    assert directory.config() == {"labels": text, "resume": "", "seed": 1}


def test_of_two_runs_that_start_at_once_under_one_name_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one makes all of its folder between two writes of the first one."""
    failed: list[str] = []
    write, begun = run_directory.write_durably, threading.Event()

    def create(name: str) -> None:
        try:
            RunDirectory.create(tmp_path, "run", f'labels = "{name}"\n')
        except RunDirectoryError as error:
            failed.append(f"{name}: {error}")

    def slow(path: Path, data: bytes) -> None:
        write(path, data)
        if not begun.is_set():
            begun.set()
            second = threading.Thread(target=create, args=("second",))
            second.start()
            second.join(60)

    monkeypatch.setattr(run_directory, "write_durably", slow)
    create("first")
    assert len(failed) == 1
    assert "run already holds a run; choose another run-name" in failed[0]
    winner = "first" if failed[0].startswith("second") else "second"
    assert RunDirectory(tmp_path / "run").config() == {"labels": winner}
    assert winner in (tmp_path / "run" / "resume.toml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    RunDirectory.create(tmp_path, "run", "")  # an empty one is taken
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="else already holds files that are not a run's"):
        RunDirectory.create(tmp_path, "else", "")
    assert [path.name for path in (tmp_path / "else").iterdir()] == ["notes.txt"]
