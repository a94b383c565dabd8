"""Full disks and read-only folders at every write of the server and of a client: errors by name, and nothing torn.

In process, where every single write can be made to fail; ``test_kills.py`` has disks that fill up under a whole run
with real clients.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from client_app.plan.slots import SlotStore
from server_app.run.run_directory import RunDirectory, RunDirectoryError
from tests.faults.killing import LONG, assert_valid
from tests.faults.nodes import NodeGrid, nodes, run_nodes, statuses
from tests.faults.reports import LAYOUT
from tests.strategies.conftest import random_adapter

HEADS = {"head.weight": torch.zeros(3, 5), "head.bias": torch.zeros(3)}
NOBODY = 65534


class Disk:
    """Every flush from the one with this number on fails as on a full disk; 0: none does."""

    def __init__(self) -> None:
        self.flushes, self.full_from = 0, 0
        self.fsync = os.fsync

    def flush(self, descriptor: int) -> None:
        self.flushes += 1
        if self.full_from and self.flushes >= self.full_from:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(descriptor)

    def fill(self, after: int) -> None:
        self.flushes, self.full_from = 0, after


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    monkeypatch.setattr(os, "fsync", found.flush)
    return found


def state_of(run: Path) -> dict[str, torch.Tensor]:
    found = RunDirectory(run).newest_checkpoint()
    assert found is not None
    return dict(found.state.tensors)


@pytest.mark.parametrize("strategy", ["fedavg", "fedmosaic"] if LONG else ["fedavg"])
def test_the_disk_is_full_at_each_write_of_the_server(strategy: str, disk: Disk, tmp_path: Path) -> None:
    """Everything the server writes is flushed, so this is every write; then there is room again and the run goes on."""
    disk.fill(0)
    baseline = run_nodes(tmp_path, NodeGrid(nodes("ada", "ben")), run_name="baseline", strategy=strategy).path
    writes = disk.flushes
    assert writes > 20
    for number in range(1, writes + 1, 1 if LONG else 3):
        run, clients = tmp_path / f"full-{number}", nodes("ada", "ben")
        disk.fill(number)
        with pytest.raises(RunDirectoryError, match=r"cannot write the run directory .*: No space left on device"):
            run_nodes(tmp_path, NodeGrid(clients), run_name=run.name, strategy=strategy)
        assert_valid(run)
        disk.fill(0)
        if not (run / "summary.json").exists():  # what is written last; after it only the flush of its name can fail
            begun = {"resume": str(run)} if (run / "config.toml").exists() else {}
            run_nodes(tmp_path, NodeGrid(clients), run_name=run.name, strategy=strategy, **begun)
        expected, found = state_of(baseline), state_of(run)
        assert set(found) == set(expected)
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
        assert statuses(RunDirectory(run)) == statuses(RunDirectory(baseline))
        shutil.rmtree(run)


def store(folder: Path) -> SlotStore:
    return SlotStore(folder, "toy", lambda: HEADS)


def carry_out(folder: Path, round_: int) -> None:
    with store(folder).transaction(round_) as slots:
        for slot in ("global", "local"):
            slots[slot] = random_adapter(LAYOUT, round_, 1e-3)
        slots.save_personal(slots["local"])


class Look(Exception):
    """Leaves a transaction without a commit."""


def slots_of(folder: Path) -> dict[str, bytes]:
    """What the next plan would find; nothing is written."""
    found = {}
    with contextlib.suppress(Look), store(folder).transaction(9) as slots:
        found = {slot: slots[slot].digest for slot in slots.names()}
        raise Look
    return found


def test_the_disk_is_full_at_each_write_of_a_client(disk: Disk, tmp_path: Path) -> None:
    carry_out(tmp_path / "once", 1)
    before = slots_of(tmp_path / "once")
    disk.fill(0)
    carry_out(tmp_path / "once", 2)
    after, writes = slots_of(tmp_path / "once"), disk.flushes
    assert before != after
    for number in range(1, writes + 1):
        folder = tmp_path / f"full-{number}"
        disk.fill(0)
        carry_out(folder, 1)
        disk.fill(number)
        with pytest.raises(OSError, match="No space left on device"):
            carry_out(folder, 2)
        disk.fill(0)
        assert slots_of(folder) in (before, after)
        carry_out(folder, 2)  # the server asks once more
        assert slots_of(folder) == after


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can reach: pytest's own are closed to other users."""
    folder = Path(tempfile.mkdtemp(prefix="fedalloy-faults-"))
    folder.chmod(0o755)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def as_user(work: Callable[[], None]) -> int:
    """In a child that the rights of files bind, which they do not for root; its exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        if os.geteuid() == 0:
            os.setresuid(NOBODY, NOBODY, NOBODY)
        work()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)
    os._exit(0)


def give(folder: Path) -> None:
    """To the user of :func:`as_user`."""
    if os.geteuid() == 0:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)


def test_a_read_only_folder_for_runs_is_named_before_anybody_is_asked(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    clients = nodes("ada", "ben")

    def work() -> None:
        with pytest.raises(RunDirectoryError, match=r"cannot write the run directory .*run: Permission denied"):
            run_nodes(open_folder, NodeGrid(clients))
        assert not [node for node in clients.values() if node.plans]

    assert as_user(work) == 0


def test_a_run_whose_folder_becomes_read_only_stops_by_name_and_goes_on_when_it_can(open_folder: Path) -> None:
    give(open_folder)
    run = open_folder / "run"

    def work() -> None:
        baseline = run_nodes(open_folder, NodeGrid(nodes("ada", "ben")), run_name="baseline", num_server_rounds=3).path
        clients, writable = nodes("ada", "ben"), []

        def close(grid: NodeGrid) -> None:
            if (run / "checkpoints" / "round-0001").exists() and not writable:
                writable.extend([run, *(path for path in run.rglob("*") if path.is_dir())])
                for path in writable:
                    path.chmod(0o555)

        grid = NodeGrid(clients, at=dict.fromkeys(range(1, 100), close))
        with pytest.raises(RunDirectoryError, match=r"cannot write the run directory .*run: Permission denied"):
            run_nodes(open_folder, grid, num_server_rounds=3)
        assert writable
        for path in writable:
            path.chmod(0o755)
        assert_valid(run, 1)
        run_nodes(open_folder, NodeGrid(clients), num_server_rounds=3, resume=str(run))
        expected, found = state_of(baseline), state_of(run)
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())

    assert as_user(work) == 0


def test_a_read_only_folder_of_a_client_changes_nothing(open_folder: Path) -> None:
    give(open_folder)
    folder = open_folder / "ada"

    def work() -> None:
        carry_out(folder, 1)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        for path in folders:
            path.chmod(0o555)
        with pytest.raises(PermissionError, match=str(folder)):
            carry_out(folder, 2)
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert not folder.stat().st_mode & stat.S_IWUSR
        for path in folders:
            path.chmod(0o755)
        carry_out(folder, 2)

    assert as_user(work) == 0


class Killed(BaseException):
    """What a process does not survive."""


def test_a_client_killed_between_two_renames_has_the_personal_model_of_its_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, left, done = os.rename, [10**6], [0]

    def dying(old: Any, new: Any) -> None:
        done[0] += 1
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        rename(old, new)

    monkeypatch.setattr("client_app.plan.slots.os.rename", dying)
    seen = set()
    for first in (0, 1):  # with and without a personal model before
        for number in range(6):
            folder = tmp_path / f"{first}-{number}"
            left[0] = 10**6
            if first:
                carry_out(folder, 1)
            left[0] = number
            with contextlib.suppress(Killed):
                carry_out(folder, 2)
            left[0] = 10**6
            found = slots_of(folder)
            assert (folder / "adapter").exists() == bool(found)
            if found:
                round_ = 2 if found["local"] == random_adapter(LAYOUT, 2, 1e-3).digest else 1
                written = load_file(folder / "adapter" / "adapter_model.safetensors")
                kept = load_file(folder / "slots" / "local" / "adapter_model.safetensors")
                assert all(torch.equal(tensor, kept[name]) for name, tensor in written.items())
                seen.add((first, round_))
    assert seen == {(0, 2), (1, 1), (1, 2)}
