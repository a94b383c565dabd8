"""A run directory stays valid, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from server_app.run.run_directory import RunDirectory, RunDirectoryError
from strategies.framework.exchange import State

WRITER = """
import sys, torch
from pathlib import Path
from server_app.run.run_directory import RunDirectory
from strategies.framework.exchange import State
directory = RunDirectory(Path(sys.argv[1]))
print("ready", flush=True)
for round_ in range(1, 100000):
    directory.append_round({"phase": "train", "round": round_, "filler": "x" * 500})
    directory.save_checkpoint(round_, State({"t": torch.full((20000,), float(round_))}, {"round": round_}), 2)
"""


@pytest.mark.long
def test_killed_at_random_moments_records_and_checkpoints_are_whole(tmp_path: Path) -> None:
    """SIGKILL at 12 seeded moments: every record parses, the newest checkpoint is complete and consistent."""
    generator = torch.Generator().manual_seed(7)
    for attempt in range(12):
        directory = RunDirectory.create(tmp_path, f"run-{attempt}", "")
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(directory.path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(float(torch.rand(1, generator=generator)) * 0.3 + 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        rounds = [record["round"] for record in directory.rounds()]
        assert rounds == list(range(1, len(rounds) + 1))
        loaded = directory.newest_checkpoint()
        if loaded is None:
            assert len(rounds) <= 1
            continue
        round_, state = loaded.round, loaded.state
        assert round_ in (len(rounds), len(rounds) - 1)
        assert state.values == {"round": round_}
        assert torch.equal(state.tensors["t"], torch.full((20000,), float(round_)))


def test_a_torn_last_line_is_left_out_and_a_later_record_starts_a_line_of_its_own(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "run", "")
    directory.append_round({"phase": "train", "round": 1})
    with (directory.path / "rounds.jsonl").open("a") as file:
        file.write('{"phase": "train", "round": 2, "cli')
    directory.append_round({"phase": "train", "round": 3})
    assert [record["round"] for record in directory.rounds()] == [1, 3]


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "run", "")
    for round_ in range(1, 6):
        directory.save_checkpoint(round_, State({}, {}), keep=3)
    kept = sorted(path.name for path in (directory.path / "checkpoints").iterdir())
    assert kept == ["round-0003", "round-0004", "round-0005"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RunDirectoryError, match=r"cannot write the run directory .*file/run: Not a directory"):
        RunDirectory.create(blocked, "run", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
@pytest.mark.parametrize(("options", "reason"), [("size=64k", "No space left on device"), ("ro", "Read-only")])
def test_full_disk_and_read_only_disk_say_so_and_what_was_written_stays(
    tmp_path: Path, options: str, reason: str
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    try:
        directory = RunDirectory.create(folder, "run", "strategy = 'fedavg'\n")
        directory.append_round({"phase": "train", "round": 1})
        directory.save_checkpoint(1, State({"t": torch.ones(100)}, {}), 2)
        if options == "ro":
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(RunDirectoryError, match=reason):
            directory.save_checkpoint(2, State({"t": torch.ones(100_000)}, {}), 2)
        loaded = directory.newest_checkpoint()
        assert loaded is not None
        assert loaded.round == 1
        assert [record["round"] for record in directory.rounds()] == [1]
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_checkpoint_whose_values_are_damaged_is_passed_over(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "run", "")
    for round_ in (1, 2):
        directory.save_checkpoint(round_, State({}, {}), 2, {"clients": [{"id": "berlin", "examples": 30}]})
    path = directory.path / "checkpoints" / "round-0002" / "state.json"
    path.write_text(path.read_text().replace("30", "39"))
    found = directory.newest_checkpoint()
    assert found is not None
    assert found.round == 1
