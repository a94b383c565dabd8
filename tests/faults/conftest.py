"""Everything here carries the marker ``faults``: ``make test-faults``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def runs_dir(tmp_path: Path, base_cache: Path) -> Path:
    """A folder for runs whose base-model cache all tests share."""
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / ".cache").symlink_to(base_cache)
    return folder
