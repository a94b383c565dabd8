"""A runs directory whose base-model cache is shared by all tests of the session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from server_app.run.run_directory import RunDirectory
from tests.in_process import Tamper, run_in_process

Runner = Callable[..., RunDirectory]


@pytest.fixture
def runs_dir(tmp_path: Path, base_cache: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / ".cache").symlink_to(base_cache)
    return folder


@pytest.fixture
def run(runs_dir: Path) -> Runner:
    """The real round loop over in-process clients; small by default."""

    def start(clients: int = 3, tamper: Tamper | None = None, **config: object) -> RunDirectory:
        small: dict[str, object] = {"strategy": "fedavg", "num_server_rounds": 2, "local_steps": 3, "run_name": "test"}
        found: RunDirectory = run_in_process(runs_dir, clients, tamper, **(small | config))
        return found

    return start
