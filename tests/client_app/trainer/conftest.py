"""Owners of trainers: processes that do nothing, and a home with a name short enough for sockets."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from client_app.trainer.address import Owner
from client_app.trainer.client import TrainerClient

PATIENCE = 120.0
"""Seconds until a test gives up waiting; nothing depends on the value."""


@pytest.fixture(scope="module")
def home(base_cache: Path) -> Iterator[Path]:
    """A temporary folder with a name short enough for sockets; ``FLWR_HOME`` and ``TMPDIR`` point to it."""
    folder = Path(tempfile.mkdtemp(prefix="fa", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        patch.setenv("FLWR_HOME", str(folder / "flwr"))
        (folder / "state").mkdir()
        (folder / "state" / ".cache").symlink_to(base_cache)
        yield folder
    shutil.rmtree(folder)


@pytest.fixture
def new_owner(home: Path) -> Iterator[Callable[[], Owner]]:
    """Makes owners: processes that do nothing; with the test they end, and their trainers must."""
    with owners() as make:
        yield make


class owners:
    """Context of processes that do nothing."""

    def __enter__(self) -> Callable[[], Owner]:
        self.made: list[tuple[subprocess.Popen[bytes], Owner]] = []
        return self.make

    def make(self) -> Owner:
        process = subprocess.Popen(["sleep", "3600"])
        owner = Owner.of(process.pid)
        self.made.append((process, owner))
        return owner

    def end(self, owner: Owner) -> None:
        for process, found in self.made:
            if found == owner:
                process.kill()
                process.wait()

    def __exit__(self, *exc_info: object) -> None:
        for process, owner in self.made:
            process.kill()
            process.wait()
            wait_until(lambda owner=owner: not trainers_of(owner))  # type: ignore[misc]


@pytest.fixture(scope="module")
def shared(home: Path) -> Iterator[Owner]:
    """An owner whose trainer serves several tests, none of which hurts it."""
    with owners() as make:
        yield make()


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trainers_of(owner: Owner) -> list[int]:
    """Process ids of an owner's trainers, those included that are starting."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        command = process.info["cmdline"] or []
        if "client_app.trainer.server" in command and str(owner) in command and process.info["status"] != "zombie":
            found.append(process.info["pid"])
    return found


def pid_of(owner: Owner) -> int:
    with TrainerClient(owner, PATIENCE).connect() as (_, pid):
        return pid
