"""Threads of a client: what its owner says, else its share of the cores, which it keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from client_app import processors


@pytest.mark.parametrize(("cores", "clients", "threads"), [(16, 4, 4), (16, 3, 5), (2, 6, 1), (8, 0, 1)])
def test_a_client_has_its_share_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, clients: int, threads: int
) -> None:
    monkeypatch.setattr(processors, "usable_cores", lambda: cores)
    monkeypatch.setattr(processors, "clients_here", lambda: clients)
    assert processors.threads_for(3, tmp_path / "state") == 3
    assert processors.threads_for(0, tmp_path / "state") == threads
    monkeypatch.setattr(processors, "clients_here", lambda: clients + 7)
    assert processors.threads_for(0, tmp_path / "state") == threads
    monkeypatch.setattr(processors, "usable_cores", lambda: 64)  # the state directory came to another machine
    assert processors.threads_for(0, tmp_path / "state") == max(1, 64 // (clients + 7))


def test_supernodes_are_counted(tmp_path: Path) -> None:
    before = processors.clients_here()
    script = tmp_path / processors.SUPERNODE
    script.write_text("print('up', flush=True)\ninput()\n")
    with subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = processors.clients_here()
        process.communicate(b"\n")
    assert found >= before + 1 or before > 0  # others may end meanwhile
    assert found >= 1
