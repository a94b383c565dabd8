"""Everything here carries the marker ``faults``: ``make test-faults``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def runs_dir(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs whose base-model cache all tests share."""
    shared = tmp_path_factory.getbasetemp() / "faults-base-cache"
    shared.mkdir(exist_ok=True)
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / ".cache").symlink_to(shared)
    return folder
