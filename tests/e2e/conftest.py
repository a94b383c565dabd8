"""A real cluster of stock Flower processes, shared by the tests of one module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from server_app.tools.cluster.local import LocalCluster, Settings


def our_processes() -> set[int]:
    """Flower processes on this machine that this test run started."""
    mine = {process.pid for process in psutil.Process(os.getpid()).children(recursive=True)}
    marked = set()
    for process in psutil.process_iter(["pid", "cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if process.info["pid"] in mine or "flower-s" in command or "flwr-" in command:
            marked.add(process.info["pid"])
    return marked


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Iterator[LocalCluster]:
    """Three clients: berlin, paris, rome."""
    folder: Path = tmp_path_factory.mktemp("cluster")
    (folder / "runs").mkdir()
    (folder / "runs" / ".cache").symlink_to(base_cache)
    settings = Settings(("berlin", "paris", "rome"), folder / "runs")
    with LocalCluster(folder / "cluster", settings) as running:
        yield running
