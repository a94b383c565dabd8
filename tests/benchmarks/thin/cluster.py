"""A real ``flower-superlink`` with a database, and processes of thin nodes; measures what they use."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import psutil

from server_app.tools.cluster.superlink import SuperLink

ROOT = Path(__file__).resolve().parents[3]
MIB = 2**20


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ThinCluster(SuperLink):
    """A context manager: everything that it starts ends with it.

    Args:
        folder: for database, logs and Flower's files.
        nodes: how many thin nodes.
        size: bytes of an adapter.
        poll: seconds between a node's looks for messages; 3 at a stock SuperNode.
        processes: number of processes that the nodes are divided among.
        threads: threads of each process. With 100, the looks of 1,000 nodes leave a SuperLink no time for anything.
    """

    def __init__(
        self, folder: Path, nodes: int, size: int, poll: float = 3.0, processes: int = 2, threads: int = 8
    ) -> None:
        super().__init__("thin", folder / "logs")
        self.folder = folder
        self.nodes, self.size, self.poll = nodes, size, poll
        self.processes, self.threads = min(processes, nodes), threads
        self.children: list[subprocess.Popen[str]] = []
        self.crowds: list[subprocess.Popen[str]] = []
        self.peaks: Counter[str] = Counter()
        self.cpu: dict[str, float] = {}
        self.marks: list[Counter[str]] = []
        self._looked = 0.0
        self._size = 0

    def environment(self) -> dict[str, str]:
        """Flower finds its own programs through PATH."""
        return super().environment() | {
            "FLWR_HOME": str(self.folder / "home"),
            "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"],
        }

    def __enter__(self) -> Self:
        fleet, http = free_port(), free_port()
        (self.folder / "home").mkdir(parents=True)
        self.logs.mkdir()
        connection = (
            f'[superlink]\ndefault = "thin"\n\n[superlink.thin]\naddress = "127.0.0.1:{http}"\ninsecure = true\n'
        )
        (self.folder / "home" / "config.toml").write_text(connection)
        try:
            arguments = [
                *(
                    "--insecure",
                    "--disable-runtime-dependency-installation",
                    "--database",
                    str(self.folder / "link.db"),
                ),
                *("--fleet-api-address", f"127.0.0.1:{fleet}", "--port", str(http)),
            ]
            self._start("superlink", ["flower-superlink", *arguments])
            self._wait_for(fleet)
            self._wait_for(http)
            share = -(-self.nodes // self.processes)
            for first in range(0, self.nodes, share):
                asked = {
                    "address": f"127.0.0.1:{fleet}",
                    "first": first,
                    "count": min(share, self.nodes - first),
                    "bytes": self.size,
                    "poll": self.poll,
                    "threads": self.threads,
                }
                command = [sys.executable, "-m", "tests.benchmarks.thin.node", json.dumps(asked)]
                self.crowds.append(
                    self._start(f"nodes-{first}", command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                )
            for crowd in self.crowds:
                if crowd.stdout is None or not crowd.stdout.readline():
                    raise RuntimeError(f"thin nodes did not come online; see {self.logs}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        family: list[psutil.Process] = []
        for child in self.children:
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(child.pid)
                family += [root, *root.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        for member in psutil.wait_procs(family, timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        for child in self.children:
            child.wait()

    def stop_nodes(self) -> list[dict[str, Any]]:
        """End the nodes; what each process of them has done."""
        found = []
        for crowd in self.crowds:
            output, _ = crowd.communicate(timeout=180)
            found.append(json.loads(output.splitlines()[-1]))
        return found

    def look(self) -> None:
        """Peak memory (resident, in MiB) and processor seconds of SuperLink and ServerApp, a few times a second."""
        if time.monotonic() - self._looked < 0.15:
            return
        self._looked = time.monotonic()
        for number, crowd in enumerate(self.crowds):
            with contextlib.suppress(psutil.Error):
                used = psutil.Process(crowd.pid).cpu_times()
                self.cpu[f"nodes {number}"] = used.user + used.system
        root = psutil.Process(self.children[0].pid)
        with contextlib.suppress(psutil.Error):
            for member in [root, *root.children(recursive=True)]:
                name = "superlink"
                if member.pid != root.pid:
                    words = " ".join(member.cmdline())
                    name = "serverapp" if "flwr-serverapp" in words else "superexec"
                memory, used = member.memory_info().rss / MIB, member.cpu_times()
                self.peaks[name] = max(self.peaks[name], round(memory))
                self.cpu[f"{name} {member.pid}"] = used.user + used.system

    def mark(self, file: Path) -> None:
        """:meth:`look`, and note what each kind of process has used whenever ``file`` has grown, which ends a round."""
        self.look()
        size = file.stat().st_size if file.exists() else 0
        if size != self._size:
            self._size = size
            self.marks.append(Counter({name: self.cpu_seconds(name) for name in ("serverapp", "superlink", "nodes")}))

    def between(self, first: int, last: int) -> dict[str, float]:
        """Processor seconds by kind of process, from one mark to another."""
        return {name: self.marks[last][name] - self.marks[first][name] for name in self.marks[last]}

    def cpu_seconds(self, name: str) -> float:
        """Processor seconds of all processes of this kind so far."""
        return sum(seconds for process, seconds in self.cpu.items() if process.startswith(name))

    def _start(self, name: str, command: list[str], **streams: Any) -> subprocess.Popen[str]:
        with (self.logs / f"{name}.log").open("w") as log:
            given: Mapping[str, Any] = {"stdout": log, "stdin": subprocess.DEVNULL} | streams
            child = subprocess.Popen(
                command, stderr=log, text=True, env=self.environment(), cwd=ROOT, start_new_session=True, **given
            )
        self.children.append(child)
        return child

    def _wait_for(self, port: int) -> None:
        deadline = time.monotonic() + 300  # a busy machine
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"nothing listens on port {port}; see {self.logs / 'superlink.log'}")
