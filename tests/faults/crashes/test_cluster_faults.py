"""Real processes, the long form: ServerApp, SuperLink with a database, SuperNode and trainer killed at seeded moments.

Each kill waits for what Flower needs to notice (up to a minute), so this is for ``make test-faults``.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from server_app.run.run_directory import RunDirectory
from server_app.tools.cluster.certificates import ServerFiles
from server_app.tools.cluster.local import LocalCluster, Process, Settings
from tests.faults.killing import LONG, assert_same

pytestmark = pytest.mark.skipif(not LONG, reason="long form: make test-faults")
CLIENTS = ("berlin", "paris", "rome")
SMALL = {
    "num-server-rounds": 3, "local-steps": 3, "min-clients": 3, "strategy": "fedmerge", "round-timeout": 240.0,
    "startup-timeout": 240.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "runs").mkdir()
    (folder / "runs" / ".cache").symlink_to(base_cache)
    database = ("--database", str(folder / "superlink.db"))
    with LocalCluster(folder / "cluster", Settings(CLIENTS, folder / "runs", superlink_arguments=database)) as running:
        yield running


@pytest.fixture(scope="module")
def baseline(cluster: LocalCluster) -> Path:
    assert start(cluster, "baseline").completed
    return cluster.settings.runs_dir / "baseline"


def start(cluster: LocalCluster, name: str, watch: Any = lambda: None, **more: Any) -> Any:
    given = SMALL | {"run-name": name, "runs-dir": str(cluster.settings.runs_dir)} | more
    return cluster.run(given, watch=watch)


class Killer:
    """SIGKILL to a process, once, so many seconds after a phase's record was written."""

    def __init__(self, run: Path, phase: str, delay: float, victims: Any) -> None:
        self.run, self.phase, self.delay, self.victims = RunDirectory(run), phase, delay, victims
        self.seen = 0.0
        self.killed: list[int] = []

    def __call__(self) -> None:
        if self.killed:
            return
        if not self.seen and any(record["phase"] == self.phase for record in self.run.rounds()):
            self.seen = time.monotonic()
        if self.seen and time.monotonic() - self.seen > self.delay:
            for process in self.victims():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
                    self.killed.append(process.pid)


def named(cluster: LocalCluster, name: str) -> Process:
    """The cluster's process of this name."""
    return next(process for process in cluster.processes if process.name == name)


def below(cluster: LocalCluster, name: str, words: str) -> list[psutil.Process]:
    """Descendants of one of the cluster's processes whose command has these words."""
    root = named(cluster, name).find()
    assert root is not None
    found = []
    for child in root.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if words in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_serverapp_is_killed_and_the_run_resumed(seed: int, cluster: LocalCluster, baseline: Path) -> None:
    name = f"serverapp-{seed}"
    run = cluster.settings.runs_dir / name
    delay = random.Random(seed).uniform(0, 6)
    kill = Killer(run, "register", delay, lambda: below(cluster, "superlink", "flwr-serverapp"))
    outcome = start(cluster, name, kill)
    assert kill.killed
    assert not outcome.completed
    assert start(cluster, name, resume=str(run)).completed
    assert_same(run, baseline)


def test_a_client_process_is_killed_and_asked_again(cluster: LocalCluster, baseline: Path) -> None:
    run = cluster.settings.runs_dir / "clientapp"
    kill = Killer(run, "register", 3.0, lambda: below(cluster, "supernode-rome", "flwr-clientapp"))
    outcome = start(cluster, "clientapp", kill)
    assert outcome.completed, outcome.log.read_text()
    assert_same(run, baseline)


def test_a_supernode_is_killed_started_again_and_asked_again(cluster: LocalCluster, baseline: Path) -> None:
    """Flower refuses the same key for up to a minute after a kill; a supervisor tries again until it is let in."""
    run = cluster.settings.runs_dir / "supernode"
    rome = named(cluster, "supernode-rome")
    kill = Killer(run, "register", 2.0, lambda: [found] if (found := rome.find()) else [])

    def supervise() -> None:
        kill()
        now = named(cluster, "supernode-rome")
        if kill.killed and now.find() is None:
            cluster.start_supernode(CLIENTS.index("rome"), cluster.directory / "keys" / "rome")

    outcome = start(cluster, "supernode", supervise)
    assert kill.killed
    assert outcome.completed, outcome.log.read_text()
    assert_same(run, baseline)


def test_the_superlink_is_killed_with_all_it_started_and_the_run_resumed(cluster: LocalCluster, baseline: Path) -> None:
    """A machine that goes down and comes back with its database: SuperNodes find the new SuperLink by themselves."""
    run = cluster.settings.runs_dir / "superlink"

    def superlink() -> psutil.Process | None:
        return named(cluster, "superlink").find()

    kill = Killer(run, "register", 3.0, lambda: [*root.children(recursive=True), root] if (root := superlink()) else [])

    def supervise() -> None:
        kill()
        if kill.killed and superlink() is None:
            folder = cluster.directory / "certificates"
            cluster.start_superlink(ServerFiles(folder / "ca.crt", folder / "server.pem", folder / "server.key"))

    outcome = start(cluster, "superlink", supervise)
    assert kill.killed
    assert not outcome.completed
    assert start(cluster, "superlink", resume=str(run)).completed
    assert_same(run, baseline)


def test_the_record_of_every_run_names_every_client(cluster: LocalCluster, baseline: Path) -> None:
    for run in sorted(cluster.settings.runs_dir.glob("*/rounds.jsonl")):
        for line in run.read_text().splitlines():
            record = json.loads(line)
            if record["phase"] in ("train", "deliver"):
                assert set(record["clients"]) == set(CLIENTS)
