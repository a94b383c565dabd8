"""Who may read what is written, who may lock it, and how a wait ends."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedalloy_adapters.files.atomic_files import locked, private_folder, write_durably
from server_app.ledger.store import Ledger
from server_app.run.run_directory import RunDirectory
from strategies.framework.exchange import State


@pytest.fixture(autouse=True)
def open_mask() -> Iterator[None]:
    """The usual umask, under which everybody may read."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(folder: Path) -> set[str]:
    """Modes of everything in a folder, by kind."""
    found = [path.lstat() for path in [folder, *folder.rglob("*")]]
    return {f"{'d' if stat.S_ISDIR(item.st_mode) else 'f'}{stat.S_IMODE(item.st_mode):o}" for item in found}


def test_what_is_written_is_its_owners_alone(tmp_path: Path) -> None:
    write_durably(tmp_path / "a" / "b" / "state.json", b"{}")
    with locked(tmp_path / "a" / ".lock"):
        assert modes(tmp_path / "a") == {"d700", "f600"}


def test_a_run_directory_is_its_owners_alone(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "runs", "one", "strategy = 'fedavg'\n")
    directory.append_round({"phase": "train", "round": 1})
    directory.save_checkpoint(1, State(), keep=2)
    directory.save_registration("ada", b"x")
    directory.write_summary({})
    with directory.alone(), Ledger(directory.path / "ledger.sqlite", "one") as ledger:
        ledger.message(1, "ada", "up", "train", 1, 1)
        assert modes(tmp_path / "runs") == {"d700", "f600"}


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o755)
    private_folder(tmp_path / "shared" / "mine")
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "shared" / "mine").stat().st_mode) == 0o700


def test_an_old_lock_that_others_could_open_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch(mode=0o644)
    with locked(tmp_path / ".lock"):
        assert stat.S_IMODE((tmp_path / ".lock").stat().st_mode) == 0o600


def test_a_wait_for_a_lock_can_be_ended(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, sys; f = open({str(path)!r}, 'w'); fcntl.flock(f, 2); print(flush=True);"
         "sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    looks = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            raise TimeoutError("nobody waits for this any more")

    try:
        with pytest.raises(TimeoutError), locked(path, waiting=look):
            raise AssertionError("the lock is held by somebody else")
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            raise AssertionError("the lock is held by somebody else")
    finally:
        holder.communicate()
    with locked(path, waiting=look):
        assert len(looks) == 3


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*state\.json'"):
        write_durably(tmp_path / "state.json", b"{}")
    assert not list(tmp_path.iterdir())
