"""A plan's progress file: it is rate limited, can be switched off, is gone at the end, and never harms the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client_app.plan.progress import tick
from client_app.plan.progress_file import NAME, shown_in


def test_the_file_says_step_and_loss_and_goes_with_the_plan(tmp_path: Path) -> None:
    with shown_in(tmp_path, 3, 1e-9):
        tick("train", 4, 30, 0.123456789)
        found = json.loads((tmp_path / NAME).read_text())
        assert (tmp_path / NAME).stat().st_mode & 0o077 == 0
    assert found.pop("time") > 0
    assert found == {"round": 3, "activity": "train", "done": 4, "total": 30, "loss": 0.123457}
    assert list(tmp_path.iterdir()) == []


def test_it_is_written_once_in_so_many_seconds_and_not_at_all_for_0(tmp_path: Path) -> None:
    with shown_in(tmp_path, 1, 3600.0):
        tick("train", 1, 30)
        tick("train", 2, 30)
        assert json.loads((tmp_path / NAME).read_text())["done"] == 1
    with shown_in(tmp_path, 1, 0.0):
        tick("train", 1, 30)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_cannot_be_written_harms_nobody(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    with shown_in(tmp_path / folder, 1, 1e-9):
        tick("train", 1, 30, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
