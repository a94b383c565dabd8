"""One thread: test processes share two cores, and sums are compared bit by bit. One base model for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``.cache`` of state directories: the digits scenario's base model takes seconds to make."""
    return tmp_path_factory.mktemp("base-cache")
